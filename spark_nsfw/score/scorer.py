"""Arrow batches of samples in, Arrow batches of metadata out.

The only place that puts decoding, tower and classifiers together. The caller's thread
reads; decoding threads fill the pixels of the batches to come; computing threads take
full batches through tower and classifiers. A device batch forms across Arrow batches, so
neither the size of a shard nor that of an Arrow batch shapes it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spark_nsfw.errors import ImageError, OversizedImageError
from spark_nsfw.read.source import Rows
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    IMAGE,
    STATUS,
    Status,
    metadata_schema,
)
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder
from spark_nsfw.score.pixels import Decode, decode_image
from spark_nsfw.score.recipe import Recipe

__all__ = ["Scorer"]

_log = logging.getLogger(__name__)

#: Device batches that decode ahead of those that are computed.
_DECODING_AHEAD = 2

#: Images that a decoding thread takes at a time: handing them over costs as much as a row.
_DECODING_CHUNK = 8

#: Threads that keep a GPU busy: while one waits for its results, the other has copied and
#: launched the next batch. Each has a stream of its own.
_GPU_STREAMS = 2

#: Rows that wait, at most, until a device batch is full; hardly any of them has an image then.
_ROWS_WAITING = 16_384

#: On a CPU the tower takes a few images at a time anyway, larger batches would only hold pixels.
_CPU_BATCH_SIZE = 64


class Scorer:
    """Embeds and scores samples, in order, one metadata row for each.

    Args:
        embedder: the CLIP tower.
        classifiers: applied to its embeddings; None takes the embedder's own.
        device: a torch device; by default the GPU if there is one.
        keep_embeddings: whether the metadata has the embedding column.

    Raises:
        EmbeddingWidthError: a classifier takes embeddings of another width.
    """

    def __init__(
        self,
        embedder: TimmImageEmbedder,
        classifiers: Sequence[ImageClassifier] | None = None,
        device: str | None = None,
        keep_embeddings: bool = True,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        recipe = Recipe.of(embedder, classifiers, keep_embeddings=keep_embeddings)
        self._prepare(recipe.ready(device=device), device)

    @classmethod
    def of(cls, recipe: Recipe, device: str) -> Scorer:
        """The scorer of a recipe that is ready, on a torch device."""
        scorer = cls.__new__(cls)
        scorer._prepare(recipe, device)
        return scorer

    def _prepare(self, recipe: Recipe, device: str) -> None:
        assert recipe.embedder is not None
        self.embedder = embedder = recipe.embedder
        self.classifiers = list(recipe.classifiers)
        self.keep_embeddings = recipe.keep_embeddings
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        #: Images per forward pass.
        self.batch_size = embedder.batch_size
        #: Forward passes under way at a time.
        self.num_computing_threads = _GPU_STREAMS
        if not self.on_gpu:  # each core takes images of its own through the tower
            self.batch_size = min(embedder.batch_size, _CPU_BATCH_SIZE)
            self.num_computing_threads = torch.get_num_threads()
        #: Images per forward pass that the device has memory for, as far as is known.
        self.fitting_batch_size = self.batch_size
        self.passes = _Passes(self.num_computing_threads, self.device if self.on_gpu else None)
        self._result_fields = recipe.result_fields

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds."""
        return self._result_fields

    def score(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Score rows that hold encoded images.

        Args:
            batches: with the columns ``image``, ``status`` and ``error_message`` of
                `spark_nsfw.schema.sample_schema`, and any others. Rows whose status is
                not ``ok`` pass through unscored.

        Returns:
            For every batch, in order, one with `spark_nsfw.schema.metadata_schema`: the
            same rows without ``image``, with embeddings and scores, which are null
            where ``status`` is not ``ok``.
        """
        return self.score_rows(
            (batch.drop_columns([IMAGE]), [image.as_buffer() for image in batch.column(IMAGE)])
            for batch in batches
        )

    def score_rows(self, rows: Iterable[Rows]) -> Iterator[pa.RecordBatch]:
        """As `score`, for images that are not in an Arrow column: they are not copied.

        Args:
            rows: pairs of a batch without the column ``image``, and for each of its
                rows the encoded image, bytes or another buffer, or None; what rows have
                whose status is not ``ok`` does not matter.
        """
        decoders = _thread_pool(self.embedder.num_threads_per_worker, "decode")
        computers = _thread_pool(self.num_computing_threads, "compute")
        pipeline = _Pipeline(self, decoders, computers)
        try:
            for batch, images in rows:
                pipeline.add(batch, images)
                yield from pipeline.finished()
            pipeline.flush()
            yield from pipeline.finished()
        finally:
            for pool in (decoders, computers):
                pool.shutdown(wait=True, cancel_futures=True)


class _Passes:
    """Forward passes on a device: some at a time, each with a stream of its own, or one alone.

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


def _thread_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that do not split their work further: there is one for each core already."""
    return ThreadPoolExecutor(num_threads, name, torch.set_num_threads, (1,))


@dataclass
class _Rows:
    """The rows of one Arrow batch on their way through the pipeline.

    Attributes:
        batch: without the images.
        image_rows: the rows that have an image, int64 (K,).
        embeddings, scores: of these images, float32 (K, D) and (classifiers, K).
        faults: status and message by position among these images.
    """

    batch: pa.RecordBatch
    image_rows: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    num_done: int = 0
    faults: dict[int, tuple[Status, str]] = field(default_factory=dict)


#: Position of an image in a list, and what is wrong with it.
_Fault = tuple[int, Status, str]

#: Embeddings float32 (N, D) and each classifier's scores float32 (N,), on the CPU.
_Results = tuple[torch.Tensor, list[torch.Tensor]]


@dataclass
class _Chunk:
    """Images of one Arrow batch that one thread decodes, side by side in a device batch."""

    rows: _Rows
    first_position: int
    num_images: int
    decoding: Future[list[_Fault]]


@dataclass
class _DeviceBatch:
    """Images that go through the tower together: uint8 (B, S, S, 3), the first of them used."""

    pixels: torch.Tensor
    chunks: list[_Chunk] = field(default_factory=list)
    num_images: int = 0
    computing: Future[_Results] | None = None


class _Pipeline:
    """Decode → device → results, with bounded queues between."""

    def __init__(
        self, scorer: Scorer, decoders: ThreadPoolExecutor, computers: ThreadPoolExecutor
    ) -> None:
        self.scorer = scorer
        self.decoders = decoders
        self.computers = computers
        self.tower = scorer.embedder.load_embedding_model(scorer.device)
        # Loaded here: the computing threads would all load it at once.
        device = str(torch.empty(0, device=scorer.device).device)
        for classifier in scorer.classifiers:
            classifier.model(device)
        if scorer.on_gpu:
            torch.cuda.synchronize(device)  # other streams would not wait for the weights
        self.waiting: deque[_Rows] = deque()
        self.num_rows_waiting = 0
        self.filling: _DeviceBatch | None = None
        self.computing: deque[_DeviceBatch] = deque()
        self.free_pixels: list[torch.Tensor] = []

    def add(self, batch: pa.RecordBatch, images: Sequence[Any]) -> None:
        """Start on the images of a batch; waits while enough others are under way."""
        ok = pc.equal(batch.column(STATUS), Status.OK.value).to_numpy(zero_copy_only=False)
        image_rows = np.flatnonzero(ok)
        width = self.scorer.embedder.embedding_size
        rows = _Rows(
            batch,
            image_rows,
            np.zeros((len(image_rows), width), np.float32),
            np.zeros((len(self.scorer.classifiers), len(image_rows)), np.float32),
        )
        self.waiting.append(rows)
        self.num_rows_waiting += batch.num_rows
        position = 0
        while position < len(image_rows):
            device_batch = self.filling = self.filling or _DeviceBatch(self._take_pixels())
            start = device_batch.num_images
            count = min(_DECODING_CHUNK, self.scorer.batch_size - start, len(image_rows) - position)
            chunk = [images[row] for row in image_rows[position : position + count]]
            pixels = device_batch.pixels[start : start + count].numpy()
            decoding = self.decoders.submit(
                _decode_images, chunk, pixels, self.scorer.embedder.decode
            )
            device_batch.chunks.append(_Chunk(rows, position, count, decoding))
            device_batch.num_images += count
            position += count
            if device_batch.num_images == self.scorer.batch_size:
                self._launch(device_batch)
        if self.filling is not None and self.num_rows_waiting > _ROWS_WAITING:
            self._launch(self.filling)

    def _take_pixels(self) -> torch.Tensor:
        if self.free_pixels:
            return self.free_pixels.pop()
        size = self.scorer.embedder.image_size
        shape = (self.scorer.batch_size, size, size, 3)
        # zeros: the place of an undecodable image is computed like any other and ignored
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self.scorer.on_gpu)

    def _launch(self, batch: _DeviceBatch) -> None:
        """Hand a batch to the computing threads, and wait until there is room for another."""
        self.filling = None
        batch.computing = self.computers.submit(self._compute, batch)
        self.computing.append(batch)
        while len(self.computing) > self.scorer.num_computing_threads + _DECODING_AHEAD:
            self._finish(self.computing.popleft())

    def flush(self) -> None:
        """Finish everything that was added."""
        if self.filling is not None:
            self._launch(self.filling)
        while self.computing:
            self._finish(self.computing.popleft())

    def finished(self) -> Iterator[pa.RecordBatch]:
        """The metadata batches that are complete, in order."""
        while self.computing and self.computing[0].computing.done():  # type: ignore[union-attr]
            self._finish(self.computing.popleft())
        while self.waiting and self.waiting[0].num_done == len(self.waiting[0].image_rows):
            rows = self.waiting.popleft()
            self.num_rows_waiting -= rows.batch.num_rows
            yield self._metadata(rows)

    def _compute(self, batch: _DeviceBatch) -> _Results:
        for chunk in batch.chunks:
            chunk.decoding.result()  # `wait` would never hear that one was cancelled
        with torch.inference_mode():
            return self._score(batch.pixels[: batch.num_images])

    def _score(self, pixels: torch.Tensor) -> _Results:
        """Score uint8 (N, S, S, 3), in pieces that the device has memory for.

        Where it has not, half is tried, alone, because the other passes may have had the
        memory. What a full batch taught is kept for all to come.
        """
        scorer, size = self.scorer, self.scorer.fitting_batch_size
        with scorer.passes.one_of_several():
            try:
                return self._forward(pixels, size)
            except RuntimeError as exc:
                if not _out_of_memory(exc):
                    raise
        with scorer.passes.alone():
            while True:
                torch.cuda.empty_cache()  # out of the except block, which held the tensors
                size = self._smaller(min(size, len(pixels)))
                try:
                    return self._forward(pixels, size)
                except RuntimeError as exc:
                    if size == 1 or not _out_of_memory(exc):
                        raise

    def _forward(self, pixels: torch.Tensor, size: int) -> _Results:
        device = self.scorer.device
        pieces = [self.tower(p.to(device, non_blocking=True)) for p in pixels.split(size)]
        embeddings = torch.cat(pieces)
        scores = [classifier.score(embeddings) for classifier in self.scorer.classifiers]
        return embeddings.cpu(), [column.cpu() for column in scores]

    def _smaller(self, tried: int) -> int:
        """The size to try after this one did not fit."""
        scorer = self.scorer
        if tried > scorer.fitting_batch_size:
            return scorer.fitting_batch_size  # another thread found it meanwhile
        half = (tried + 1) // 2
        if 1 < tried == scorer.fitting_batch_size:
            scorer.fitting_batch_size = half
            _log.warning(
                "%s has no memory for a batch of %d images, going on with %d",
                scorer.device, tried, half,
            )  # fmt: skip
        return half

    def _finish(self, batch: _DeviceBatch) -> None:
        """Give the rows of a batch their results."""
        assert batch.computing is not None
        embeddings, scores = batch.computing.result()
        start = 0
        for chunk in batch.chunks:
            rows, first = chunk.rows, chunk.first_position
            here = slice(start, start + chunk.num_images)
            there = slice(first, first + chunk.num_images)
            rows.embeddings[there] = embeddings[here].numpy()
            for column, values in zip(rows.scores, scores, strict=True):
                column[there] = values[here].numpy()
            for position, status, message in chunk.decoding.result():
                rows.faults[first + position] = status, message
            rows.num_done += chunk.num_images
            start += chunk.num_images
        self.free_pixels.append(batch.pixels)

    def _metadata(self, rows: _Rows) -> pa.RecordBatch:
        not_finite = ~np.isfinite(rows.embeddings).all(axis=1)
        for position in np.flatnonzero(not_finite).tolist():
            rows.faults.setdefault(
                position,
                (Status.EMBEDDING_INVALID, "the tower gave an embedding that is not finite"),
            )
        batch = rows.batch
        statuses = batch.column(STATUS).to_pylist()
        messages = batch.column(ERROR_MESSAGE).to_pylist()
        good = np.ones(len(rows.image_rows), bool)
        for position, (status, message) in rows.faults.items():
            good[position] = False
            row = int(rows.image_rows[position])
            statuses[row], messages[row] = status.value, message
        present = np.zeros(batch.num_rows, bool)
        present[rows.image_rows[good]] = True

        results: dict[str, pa.Array] = {
            STATUS: pa.array(statuses, pa.string()),
            ERROR_MESSAGE: pa.array(messages, pa.string()),
        }
        if self.scorer.keep_embeddings:
            column = self.scorer.embedder.image_embedding_column
            results[column] = _embedding_array(rows.embeddings[good], present)
        for classifier, scores in zip(self.scorer.classifiers, rows.scores, strict=True):
            values = np.zeros(batch.num_rows, np.float32)
            values[present] = scores[good]
            results[classifier.pred_column] = pa.array(values, mask=~present)
        schema = metadata_schema(batch.schema, self.scorer.result_fields)
        arrays = [results[name] if name in results else batch.column(name) for name in schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _decode_images(
    images: Sequence[Any], pixels: npt.NDArray[np.uint8], decode: Decode
) -> list[_Fault]:
    """Decode N images into uint8 (N, S, S, 3); tells which could not be."""
    faults: list[_Fault] = []
    for position, image in enumerate(images):
        if image is None:
            faults.append((position, Status.IMAGE_MISSING, "the image is null"))
            continue
        try:
            pixels[position] = decode_image(memoryview(image), pixels.shape[1], decode=decode)
        except OversizedImageError as exc:
            faults.append((position, Status.IMAGE_OVERSIZED, str(exc)))
        except ImageError as exc:
            faults.append((position, Status.IMAGE_UNDECODABLE, str(exc)))
    return faults


def _out_of_memory(exc: RuntimeError) -> bool:
    """Whether the GPU's memory was short; cuBLAS and cuDNN say so in their own words."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(exc)


def _embedding_array(
    embeddings: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]
) -> pa.ListArray:
    """float32 (K, D) and bool (N,) with K True → list array of N, null where not present."""
    lengths = np.where(present, embeddings.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(embeddings.reshape(-1)), mask=pa.array(~present)
    )
