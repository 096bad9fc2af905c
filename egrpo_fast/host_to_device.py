"""From host to device without waiting: on a GPU by pinned memory, behind whatever the stream is still busy with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Device = torch.device | str | None


def to_device(tensor: Tensor, device: Device) -> Tensor:
    """A tensor of the host's on a device; where that is a GPU the host does not wait for the copy."""
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(values: Sequence[Any], device: Device, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values)` there, by `to_device`: torch's own waits for the whole stream."""
    return to_device(torch.tensor(values, dtype=dtype), device)
