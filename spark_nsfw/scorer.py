"""Arrow batches of samples in, Arrow batches of metadata out.

The only place that puts decoding, tower and classifiers together. Threads decode
into the pixel buffers of the batches to come while the device computes; a device
batch forms across Arrow batches, so neither the size of a shard nor that of an
Arrow batch shapes it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spark_nsfw.classifiers import ImageClassifier
from spark_nsfw.embedders import TimmImageEmbedder
from spark_nsfw.errors import ImageError, InputError, OversizedImageError
from spark_nsfw.pixels import Decode, decode_image
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    IMAGE,
    STATUS,
    Status,
    metadata_schema,
    result_fields,
)

__all__ = ["Scorer"]

_log = logging.getLogger(__name__)

#: Device batches that decode ahead of the one the device computes.
_DECODING_AHEAD = 2


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
        self.embedder = embedder
        chosen = embedder.classifiers if classifiers is None else classifiers
        self.classifiers = [c.for_embedding_size(embedder.embedding_size) for c in chosen]
        names = [embedder.image_embedding_column, *(c.pred_column for c in self.classifiers)]
        if len(set(names)) < len(names):
            raise InputError(f"two results would go to one column: {', '.join(names)}")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.keep_embeddings = keep_embeddings
        #: Images per forward pass that the device has memory for, as far as is known.
        self.fitting_batch_size = embedder.batch_size

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds."""
        return fields_of(self.embedder, self.classifiers, self.keep_embeddings)

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
        pool = ThreadPoolExecutor(self.embedder.num_threads_per_worker, "decode")
        pipeline = _Pipeline(self, pool)
        try:
            for batch in batches:
                pipeline.add(batch)
                yield from pipeline.finished()
            pipeline.flush()
            yield from pipeline.finished()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def fields_of(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier], keep_embeddings: bool
) -> list[pa.Field]:
    """The columns that this embedder and these classifiers add."""
    column = embedder.image_embedding_column if keep_embeddings else None
    return result_fields(column, [classifier.pred_column for classifier in classifiers])


@dataclass
class _Rows:
    """The rows of one Arrow batch on their way through the pipeline."""

    batch: pa.RecordBatch
    image_rows: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    num_done: int = 0
    faults: dict[int, tuple[Status, str]] = field(default_factory=dict)


@dataclass
class _DeviceBatch:
    """Images that go through the tower together.

    ``slots`` tells where each image's results belong: rows, and position among their images.
    """

    pixels: torch.Tensor
    futures: list[Future[None]] = field(default_factory=list)
    slots: list[tuple[_Rows, int]] = field(default_factory=list)
    embeddings: torch.Tensor | None = None
    scores: list[torch.Tensor] = field(default_factory=list)
    copied: Any = None


