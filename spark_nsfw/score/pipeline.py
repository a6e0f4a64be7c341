"""Encoded images → decoded pixels → device batches → metadata rows.

The caller's thread reads; decoding threads fill the pixels of the batches to come;
computing threads take full batches through the models. A device batch forms across Arrow
batches, so neither the size of a shard nor that of an Arrow batch shapes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spark_nsfw.errors import ImageError, OversizedImageError
from spark_nsfw.read.source import Rows
from spark_nsfw.schema import EMBEDDING_NORM, ERROR_MESSAGE, STATUS, Status, metadata_schema
from spark_nsfw.score.arrays import embedding_array, spread
from spark_nsfw.score.forward import ForwardPasses, Results
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.pixels import Transform, decode_once
from spark_nsfw.score.recipe import Recipe

__all__ = ["Pipeline"]

#: Device batches that decode ahead of those that are computed.
_DECODING_AHEAD = 2

#: Images that a decoding thread takes at a time: handing them over costs as much as a row.
_DECODING_CHUNK = 8

#: Decoding threads, at least; on a CPU they share its cores with those that compute.
_DECODING_THREADS = 4

#: Rows that wait, at most, until a device batch is full; hardly any of them has an image then.
_ROWS_WAITING = 16_384


@dataclass
class _Batch:
    """The rows of one Arrow batch on their way through the pipeline.

    Attributes:
        batch: without the images.
        image_rows: the rows that have an image, int64 (M,).
        embeddings, norms: of these images, float32 (M, D) and (M,).
        scores: of each classifier, float32 (M,) or (M, K).
        faults: status and message by position among these images.
    """

    batch: pa.RecordBatch
    image_rows: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float32] | None = None
    norms: npt.NDArray[np.float32] | None = None
    scores: list[npt.NDArray[np.float32] | None] = field(default_factory=list)
    num_done: int = 0
    faults: dict[int, tuple[Status, str]] = field(default_factory=dict)


#: Position of an image in a list, and what is wrong with it.
_Fault = tuple[int, Status, str]


@dataclass
class _Chunk:
    """Images of one Arrow batch that one thread decodes, side by side in a device batch."""

    rows: _Batch
    first_position: int
    num_images: int
    decoding: Future[list[_Fault]]


@dataclass
class _DeviceBatch:
    """Images that go through the models together.

    Attributes:
        pixels: uint8 (B, S, S, 3) for each transform; the first ``num_images`` are used.
    """

    pixels: dict[Transform, torch.Tensor]
    chunks: list[_Chunk] = field(default_factory=list)
    num_images: int = 0
    computing: Future[Results] | None = None


class Pipeline:
    """Decode → device → rows, with bounded queues between; its threads end with its ``with``.

    Args:
        recipe: what the rows get.
        passes: of its models.
    """

    def __init__(self, recipe: Recipe, passes: ForwardPasses) -> None:
        self._recipe = recipe
        self._passes = passes
        self._transforms = recipe.transforms
        self._decoders = _thread_pool(recipe.num_threads or _decoding_threads(passes), "decode")
        self._computers = _thread_pool(passes.num_threads, "compute")
        self._waiting: deque[_Batch] = deque()
        self._num_rows_waiting = 0
        self._filling: _DeviceBatch | None = None
        self._computing: deque[_DeviceBatch] = deque()
        self._free_pixels: list[dict[Transform, torch.Tensor]] = []

    def __enter__(self) -> Pipeline:
        self._passes.load()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in (self._decoders, self._computers):
            pool.shutdown(wait=True, cancel_futures=True)

    def add(self, rows: Rows) -> None:
        """Start on the images of some rows; waits while enough others are under way."""
        batch, images = rows
        ok = pc.equal(batch.column(STATUS), Status.OK.value).to_numpy(zero_copy_only=False)
        image_rows = np.flatnonzero(ok)
        waiting = _Batch(batch, image_rows, scores=[None] * len(self._recipe.classifiers))
        if self._recipe.embedder is not None:
            width = self._recipe.embedder.embedding_size
            waiting.embeddings = np.zeros((len(image_rows), width), np.float32)
            waiting.norms = np.zeros(len(image_rows), np.float32)
        self._waiting.append(waiting)
        self._num_rows_waiting += batch.num_rows
        batch_size = self._passes.batch_size
        position = 0
        while position < len(image_rows):
            device_batch = self._filling = self._filling or _DeviceBatch(self._take_pixels())
            start = device_batch.num_images
            count = min(_DECODING_CHUNK, batch_size - start, len(image_rows) - position)
            chunk = [images[row] for row in image_rows[position : position + count]]
            pixels = {
                transform: images_of_it[start : start + count].numpy()
                for transform, images_of_it in device_batch.pixels.items()
            }
            decoding = self._decoders.submit(_decode_images, chunk, pixels)
            device_batch.chunks.append(_Chunk(waiting, position, count, decoding))
            device_batch.num_images += count
            position += count
            if device_batch.num_images == batch_size:
                self._launch(device_batch)
        if self._filling is not None and self._num_rows_waiting > _ROWS_WAITING:
            self._launch(self._filling)

    def _take_pixels(self) -> dict[Transform, torch.Tensor]:
        if self._free_pixels:
            return self._free_pixels.pop()
        # zeros: the place of an undecodable image is computed like any other and ignored
        return {
            transform: torch.zeros(
                (self._passes.batch_size, transform.size, transform.size, 3),
                dtype=torch.uint8,
                pin_memory=self._passes.on_gpu,
            )
            for transform in self._transforms
        }

    def _launch(self, batch: _DeviceBatch) -> None:
        """Hand a batch to the computing threads, and wait until there is room for another."""
        self._filling = None
        batch.computing = self._computers.submit(self._compute, batch)
        self._computing.append(batch)
        while len(self._computing) > self._passes.num_threads + _DECODING_AHEAD:
            self._finish(self._computing.popleft())

    def flush(self) -> None:
        """Finish everything that was added."""
        if self._filling is not None:
            self._launch(self._filling)
        while self._computing:
            self._finish(self._computing.popleft())

    def finished(self) -> Iterator[pa.RecordBatch]:
        """The metadata batches that are complete, in order."""
        while self._computing and self._computing[0].computing.done():  # type: ignore[union-attr]
            self._finish(self._computing.popleft())
        while self._waiting and self._waiting[0].num_done == len(self._waiting[0].image_rows):
            rows = self._waiting.popleft()
            self._num_rows_waiting -= rows.batch.num_rows
            yield self._metadata(rows)

    def _compute(self, batch: _DeviceBatch) -> Results:
        for chunk in batch.chunks:
            chunk.decoding.result()  # `wait` would never hear that one was cancelled
        return self._passes.score(batch.pixels, batch.num_images)

    def _finish(self, batch: _DeviceBatch) -> None:
        """Give the rows of a batch their results."""
        assert batch.computing is not None
        results = batch.computing.result()
        start = 0
        for chunk in batch.chunks:
            rows, first = chunk.rows, chunk.first_position
            here = slice(start, start + chunk.num_images)
            there = slice(first, first + chunk.num_images)
            num_images = len(rows.image_rows)
            rows.embeddings = _filled(rows.embeddings, num_images, there, results.embeddings, here)
            rows.norms = _filled(rows.norms, num_images, there, results.norms, here)
            rows.scores = [
                _filled(column, num_images, there, values, here)
                for column, values in zip(rows.scores, results.scores, strict=True)
            ]
            for position, status, message in chunk.decoding.result():
                rows.faults[first + position] = status, message
            rows.num_done += chunk.num_images
            start += chunk.num_images
        self._free_pixels.append(batch.pixels)

    def _metadata(self, rows: _Batch) -> pa.RecordBatch:
        self._refuse_not_finite(rows)
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
        kept = set(self._recipe.result_columns)
        if rows.embeddings is not None and self._recipe.embedding_column in kept:
            column = self._recipe.embedding_column
            results[column] = embedding_array(rows.embeddings[good], present)
        if rows.norms is not None and EMBEDDING_NORM in kept:
            results[EMBEDDING_NORM] = spread(pa.array(rows.norms[good]), present)
        for classifier, scores in zip(self._recipe.classifiers, rows.scores, strict=True):
            values = np.zeros(0, np.float32) if scores is None else scores[good]
            columns = classifier.columns(values)
            for name, column_values in zip(classifier.result_columns, columns, strict=True):
                results[name] = spread(column_values, present)
        schema = metadata_schema(batch.schema, self._recipe.result_fields)
        arrays = [results[name] if name in results else batch.column(name) for name in schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _refuse_not_finite(self, rows: _Batch) -> None:
        """Fault the images that a model gave no number for."""
        if rows.embeddings is not None:
            for position in _not_finite(rows.embeddings):
                rows.faults.setdefault(
                    position,
                    (Status.EMBEDDING_INVALID, "the tower gave an embedding that is not finite"),
                )
        for classifier, scores in zip(self._recipe.classifiers, rows.scores, strict=True):
            if isinstance(classifier, PixelClassifier) and scores is not None:
                for position in _not_finite(scores):
                    message = f"{classifier.model_name} gave a score that is not finite"
                    rows.faults.setdefault(position, (Status.SCORE_INVALID, message))


def _not_finite(values: npt.NDArray[np.float32]) -> list[int]:
    """The rows of float32 (N,) or (N, K) with a number that is not finite."""
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    rows: list[int] = np.flatnonzero(~finite).tolist()
    return rows


def _filled(
    column: npt.NDArray[np.float32] | None,
    num_rows: int,
    there: slice,
    values: torch.Tensor | None,
    here: slice,
) -> npt.NDArray[np.float32] | None:
    """A column with some rows of a device batch put in; made when the first come."""
    if values is None:
        return None
    if column is None:
        column = np.zeros((num_rows, *values.shape[1:]), np.float32)
    column[there] = values[here].numpy()
    return column


def _decode_images(
    images: Sequence[Any], pixels: dict[Transform, npt.NDArray[np.uint8]]
) -> list[_Fault]:
    """Decode N images into uint8 (N, S, S, 3) for each transform; tells which could not be."""
    transforms = list(pixels)
    faults: list[_Fault] = []
    for position, image in enumerate(images):
        if image is None:
            faults.append((position, Status.IMAGE_MISSING, "the image is null"))
            continue
        try:
            decoded = decode_once(memoryview(image), transforms)
        except OversizedImageError as exc:
            faults.append((position, Status.IMAGE_OVERSIZED, str(exc)))
        except ImageError as exc:
            faults.append((position, Status.IMAGE_UNDECODABLE, str(exc)))
        else:
            for transform, square in zip(transforms, decoded, strict=True):
                pixels[transform][position] = square
    return faults


def _decoding_threads(passes: ForwardPasses) -> int:
    """The threads that decode where nobody says how many.

    On a GPU, two of the task's cores are for those that read and that launch its kernels.
    """
    cores = torch.get_num_threads()  # a Spark worker has as many as its task
    return max(cores - 2, _DECODING_THREADS) if passes.on_gpu else _DECODING_THREADS


def _thread_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that do not split their work further: there is one for each core already."""
    return ThreadPoolExecutor(num_threads, name, torch.set_num_threads, (1,))
