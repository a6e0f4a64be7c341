"""pixels → image_embedding and scores: forward passes of several threads on one device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder

__all__ = ["ForwardPasses", "Results"]

_log = logging.getLogger(__name__)

#: Embeddings float32 (N, D) and each classifier's scores float32 (N,), on the CPU.
Results = tuple[torch.Tensor, list[torch.Tensor]]

#: Threads that keep a GPU busy: while one waits for its results, the other has copied and
#: launched the next batch. Each has a stream of its own.
_GPU_STREAMS = 2

#: On a CPU the tower takes a few images at a time anyway, larger batches would only hold pixels.
_CPU_BATCH_SIZE = 64


class ForwardPasses:
    """Tower and classifiers on one device, for several threads at a time.

    Args:
        embedder: the CLIP tower.
        classifiers: for embeddings of its width.
        device: a torch device.

    Attributes:
        batch_size: images per forward pass.
        num_threads: forward passes under way at a time.
        fitting_batch_size: images that the device has memory for, as far as is known.
    """

    def __init__(
        self, embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier], device: str
    ) -> None:
        self.embedder = embedder
        self.classifiers = tuple(classifiers)
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.batch_size = embedder.batch_size
        self.num_threads = _GPU_STREAMS
        if not self.on_gpu:  # each core takes images of its own through the tower
            self.batch_size = min(embedder.batch_size, _CPU_BATCH_SIZE)
            self.num_threads = torch.get_num_threads()
        self.fitting_batch_size = self.batch_size
        self._turns = _Turns(self.num_threads, device if self.on_gpu else None)

    def load(self) -> None:
        """Load tower and classifiers; before the threads start, or each would load its own.

        Raises:
            WeightsError: a file cannot be had or does not fit.
        """
        self.embedder.load_embedding_model(self.device)
        device = str(torch.empty(0, device=self.device).device)  # cuda is cuda:0 to a tensor
        for classifier in self.classifiers:
            classifier.model(device)
        if self.on_gpu:
            torch.cuda.synchronize(device)  # other streams would not wait for the weights

    def score(self, pixels: torch.Tensor) -> Results:
        """Embed and score uint8 (N, S, S, 3), in pieces that the device has memory for.

        Where it has not, half is tried, alone, because the other passes may have had the
        memory. What a full batch taught is kept for all to come.

        Raises:
            torch.cuda.OutOfMemoryError: there is not even memory for one image.
        """
        size = self.fitting_batch_size
        with torch.inference_mode():
            with self._turns.one_of_several():
                try:
                    return self._forward(pixels, size)
                except RuntimeError as exc:
                    if not _out_of_memory(exc):
                        raise
            with self._turns.alone():
                while True:
                    torch.cuda.empty_cache()  # out of the except block, which held the tensors
                    size = self._smaller(min(size, len(pixels)))
                    try:
                        return self._forward(pixels, size)
                    except RuntimeError as exc:
                        if size == 1 or not _out_of_memory(exc):
                            raise

    def _forward(self, pixels: torch.Tensor, size: int) -> Results:
        tower = self.embedder.load_embedding_model(self.device)
        pieces = [tower(p.to(self.device, non_blocking=True)) for p in pixels.split(size)]
        embeddings = torch.cat(pieces)
        scores = [classifier.score(embeddings) for classifier in self.classifiers]
        return embeddings.cpu(), [column.cpu() for column in scores]

    def _smaller(self, tried: int) -> int:
        """The size to try after this one did not fit."""
        if tried > self.fitting_batch_size:
            return self.fitting_batch_size  # another thread found it meanwhile
        half = (tried + 1) // 2
        if 1 < tried == self.fitting_batch_size:
            self.fitting_batch_size = half
            _log.warning(
                "%s has no memory for a batch of %d images, going on with %d",
                self.device, tried, half,
            )  # fmt: skip
        return half


class _Turns:
    """Turns on a device: several at a time, each with a stream of its own, or one alone.

    The streams are kept for good: torch keeps the memory that was freed on each.
    """

    def __init__(self, limit: int, gpu: str | None) -> None:
        self._limit = limit
        self._permits = threading.Semaphore(limit)
        self._alone = threading.Lock()
        self._streams: SimpleQueue[Any] = SimpleQueue()
        for _ in range(limit):
            self._streams.put(None if gpu is None else torch.cuda.Stream(gpu))

    @contextmanager
    def one_of_several(self) -> Iterator[None]:
        with self._permits, self._stream():
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._alone:
            for _ in range(self._limit):
                self._permits.acquire()
            try:
                with self._stream():
                    yield
            finally:
                self._permits.release(self._limit)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        stream = self._streams.get()
        try:
            with torch.cuda.stream(stream):  # None is no change
                yield
        finally:
            self._streams.put(stream)


def _out_of_memory(exc: RuntimeError) -> bool:
    """Whether the GPU's memory was short; cuBLAS and cuDNN say so in their own words."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(exc)
