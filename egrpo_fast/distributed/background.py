"""Work beside the main thread: one worker thread, on a GPU with a stream of its own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Value = TypeVar("Value")


class BackgroundWorker:
    """Runs what it is given one after the other, while the main thread and the device go on with something else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "beside")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, work: Callable[[], Value]) -> Callable[[], Value]:
        """Begin `work` on what the current stream has been given so far. Returns what waits for it.

        That returns the work's value, ready for the then current stream, or raises what the work raised. Tensors that
        the work reads must live until then.
        """
        if self._stream is None:
            return self._thread.submit(work).result
        given = torch.cuda.current_stream(self._device).record_event()
        future = self._thread.submit(self._on_stream, work, given)

        def wait() -> Value:
            value, done = future.result()
            torch.cuda.current_stream(self._device).wait_event(done)
            return value

        return wait

    def _on_stream(self, work: Callable[[], Value], given: torch.cuda.Event) -> tuple[Value, torch.cuda.Event]:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(given)
            return work(), self._stream.record_event()
