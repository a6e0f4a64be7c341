"""UDFs that score a column of encoded images, for any DataFrame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.functions import pandas_udf  # type: ignore[attr-defined]

from spark_nsfw.schema import ERROR_MESSAGE, IMAGE, STATUS, Status
from spark_nsfw.score.detector import Detector
from spark_nsfw.score.embedder import ImageEmbedder
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.types import quoted, spark_schema
from spark_nsfw.spark.worker import recipe_identity, worker_scorer
from spark_nsfw.storage import settings, use_settings

__all__ = ["nsfw_udf", "score_column", "score_samples"]

#: Of pyspark 4.1 and later.
arrow_udf = getattr(F, "arrow_udf", None)


def nsfw_udf(
    embedder: ImageEmbedder | None,
    classifiers: Sequence[Detector[Any]] | None = None,
    *,
    device: str | None = None,
    keep_embeddings: bool = True,
) -> Any:
    """A scalar-iterator pandas UDF: encoded image (binary) → struct.

    The struct has ``status``, ``error_message``, the embedding column (array<float>),
    ``embedding_norm`` (float) and the columns of each classifier. The models are loaded once
    per Python worker and kept between tasks, which needs ``spark.python.worker.reuse``
    (Spark's default).

    Spark hands over ``spark.sql.execution.arrow.maxRecordsPerBatch`` images at a time,
    by default 10,000: set it to a few hundred.

    Args:
        embedder: the CLIP tower; None where all classifiers look at pixels.
        classifiers: applied to its embeddings, or to the pixels; None takes the embedder's
            own.
        device: a torch device; by default the task's GPU if there is one.
        keep_embeddings: whether the struct has the embedding and its norm.
    """
    recipe = Recipe.of(
        embedder, classifiers, device=device, keep_embeddings=keep_embeddings
    ).ready()
    return _pandas_udf(recipe, recipe_identity(recipe))


def score_samples(
    samples: DataFrame,
    embedder: ImageEmbedder | None,
    classifiers: Sequence[Detector[Any]] | None = None,
    *,
    device: str | None = None,
    keep_embeddings: bool = True,
) -> DataFrame:
    """Rows with image bytes → metadata rows, as `nsfw_udf` scores them.

    Args:
        samples: from `read_webdataset`, or any DataFrame with a binary column ``image``.
        embedder, classifiers, device, keep_embeddings: as for `nsfw_udf`.

    Returns:
        The columns of ``samples`` without ``image``, then the results.
    """
    recipe = Recipe.of(
        embedder, classifiers, device=device, keep_embeddings=keep_embeddings
    ).ready()
    return score_column(samples, recipe, recipe_identity(recipe))


def score_column(
    samples: DataFrame, recipe: Recipe, identity: str, counts: Any = None
) -> DataFrame:
    """As `score_samples`, by a recipe that is ready, and without pandas where Spark has a way.

    Args:
        samples: as for `score_samples`.
        recipe, identity: what is computed, and its `recipe_identity`.
        counts: an accumulator of `spark_nsfw.spark.units.StatusCounts`, for the rows that
            have an image.
    """
    results = recipe.result_columns
    version = tuple(
        map(int, samples.sparkSession.version.split(".")[:2])
    )  # Connect's server has one
    make = _pandas_udf if arrow_udf is None or version < (4, 1) else _arrow_udf
    scored = samples.withColumn("_scored", make(recipe, identity, counts)(F.col(IMAGE)))
    replaced = {name.casefold() for name in (IMAGE, STATUS, ERROR_MESSAGE, *results)}
    own = [name for name in samples.columns if name.casefold() not in replaced]
    status, message = F.col(f"_scored.{STATUS}"), F.col(f"_scored.{ERROR_MESSAGE}")
    if STATUS in samples.columns:  # what the reader found comes first
        unread = F.col(STATUS) != Status.OK.value
        status = F.when(unread, F.col(STATUS)).otherwise(status)
        message = F.when(unread, F.col(ERROR_MESSAGE)).otherwise(
            F.coalesce(message, F.col(ERROR_MESSAGE))
        )
    return scored.select(
        *(F.col(quoted(name)) for name in own),
        status.alias(STATUS),
        message.alias(ERROR_MESSAGE),
        *(F.col(f"_scored.{quoted(name)}").alias(name) for name in results),
    )


def _pandas_udf(recipe: Recipe, identity: str, counts: Any = None) -> Any:
    adopted = settings()

    @pandas_udf(spark_schema(_fields(recipe)))
    def score(images: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        use_settings(adopted)
        for batch in _scored((series.tolist() for series in images), recipe, identity, counts):
            yield pd.DataFrame({name: _series(batch.column(name)) for name in batch.schema.names})

    # Else Spark evaluates it twice where a filter stands on its result.
    return score.asNondeterministic()


def _arrow_udf(recipe: Recipe, identity: str, counts: Any = None) -> Any:
    assert arrow_udf is not None
    adopted = settings()

    @arrow_udf(spark_schema(_fields(recipe)))
    def score(images: Iterator[pa.Array]) -> Iterator[pa.Array]:
        use_settings(adopted)
        buffers = ([image.as_buffer() for image in array] for array in images)
        for batch in _scored(buffers, recipe, identity, counts):
            yield batch.to_struct_array()

    return score.asNondeterministic()


def _fields(recipe: Recipe) -> list[pa.Field]:
    own = [pa.field(STATUS, pa.string()), pa.field(ERROR_MESSAGE, pa.string())]
    return own + recipe.result_fields


def _scored(
    images: Iterator[list[Any]], recipe: Recipe, identity: str, counts: Any
) -> Iterator[pa.RecordBatch]:
    """Lists of encoded images, None where there is none → the columns of `_fields`."""
    scorer = worker_scorer(recipe, identity)
    names = [field.name for field in _fields(recipe)]
    num_null: list[int] = []

    def rows() -> Iterator[tuple[pa.RecordBatch, list[Any]]]:
        for some in images:
            num_null.append(sum(image is None for image in some))
            yield _all_ok(len(some)), some

    for batch in scorer.score_rows(rows()):
        if counts is not None:
            by_status = Counter(batch.column(STATUS).to_pylist())
            by_status[Status.IMAGE_MISSING.value] -= num_null.pop(0)
            counts.add(by_status)
        yield batch.select(names)


def _all_ok(num_rows: int) -> pa.RecordBatch:
    """What is known of images before they are scored."""
    columns = [pa.array([Status.OK.value] * num_rows), pa.nulls(num_rows, pa.string())]
    return pa.RecordBatch.from_arrays(columns, names=[STATUS, ERROR_MESSAGE])


def _series(array: pa.Array) -> pd.Series:
    """Arrow → pandas, lists as numpy arrays and null scores as missing, never as NaN."""
    return pd.Series(array.to_numpy(zero_copy_only=False), dtype=object)
