"""Stored embeddings → scores, no image read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spark_nsfw.errors import EmbeddingWidthError
from spark_nsfw.read.source import Rows
from spark_nsfw.schema import ERROR_MESSAGE, STATUS, Status, metadata_schema
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.recipe import Recipe

__all__ = ["StoredScorer", "embedding_matrix", "score_column"]


class StoredScorer:
    """Scores rows that hold embeddings, in order, one metadata row for each.

    Args:
        recipe: ready, without an embedder.
        device: a torch device.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        assert recipe.embedding_size is not None
        self.recipe = recipe
        self.width = recipe.embedding_size
        self.device = device

    def score_rows(self, rows: Iterable[Rows]) -> Iterator[pa.RecordBatch]:
        """Score rows by their embeddings.

        Args:
            rows: pairs of a batch with the columns ``status`` and ``error_message``, and any
                others, and a list array (N,) of its embeddings, of any float type.

        Returns:
            For every batch, in order, one with `spark_nsfw.schema.metadata_schema`. A row
            whose embedding cannot be used has no score, and status ``embedding_invalid``
            if its status was ``ok``.
        """
        recipe = self.recipe
        for batch, embeddings in rows:
            results, usable = score_column(embeddings, self.width, recipe.classifiers, self.device)
            if recipe.keep_embeddings:
                kept = embeddings.cast(pa.list_(pa.float32()))
                results.insert(0, pc.if_else(pa.array(usable), kept, None))
            schema = metadata_schema(batch.schema, recipe.result_fields)
            arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
            arrays |= dict(zip(recipe.result_columns, results, strict=True))
            bad = pc.and_(pa.array(~usable), pc.equal(arrays[STATUS], Status.OK.value))
            if pc.any(bad).as_py():
                lengths = pc.list_value_length(embeddings).to_pylist()
                reasons = [
                    self._reason(length) if is_bad else None
                    for length, is_bad in zip(lengths, bad.to_pylist(), strict=True)
                ]
                arrays[STATUS] = pc.if_else(bad, Status.EMBEDDING_INVALID.value, arrays[STATUS])
                arrays[ERROR_MESSAGE] = pc.coalesce(
                    pa.array(reasons, pa.string()), arrays[ERROR_MESSAGE]
                )
            yield pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def _reason(self, length: int | None) -> str:
        if length is None:
            return "no embedding is stored"
        if length != self.width:
            return f"the stored embedding has width {length}, the first one has {self.width}"
        return "the stored embedding is not finite"


def embedding_matrix(column: pa.Array, width: int) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """The rows of a list column that are embeddings: of the given width, and finite.

    Args:
        column: N lists of any float type; float32 is not copied.
        width: D.

    Returns:
        float32 (K, D), the usable rows in order; bool (N,), which these are.
    """
    lengths = pc.fill_null(pc.list_value_length(column), -1)
    usable: npt.NDArray[np.bool_] = lengths.to_numpy(zero_copy_only=False) == width
    if not usable.all():
        column = column.filter(pa.array(usable))
    values = column.flatten()
    if values.null_count:
        values = pc.fill_null(values, float("nan"))
    matrix = torch.utils.dlpack.from_dlpack(values).to(torch.float32).reshape(-1, width)
    # A sum is a cheap look at every value: it is finite only where all of them are.
    if not torch.isfinite(matrix.sum(dim=1)).all():
        finite = torch.isfinite(matrix).all(dim=1)
        usable[np.flatnonzero(usable)[~finite.numpy()]] = False
        matrix = matrix[finite]
    return matrix, usable


def score_column(
    column: pa.Array, width: int | None, classifiers: Sequence[ImageClassifier], device: str
) -> tuple[list[pa.Array], npt.NDArray[np.bool_]]:
    """Score a list column of embeddings as the pipeline scores fresh ones.

    Args:
        column: N lists of any float type.
        width: of an embedding; None takes the classifiers' own, else the commonest that
            they take.
        classifiers: each gives one column.
        device: a torch device.

    Returns:
        A float32 array (N,) per classifier, null where a row is no embedding;
        bool (N,), where it is one.

    Raises:
        EmbeddingWidthError: a classifier takes none of several embeddings.
    """
    if width is None:
        width = _common_width(column, classifiers)
    matrix, usable = embedding_matrix(column, width)
    embeddings = matrix.to(device)
    arrays = []
    for classifier in classifiers:
        scores = np.zeros(len(column), np.float32)
        if len(matrix):
            with torch.inference_mode():
                scores[usable] = classifier.score(embeddings).cpu().numpy()
        arrays.append(pa.array(scores, mask=~usable))
    return arrays, usable


def _common_width(column: pa.Array, classifiers: Sequence[ImageClassifier]) -> int:
    """The commonest width of a list column's rows that the classifiers take.

    Raises:
        EmbeddingWidthError: they take none. A single row is merely no embedding, since the
            last batch of a partition may have no other.
    """
    lengths = pc.drop_null(pc.list_value_length(column)).to_pylist()
    widths = Counter(length for length in lengths if length).most_common()
    refusal = None
    for width, _ in widths:
        try:
            for classifier in classifiers:
                classifier.for_embedding_size(width)
            return int(width)
        except EmbeddingWidthError as exc:
            refusal = refusal or exc
    if refusal is not None and sum(count for _, count in widths) > 1:
        raise refusal
    return int(max(lengths, default=0)) + 1  # which no row has
