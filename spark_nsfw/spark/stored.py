"""Rows that hold embeddings → the same rows with scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import FloatType, StructField, StructType

from spark_nsfw.errors import InputError
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.stored import score_column
from spark_nsfw.spark.worker import worker_device

__all__ = ["score_embeddings"]


def score_embeddings(
    rows: DataFrame, classifiers: Sequence[ImageClassifier], *, device: str | None = None
) -> DataFrame:
    """Rows with stored embeddings → the same rows with a score column (float) per classifier.

    A row whose embedding is null, not finite, or not of the width that the classifier takes
    has a null score; where it takes several, the commonest of the Arrow batch counts.

    Args:
        rows: with a column (array<float>) of each classifier's ``embedding_column``.
        classifiers: a column of the name of a score is replaced.
        device: a torch device; by default the task's GPU if there is one.

    Raises:
        InputError: there is no such column.
    """
    for column in {classifier.embedding_column for classifier in classifiers}:
        if column not in rows.columns:
            raise InputError(
                f"the dataset has no column {column!r} of embeddings to classify: "
                "embed it first with TimmImageEmbedder"
            )
    scores = {classifier.pred_column: classifier for classifier in classifiers}
    kept = [field for field in rows.schema if field.name not in scores]
    schema = StructType([*kept, *(StructField(name, FloatType()) for name in scores)])

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        chosen = worker_device(device)
        for batch in batches:
            arrays = [batch.column(field.name) for field in kept]
            for classifier in scores.values():
                embeddings = batch.column(classifier.embedding_column)
                arrays += score_column(embeddings, None, [classifier], chosen)[0]
            yield pa.RecordBatch.from_arrays(arrays, names=schema.names)

    return rows.mapInArrow(score, schema)
