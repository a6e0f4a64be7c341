"""Arrow batches of samples in, Arrow batches of metadata out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

from spark_nsfw.errors import InputError
from spark_nsfw.read.source import Rows
from spark_nsfw.schema import IMAGE
from spark_nsfw.score.detector import Detector
from spark_nsfw.score.embedder import ImageEmbedder
from spark_nsfw.score.forward import ForwardPasses
from spark_nsfw.score.pipeline import Pipeline
from spark_nsfw.score.recipe import Recipe

__all__ = ["Scorer"]


class Scorer:
    """Embeds and scores samples, in order, one metadata row for each.

    Args:
        embedder: the CLIP tower; None where all classifiers look at pixels.
        classifiers: applied to its embeddings, or to the pixels; None takes the embedder's
            own.
        device: a torch device; by default the GPU if there is one.
        keep_embeddings: whether the metadata has the embeddings and their norms.

    Raises:
        EmbeddingWidthError: a classifier takes embeddings of another width.
        InputError: two results would go to one column, or nothing looks at images.
    """

    def __init__(
        self,
        embedder: ImageEmbedder | None,
        classifiers: Sequence[Detector[Any]] | None = None,
        device: str | None = None,
        keep_embeddings: bool = True,
    ) -> None:
        self._prepare(
            Recipe.of(embedder, classifiers, device=device, keep_embeddings=keep_embeddings)
        )

    def _prepare(self, recipe: Recipe) -> None:
        device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
        recipe = replace(recipe, device=device)
        if not recipe.reads_images:
            raise InputError("the recipe has no embedder: StoredScorer scores stored embeddings")
        #: What is computed.
        self.recipe = recipe.with_ready_classifiers()
        #: What computes it.
        self.passes = ForwardPasses(self.recipe, device)

    @classmethod
    def of(cls, recipe: Recipe, device: str | None = None) -> Scorer:
        """The scorer of a recipe.

        Args:
            recipe: about images.
            device: a torch device; None takes the recipe's, else the GPU if there is one.

        Raises:
            InputError: it is not about images.
            EmbeddingWidthError: a classifier takes embeddings of another width.
        """
        scorer = cls.__new__(cls)
        scorer._prepare(recipe if device is None else replace(recipe, device=device))
        return scorer

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that scoring adds."""
        return self.recipe.result_fields

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
        with Pipeline(self.recipe, self.passes) as pipeline:
            for some in rows:
                pipeline.add(some)
                yield from pipeline.finished()
            pipeline.flush()
            yield from pipeline.finished()