class _Pipeline:
    """Decode → device → results, with bounded queues between."""

    def __init__(self, scorer: Scorer, pool: ThreadPoolExecutor) -> None:
        self.scorer = scorer
        self.pool = pool
        self.tower = scorer.embedder.load_embedding_model(scorer.device)
        self.on_gpu = torch.device(scorer.device).type == "cuda"
        self.waiting: deque[_Rows] = deque()
        self.decoding: deque[_DeviceBatch] = deque()
        self.computing: deque[_DeviceBatch] = deque()
        self.free_pixels: list[torch.Tensor] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Start to decode the images of a batch; computes whatever has become ready to."""
        statuses = batch.column(STATUS)
        ok = pc.equal(statuses, Status.OK.value).to_numpy(zero_copy_only=False)
        image_rows = np.flatnonzero(ok)
        width = self.scorer.embedder.embedding_size
        rows = _Rows(
            batch.drop_columns([IMAGE]),
            image_rows,
            np.zeros((len(image_rows), width), np.float32),
            np.zeros((len(self.scorer.classifiers), len(image_rows)), np.float32),
        )
        self.waiting.append(rows)
        images = batch.column(IMAGE)
        for position, row in enumerate(image_rows):
            self._decode(images[row].as_buffer(), rows, position)

    def _decode(self, image: pa.Buffer, rows: _Rows, position: int) -> None:
        if not self.decoding or len(self.decoding[-1].slots) == self.scorer.embedder.batch_size:
            self._advance(_DECODING_AHEAD)
            self.decoding.append(_DeviceBatch(self._take_pixels()))
        batch = self.decoding[-1]
        slot = batch.pixels[len(batch.slots)].numpy()
        decode = self.scorer.embedder.decode
        batch.futures.append(self.pool.submit(_decode_into, slot, memoryview(image), decode))
        batch.slots.append((rows, position))

    def _take_pixels(self) -> torch.Tensor:
        if self.free_pixels:
            return self.free_pixels.pop()
        embedder = self.scorer.embedder
        shape = (embedder.batch_size, embedder.image_size, embedder.image_size, 3)
        # zeros: the slot of an undecodable image is computed like any other and ignored
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self.on_gpu)

    def _advance(self, keep_decoding: int) -> None:
        """Launch the oldest batches until ``keep_decoding`` are left to decode."""
        while len(self.decoding) > keep_decoding:
            self._launch(self.decoding.popleft())
            while len(self.computing) > 1:
                self._finish(self.computing.popleft())

    def flush(self) -> None:
        """Finish everything that was added."""
        self._advance(0)
        while self.computing:
            self._finish(self.computing.popleft())

    def finished(self) -> Iterator[pa.RecordBatch]:
        """The metadata batches that are complete, in order."""
        while self.waiting and self.waiting[0].num_done == len(self.waiting[0].image_rows):
            yield self._metadata(self.waiting.popleft())

    def _launch(self, batch: _DeviceBatch) -> None:
        for future, (rows, position) in zip(batch.futures, batch.slots, strict=True):
            try:
                future.result()
            except OversizedImageError as exc:
                rows.faults[position] = Status.IMAGE_OVERSIZED, str(exc)
            except ImageError as exc:
                rows.faults[position] = Status.IMAGE_UNDECODABLE, str(exc)
        with torch.inference_mode():
            embeddings = self._embed(batch.pixels[: len(batch.slots)])
            batch.embeddings = self._to_host(embeddings)
            batch.scores = [self._to_host(c.score(embeddings)) for c in self.scorer.classifiers]
        if self.on_gpu:
            batch.copied = torch.cuda.Event()
            batch.copied.record(torch.cuda.current_stream(embeddings.device))
        self.computing.append(batch)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) → float32 (N, D) on the device.

        Where the device has no memory for a batch, half of it is tried, and what fitted
        is kept for all batches to come.
        """
        while True:
            try:
                pieces = [
                    self.tower(piece.to(self.scorer.device, non_blocking=True))
                    for piece in pixels.split(self.scorer.fitting_batch_size)
                ]
                return torch.cat(pieces)
            except torch.cuda.OutOfMemoryError:
                if self.scorer.fitting_batch_size == 1:
                    raise
                self.scorer.fitting_batch_size = (self.scorer.fitting_batch_size + 1) // 2
                _log.warning(
                    "%s has no memory for a batch of %d images, going on with %d",
                    self.scorer.device, len(pixels), self.scorer.fitting_batch_size,
                )  # fmt: skip
                torch.cuda.empty_cache()

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU that, from a GPU, is complete only once the batch's event is."""
        if not self.on_gpu:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _finish(self, batch: _DeviceBatch) -> None:
        if batch.copied is not None:
            batch.copied.synchronize()
        assert batch.embeddings is not None
        embeddings = batch.embeddings.numpy()
        scores = [column.numpy() for column in batch.scores]
        start = 0
        while start < len(batch.slots):
            rows, position = batch.slots[start]
            count = min(len(rows.image_rows) - position, len(batch.slots) - start)
            here, there = slice(start, start + count), slice(position, position + count)
            rows.embeddings[there] = embeddings[here]
            for column, values in zip(rows.scores, scores, strict=True):
                column[there] = values[here]
            rows.num_done += count
            start += count
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


def _decode_into(slot: npt.NDArray[np.uint8], image: memoryview, decode: Decode) -> None:
    slot[:] = decode_image(image, slot.shape[0], decode=decode)


def _embedding_array(
    embeddings: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]
) -> pa.ListArray:
    """float32 (K, D) and bool (N,) with K True → list array of N, null where not present."""
    lengths = np.where(present, embeddings.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(embeddings.reshape(-1)), mask=pa.array(~present)
    )
