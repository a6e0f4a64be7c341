"""Units → metadata rows: the two plans, compositions of the same generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from spark_nsfw.read.source import Source, Unit
from spark_nsfw.schema import metadata_schema
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.stores import on_workers
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.udf import score_column
from spark_nsfw.spark.units import (
    count_rows,
    iter_unit_rows,
    sample_rows,
    unit_numbers,
    units_of,
)
from spark_nsfw.spark.worker import recipe_identity, worker_scorer

__all__ = ["PLANS", "Plan", "metadata_rows"]

Plan = Literal["dataframe", "fused"]
PLANS: tuple[Plan, ...] = get_args(Plan)


def metadata_rows(
    spark: SparkSession,
    units: Sequence[Unit],
    source: Source,
    recipe: Recipe,
    schema: pa.Schema,
    plan: Plan = "fused",
    *,
    num_tasks: int | None = None,
    counts: Any = None,
) -> DataFrame:
    """Score units: one metadata row for each of their rows.

    Args:
        spark: classic or Connect.
        units: of the source.
        source: reads them.
        recipe: ready; what is computed.
        schema: of the source's rows.
        plan: ``fused`` reads and scores in one Python worker: no image byte leaves it, and no
            binary column keeps RAPIDS off the GPU. ``dataframe`` passes the encoded images
            through Spark, as a user's own DataFrame would. The rows are the same. Stored
            embeddings are always scored where they are read.
        num_tasks: that the units are sliced into.
        counts: an accumulator of `StatusCounts`; None counts nothing.
    """
    identity = recipe_identity(recipe)
    if plan == "dataframe" and recipe.reads_images:
        samples = sample_rows(spark, units, source, schema, num_tasks=num_tasks, counts=counts)
        return score_column(samples, recipe, identity, counts)

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = worker_scorer(recipe, identity)
        for batch in scorer.score_rows(iter_unit_rows(units_of(batches, units), source, schema)):
            count_rows(batch, counts)
            yield batch

    return unit_numbers(spark, units, num_tasks).mapInArrow(
        on_workers(score), spark_schema(metadata_schema(schema, recipe.result_fields))
    )
