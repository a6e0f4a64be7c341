"""pixels → embeddings and scores: forward passes of several threads on one device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.pixels import Transform
from spark_nsfw.score.recipe import Recipe

__all__ = ["ForwardPasses", "Results"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """What the forward passes give for N images, on the CPU.

    Attributes:
        embeddings: float32 (N, D); None where there is no embedder.
        norms: float32 (N,), of their projections; None where there is no embedder.
        scores: of each classifier, float32 (N,) or (N, K).
    """

    embeddings: torch.Tensor | None
    norms: torch.Tensor | None
    scores: list[torch.Tensor]


#: uint8 (N, S, S, 3) for each transform.
Pixels = Mapping[Transform, torch.Tensor]

#: Threads that keep a GPU busy: while one waits for its results, the other has copied and
#: launched the next batch. Each has a stream of its own.
_GPU_STREAMS = 2

#: On a CPU the tower takes a few images at a time anyway, larger batches would only hold pixels.
_CPU_BATCH_SIZE = 64


class ForwardPasses:
    """The models of a recipe on one device, for several threads at a time.

    Args:
        recipe: about images, and its classifiers fit its embedder.
        device: a torch device.

    Attributes:
        batch_size: images per forward pass.
        num_threads: forward passes under way at a time.
        fitting_batch_size: images that the device has memory for, as far as is known.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.embedder = recipe.embedder
        self.classifiers = recipe.classifiers
        self._pixel_classifiers = recipe.pixel_classifiers
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.batch_size = recipe.batch_size
        self.num_threads = _GPU_STREAMS
        if not self.on_gpu:  # each core takes images of its own through the models
            self.batch_size = min(self.batch_size, _CPU_BATCH_SIZE)
            self.num_threads = torch.get_num_threads()
        self.fitting_batch_size = self.batch_size
        self._turns = _Turns(self.num_threads, device if self.on_gpu else None)

    def load(self) -> None:
        """Load all models; before the threads start, or each would load its own.

        Raises:
            WeightsError: a file cannot be had or does not fit.
        """
        if self.embedder is not None:
            self.embedder.tower(self.device)
        device = str(torch.empty(0, device=self.device).device)  # cuda is cuda:0 to a tensor
        for classifier in self.classifiers:
            classifier.model(device)
        if self.on_gpu:
            torch.cuda.synchronize(device)  # other streams would not wait for the weights

    def score(self, pixels: Pixels) -> Results:
        """Embed and score images, in pieces that the device has memory for.

        Where it has not, half is tried, alone, because the other passes may have had the
        memory. What a full batch taught is kept for all to come.

        Args:
            pixels: uint8 (N, S, S, 3) for each transform of the recipe.

        Raises:
            torch.cuda.OutOfMemoryError: there is not even memory for one image.
        """
        num_images = len(next(iter(pixels.values())))
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
                    size = self._smaller(min(size, num_images))
                    try:
                        return self._forward(pixels, size)
                    except RuntimeError as exc:
                        if size == 1 or not _out_of_memory(exc):
                            raise

    def _forward(self, pixels: Pixels, size: int) -> Results:
        """As `score`, ``size`` images at a time."""
        pieces = {transform: images.split(size) for transform, images in pixels.items()}
        embedded, seen = [], []
        for number in range(len(next(iter(pieces.values())))):
            there = {
                transform: images[number].to(self.device, non_blocking=True)
                for transform, images in pieces.items()
            }
            if self.embedder is not None:
                tower = self.embedder.tower(self.device)
                embedded.append(tower.with_norms(there[self.embedder.transform]))
            seen.append([each.score(there[each.transform]) for each in self._pixel_classifiers])
        embeddings = norms = None
        if embedded:
            embeddings, norms = (torch.cat(both) for both in zip(*embedded, strict=True))
        by_pixels = iter([torch.cat(column) for column in zip(*seen, strict=True)])
        scores = []
        for classifier in self.classifiers:
            if isinstance(classifier, ImageClassifier):
                assert embeddings is not None
                scores.append(classifier.score(embeddings, norms))
            else:
                scores.append(next(by_pixels))
        return Results(
            None if embeddings is None else embeddings.cpu(),
            None if norms is None else norms.cpu(),
            [column.cpu() for column in scores],
        )

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
