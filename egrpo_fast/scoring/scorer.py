"""What the rewards that are networks share: micro-batches, autocast, prompt features kept, weights offloaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from egrpo_fast.files import fingerprint, sampled
from egrpo_fast.scoring.preprocess import Preprocess

Dtype = Literal["float32", "float16", "bfloat16"]
CACHED_PROMPTS = 4096
"""Prompts whose features are kept; the oldest go. A group, and every later epoch, finds its prompt encoded."""


class Scorer(ABC):
    """`score_b = compare(preprocess(image_b), encode(prompt_b))` of one frozen network.

    micro_batch: most images of one forward; none given: all. dtype: of autocast; none given: what the original runs
    in (`original_dtype`) on a GPU, float32 on a CPU. offload: the weights wait in CPU memory and visit the device for a
    call; they are never written back, for they do not change.
    """

    original_dtype: Dtype = "float32"

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        device: torch.device | str,
        micro_batch: int | None = None,
        dtype: Dtype | None = None,
        offload: bool = False,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch: {micro_batch}, allowed: 1 or more")
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"dtype: {dtype!r}, allowed: float32, float16, bfloat16")
        self.device = torch.device(device)
        self.network: Any = network.eval().requires_grad_(False).to("cpu" if offload else self.device)
        self.preprocess = preprocess
        self._micro_batch, self._offload = micro_batch, offload
        self._dtype = getattr(torch, dtype or (self.original_dtype if self.device.type == "cuda" else "float32"))
        self._features: dict[str, Tensor] = {}
        if offload and self.device.type == "cuda":
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory()

    @abstractmethod
    def encode(self, prompts: list[str]) -> Tensor:
        """[N, ...] on the device: what `compare` needs of every prompt, a function of that prompt alone."""

    @abstractmethod
    def compare(self, images: Tensor, features: Tensor) -> Tensor:
        """[B] float32 scores of preprocessed images and their prompts' features."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] float in [0, 1] on the device, one prompt each -> [B] float32."""
        size = self._micro_batch or max(1, len(images))
        half = self._dtype != torch.float32
        with self._on_device(), torch.autocast(self.device.type, self._dtype if half else None, enabled=half):
            features = self._encoded(prompts, size)
            scores = [
                self.compare(self.preprocess(some), rows)
                for some, rows in zip(images.split(size), features.split(size))
            ]
        return torch.cat(scores).float()

    def fingerprint(self) -> str:
        """Of a sample of every weight (`files.sampled`), whatever it is called and wherever it lies."""

        def sample(weight: Tensor) -> bytes:
            flat = weight.detach().contiguous().view(-1).view(torch.uint8)
            return torch.cat([flat[at] for at in sampled(flat.numel())]).cpu().numpy().tobytes()

        return fingerprint(sorted(sample(weight) for weight in self.network.parameters()))

    def _encoded(self, prompts: Sequence[str], size: int) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        for start in range(0, len(new), size):
            some = new[start : start + size]
            self._features.update(zip(some, self.encode(some)))
        rows = torch.stack([self._features[prompt] for prompt in prompts])
        while len(self._features) > CACHED_PROMPTS:
            del self._features[next(iter(self._features))]
        return rows

    def _tensors(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if not self._offload:
            yield
            return
        tensors = self._tensors()
        at_home = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield
        finally:
            for tensor, data in zip(tensors, at_home):
                tensor.data = data
