"""Rows that hold embeddings → the same rows with scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import StructType

from spark_nsfw.errors import InputError
from spark_nsfw.schema import EMBEDDING_NORM
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.stored import refuse_missing_norms, score_column
from spark_nsfw.spark.stores import on_workers
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.worker import worker_device

__all__ = ["score_embeddings"]


def score_embeddings(
    rows: DataFrame, classifiers: Sequence[ImageClassifier], *, device: str | None = None
) -> DataFrame:
    """Rows with stored embeddings → the same rows with the columns of each classifier.

    A row whose embedding is null, not finite, or not of the width that the classifier takes
    has a null score; where it takes several, the commonest of the Arrow batch counts.

    Args:
        rows: with a column (array<float>) of each classifier's ``embedding_column``, and
            ``embedding_norm`` where one ``takes_projection``.
        classifiers: a column of the name of a result is replaced.
        device: a torch device; by default the task's GPU if there is one.

    Raises:
        InputError: there is no such column, or two results would go to one.
    """
    for column in {classifier.embedding_column for classifier in classifiers}:
        if column not in rows.columns:
            raise InputError(
                f"the dataset has no column {column!r} of embeddings to classify: "
                "embed it first with TimmImageEmbedder"
            )
    refuse_missing_norms(classifiers, rows.columns, "the dataset")
    chosen = list({tuple(each.result_columns): each for each in classifiers}.values())
    results = pa.schema([field for each in chosen for field in each.result_fields])
    if len(set(results.names)) < len(results):
        raise InputError(f"two results would go to one column: {', '.join(results.names)}")
    kept = [field for field in rows.schema if field.name not in results.names]
    schema = StructType([*kept, *spark_schema(results)])

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        on = worker_device(device)
        for batch in batches:
            arrays = [batch.column(field.name) for field in kept]
            for each in chosen:
                embeddings = batch.column(each.embedding_column)
                norms = batch.column(EMBEDDING_NORM) if each.takes_projection else None
                arrays += score_column(embeddings, None, [each], on, norms)[0]
            yield pa.RecordBatch.from_arrays(arrays, names=schema.names)

    return rows.mapInArrow(on_workers(score), schema)
