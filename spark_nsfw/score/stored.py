"""Stored embeddings → scores and metadata rows, no image read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.read.source import Rows
from spark_nsfw.schema import EMBEDDING_NORM, ERROR_MESSAGE, STATUS, Status, metadata_schema
from spark_nsfw.score.arrays import spread
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.recipe import Recipe

__all__ = ["StoredScorer", "embedding_matrix", "refuse_missing_norms", "score_column"]

_EMBEDDING = pa.list_(pa.float32())


class StoredScorer:
    """Scores stored embeddings, in order, one metadata row for each.

    Args:
        recipe: without an embedder, and ready, so that it knows the embeddings' width.
        device: a torch device; None takes the recipe's, else the GPU if there is one.

    Raises:
        InputError: the recipe does not know the width, or has an embedder.
        EmbeddingWidthError: a classifier takes embeddings of another width.
    """

    def __init__(self, recipe: Recipe, device: str | None = None) -> None:
        if recipe.reads_images:
            raise InputError("the recipe is about images: Scorer takes it")
        if recipe.embedding_size is None:
            raise InputError(
                "how wide the stored embeddings are is not known: recipe.ready(embedding_size=…)"
            )
        gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
        self.recipe = recipe
        self.width = recipe.embedding_size
        self.device = device or recipe.device or gpu_or_cpu
        self.classifiers = [each.for_embedding_size(self.width) for each in recipe.heads]

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds."""
        return self.recipe.result_fields

    def score_rows(self, rows: Iterable[Rows]) -> Iterator[pa.RecordBatch]:
        """Score rows by the embeddings that come with them.

        Args:
            rows: pairs of a batch with the columns ``status`` and ``error_message``, and
                the rows' embeddings: a list array (N,) of any float type, or None where
                no row has one. The batch has a column ``embedding_norm``, too, where a
                classifier ``takes_projection``.

        Returns:
            For every batch, in order, one with `spark_nsfw.schema.metadata_schema`. A row
            whose status was ``ok`` and whose embedding cannot be used gets
            ``embedding_invalid`` and says why. Embeddings and scores are null where the
            status is not ``ok``.
        """
        for batch, embeddings in rows:
            yield self._metadata(batch, _as_lists(embeddings, batch.num_rows))

    def _metadata(self, batch: pa.RecordBatch, embeddings: pa.Array) -> pa.RecordBatch:
        ok = pc.equal(batch.column(STATUS), Status.OK.value)
        candidates = _only(ok, embeddings)
        norms = None
        if EMBEDDING_NORM in batch.schema.names:
            norms = batch.column(EMBEDDING_NORM)
        columns, usable = score_column(candidates, self.width, self.classifiers, self.device, norms)
        results = dict(zip(self.recipe.score_columns, columns, strict=True))
        if self.recipe.keep_embeddings:
            kept = _only(pa.array(usable), candidates.cast(_EMBEDDING))
            results[self.recipe.embedding_column] = kept
        results[STATUS], results[ERROR_MESSAGE] = batch.column(STATUS), batch.column(ERROR_MESSAGE)
        invalid = pc.and_(ok, pa.array(~usable))
        if pc.any(invalid).as_py():
            finite = embedding_matrix(embeddings, self.width)[1]
            lengths = pc.list_value_length(embeddings).to_pylist()
            reasons = [
                _reason(length, self.width, is_finite) if is_invalid else None
                for length, is_finite, is_invalid in zip(
                    lengths, finite, invalid.to_pylist(), strict=True
                )
            ]
            results[STATUS] = pc.if_else(invalid, Status.EMBEDDING_INVALID.value, results[STATUS])
            results[ERROR_MESSAGE] = pc.coalesce(
                pa.array(reasons, pa.string()), results[ERROR_MESSAGE]
            )
        schema = metadata_schema(batch.schema, self.recipe.result_fields)
        arrays = [results[name] if name in results else batch.column(name) for name in schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _as_lists(embeddings: Any, num_rows: int) -> pa.Array:
    """None, and an array of nulls without a type, are lists that are all null."""
    if embeddings is None or pa.types.is_null(embeddings.type):
        return pa.nulls(num_rows, _EMBEDDING)
    return embeddings


def _only(mask: pa.Array, embeddings: pa.Array) -> pa.Array:
    """Embeddings, null where the mask is not true; not copied where it is true throughout."""
    return embeddings if pc.all(mask).as_py() else pc.if_else(mask, embeddings, None)


def _reason(length: int | None, width: int, is_finite: bool) -> str:
    if length is None:
        return "no embedding is stored"
    if length != width:
        return f"the stored embedding has width {length}, the first one has {width}"
    if not is_finite:
        return "the stored embedding is not finite"
    return f"no {EMBEDDING_NORM} above 0 is stored, which a classifier needs"


def refuse_missing_norms(
    classifiers: Iterable[ImageClassifier], columns: Collection[str], place: str
) -> None:
    """Refuse classifiers of projections where only embeddings are stored.

    Args:
        classifiers: those that are to score them.
        columns: the names of the columns beside the embeddings.
        place: what errors call it.

    Raises:
        InputError: names the classifier, the column and what can be done.
    """
    for classifier in classifiers:
        if classifier.takes_projection and EMBEDDING_NORM not in columns:
            raise InputError(
                f"{type(classifier).__name__} scores CLIP's projections, and {place} has no column "
                f"{EMBEDDING_NORM!r} from which to restore them: embed the images anew with "
                "`spark-nsfw score`, which writes it, or leave this classifier out"
            )


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
    column: pa.Array,
    width: int | None,
    classifiers: Sequence[ImageClassifier],
    device: str,
    norms: pa.Array | None = None,
) -> tuple[list[pa.Array], npt.NDArray[np.bool_]]:
    """Score a list column of embeddings as the pipeline scores fresh ones.

    Args:
        column: N lists of any float type.
        width: of an embedding; None takes the classifiers' own, else the commonest that
            they take.
        classifiers: each gives its columns.
        device: a torch device.
        norms: N numbers, the lengths of the projections that were normalised; needed where
            a classifier ``takes_projection``, and each row must have one then.

    Returns:
        An array (N,) per result column, null where a row is no embedding;
        bool (N,), where it is one.

    Raises:
        EmbeddingWidthError: a classifier takes none of several embeddings.
        InputError: there are no norms, and a classifier needs them.
    """
    if width is None:
        width = _common_width(column, classifiers)
    matrix, usable = embedding_matrix(column, width)
    lengths = None
    if any(classifier.takes_projection for classifier in classifiers):
        if norms is None:
            raise InputError(f"classifiers need a column {EMBEDDING_NORM!r}, and there is none")
        all_lengths = pc.fill_null(norms.cast(pa.float32()), 0).to_numpy(zero_copy_only=False)
        has_length = np.isfinite(all_lengths) & (all_lengths > 0)
        matrix = matrix[torch.from_numpy(has_length[usable])]
        usable &= has_length
        lengths = torch.from_numpy(all_lengths[usable]).to(device)
    embeddings = matrix.to(device)
    arrays = []
    for classifier in classifiers:
        values = np.zeros(0, np.float32)
        if len(matrix):
            with torch.inference_mode():
                values = classifier.score(embeddings, lengths).cpu().numpy()
        arrays += [spread(result, usable) for result in classifier.columns(values)]
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
