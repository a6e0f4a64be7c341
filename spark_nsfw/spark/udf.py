"""The scorer inside Spark: a pandas UDF for image columns, and the two plans built on it.

Both plans are the same generators. The DataFrame plan passes image bytes through
Spark between reader and scorer; the fused plan reads and scores in one Python worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.functions import pandas_udf  # type: ignore[attr-defined]
from pyspark.sql.types import FloatType, StructField, StructType

from spark_nsfw.read.embeddings import score_column
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import SampleOptions, iter_sample_rows
from spark_nsfw.schema import ERROR_MESSAGE, IMAGE, STATUS, Status, metadata_schema
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.reader import iter_shards
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.workers import scorer_identity, worker_device, worker_scorer

__all__ = ["nsfw_udf", "score_embeddings", "score_samples", "score_shards"]


def settled(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier] | None
) -> list[ImageClassifier]:
    """The classifiers for this embedder, every weight file found and its sha256 known.

    What does not fit is refused here, on the driver, before any task starts; the workers
    check their own copies of the files against the sha256.
    """
    embedder.ready()
    chosen = embedder.classifiers if classifiers is None else classifiers
    return [classifier.for_embedding_size(embedder.embedding_size) for classifier in chosen]


def nsfw_udf(
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier] | None = None,
    *,
    device: str | None = None,
    keep_embeddings: bool = True,
) -> Any:
    """A scalar-iterator pandas UDF: encoded image (binary) → struct.

    The struct has ``status``, ``error_message``, the embedding column (array<float>) and
    one column (float) per classifier. The model is loaded once per Python worker and
    kept between tasks, which needs ``spark.python.worker.reuse`` (Spark's default).

    Spark hands over ``spark.sql.execution.arrow.maxRecordsPerBatch`` images at a time,
    by default 10,000: set it to a few hundred.

    Args:
        embedder: the CLIP tower.
        classifiers: applied to its embeddings; None takes the embedder's own.
        device: a torch device; by default the task's GPU if there is one.
        keep_embeddings: whether the struct has the embedding.
    """
    embedder = embedder.ready()
    chosen = settled(embedder, classifiers)
    fields = [
        pa.field(STATUS, pa.string()),
        pa.field(ERROR_MESSAGE, pa.string()),
        *Recipe(embedder, tuple(chosen), keep_embeddings=keep_embeddings).result_fields,
    ]

    identity = scorer_identity(embedder, chosen, keep_embeddings)

    @pandas_udf(spark_schema(fields))
    def score(images: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        scorer = worker_scorer(embedder, chosen, device, keep_embeddings, identity)
        batches = ((_all_ok(len(series)), series.tolist()) for series in images)
        for batch in scorer.score_rows(batches):
            yield pd.DataFrame({field.name: _series(batch.column(field.name)) for field in fields})

    return score


def _all_ok(num_rows: int) -> pa.RecordBatch:
    """What is known of images before they are scored."""
    columns = [pa.array([Status.OK.value] * num_rows), pa.nulls(num_rows, pa.string())]
    return pa.RecordBatch.from_arrays(columns, names=[STATUS, ERROR_MESSAGE])


def _series(array: pa.Array) -> pd.Series:
    """Arrow → pandas, lists as numpy arrays and null scores as missing, never as NaN."""
    return pd.Series(array.to_numpy(zero_copy_only=False), dtype=object)


def score_samples(
    samples: DataFrame,
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier] | None = None,
    *,
    device: str | None = None,
    keep_embeddings: bool = True,
) -> DataFrame:
    """DataFrame plan: rows with image bytes → metadata rows, by `nsfw_udf`.

    Args:
        samples: from `read_webdataset`, or any DataFrame with a binary column ``image``.
        embedder, classifiers, device, keep_embeddings: as for `nsfw_udf`.

    Returns:
        The columns of ``samples`` without ``image``, then the results.
    """
    chosen = embedder.classifiers if classifiers is None else tuple(classifiers)
    udf = nsfw_udf(embedder, chosen, device=device, keep_embeddings=keep_embeddings)
    results = [
        field.name
        for field in Recipe(embedder, tuple(chosen), keep_embeddings=keep_embeddings).result_fields
    ]
    scored = samples.withColumn("_scored", udf(F.col(IMAGE)))
    own = [name for name in samples.columns if name not in (IMAGE, STATUS, ERROR_MESSAGE, *results)]
    status, message = F.col(f"_scored.{STATUS}"), F.col(f"_scored.{ERROR_MESSAGE}")
    if STATUS in samples.columns:  # what the reader found comes first
        unread = F.col(STATUS) != Status.OK.value
        status = F.when(unread, F.col(STATUS)).otherwise(status)
        message = F.when(unread, F.col(ERROR_MESSAGE)).otherwise(
            F.coalesce(message, F.col(ERROR_MESSAGE))
        )
    return scored.select(
        *(F.col(f"`{name}`") for name in own),
        status.alias(STATUS),
        message.alias(ERROR_MESSAGE),
        *(F.col(f"_scored.`{name}`").alias(name) for name in results),
    )


def score_shards(
    paths: DataFrame,
    inputs: ShardInputs,
    options: SampleOptions,
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier] | None = None,
    *,
    device: str | None = None,
    keep_embeddings: bool = True,
) -> DataFrame:
    """Fused plan: paths of shards → metadata rows, in one Python worker.

    No image byte leaves the worker, and no binary column keeps RAPIDS off the GPU.

    Args:
        paths: one row per shard, column ``path``.
        inputs: names the shards.
        options: how shards become rows.
        embedder, classifiers, device, keep_embeddings: as for `nsfw_udf`.
    """
    embedder = embedder.ready()
    chosen = settled(embedder, classifiers)
    schema = metadata_schema(
        options.schema,
        Recipe(embedder, tuple(chosen), keep_embeddings=keep_embeddings).result_fields,
    )
    identity = scorer_identity(embedder, chosen, keep_embeddings)

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = worker_scorer(embedder, chosen, device, keep_embeddings, identity)
        return scorer.score_rows(iter_sample_rows(iter_shards(batches, inputs), options))

    return paths.mapInArrow(score, spark_schema(schema))


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
    """
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
