"""Where forward passes run on a device: several at a time, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from spark_nsfw.score.pixels import Transform

__all__ = ["Compute", "Lane", "Lanes", "Pixels", "out_of_memory"]


#: uint8 (N, S, S, 3) for each transform.
Pixels = Mapping[Transform, torch.Tensor]

#: Pixels on a device → what models give for them, there.
Compute = Callable[[Pixels], Sequence[torch.Tensor]]


class Lane:
    """One forward pass after another: on a GPU on a stream of its own.

    A pass of a size that was recorded is replayed from a CUDA graph: one call instead of
    hundreds, which threads that decode would hold up.

    Args:
        device: a torch device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        on_gpu = torch.device(device).type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Pixels = {}
        self._outputs: Sequence[torch.Tensor] = []

    def record(self, compute: Compute, transforms: Sequence[Transform], num_images: int) -> None:
        """Record a forward pass, on a GPU; to be called while no other pass is under way.

        Raises:
            RuntimeError: memory is short, or something in it cannot be recorded.
        """
        self.forget()
        with self.entered():
            inputs = {
                each: torch.zeros(
                    (num_images, each.size, each.size, 3), dtype=torch.uint8, device=self._device
                )
                for each in transforms
            }
            compute(inputs)  # what is made once, such as workspaces, is no part of the record
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                outputs = compute(inputs)
        self._graph, self._inputs, self._outputs = graph, inputs, outputs

    def forget(self) -> None:
        """Give back the memory of what was recorded."""
        self._graph, self._inputs, self._outputs = None, {}, []

    def run(self, compute: Compute, pixels: Pixels) -> list[torch.Tensor]:
        """What models give for pixels, on the CPU; to be called inside `entered`."""
        if self._graph is not None and self._sizes(pixels) == self._sizes(self._inputs):
            for transform, images in pixels.items():
                self._inputs[transform].copy_(images, non_blocking=True)
            self._graph.replay()
            outputs = self._outputs
        else:
            outputs = compute(
                {
                    transform: images.to(self._device, non_blocking=True)
                    for transform, images in pixels.items()
                }
            )
        return [output.cpu() for output in outputs]

    @staticmethod
    def _sizes(pixels: Pixels) -> list[torch.Size]:
        return [images.shape for images in pixels.values()]

    @contextmanager
    def entered(self) -> Iterator[Lane]:
        """This thread's work goes to this lane's stream."""
        with torch.cuda.stream(self._stream):  # None is no change
            yield self


class Lanes:
    """Lanes of one device, each taken by one thread at a time.

    They are kept for good: torch keeps the memory that was freed on each stream.
    """

    def __init__(self, count: int, device: str) -> None:
        self.all = [Lane(device) for _ in range(count)]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.all:
            self._free.put(lane)
        self._permits = threading.Semaphore(count)
        self._alone = threading.Lock()

    @contextmanager
    def one_of_several(self) -> Iterator[Lane]:
        """A lane, while other threads are in others."""
        with self._permits, self._taken() as lane:
            yield lane

    @contextmanager
    def alone(self) -> Iterator[Lane]:
        """A lane, while all others are empty."""
        with self._alone:
            for _ in self.all:
                self._permits.acquire()
            try:
                with self._taken() as lane:
                    yield lane
            finally:
                self._permits.release(len(self.all))

    @contextmanager
    def _taken(self) -> Iterator[Lane]:
        lane = self._free.get()
        try:
            with lane.entered():
                yield lane
        finally:
            self._free.put(lane)


#: How CUDA and its libraries say that a GPU's memory is short, where torch does not.
_SHORT_OF_MEMORY = ("ALLOC_FAILED", "CUDA error: out of memory", "CUBLAS_STATUS_NOT_INITIALIZED")


def out_of_memory(exc: RuntimeError) -> bool:
    """Whether the GPU's memory was short."""
    is_torchs = isinstance(exc, torch.cuda.OutOfMemoryError)
    return is_torchs or any(words in str(exc) for words in _SHORT_OF_MEMORY)
