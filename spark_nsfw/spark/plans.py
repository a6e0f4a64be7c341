"""Units → metadata rows: the two plans, compositions of the same generators.

Both begin with a range of numbers, one for each unit, that Spark slices without a shuffle:
a unit goes to one task, the same one however often a stage is tried.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.accumulators import AccumulatorParam
from pyspark.sql import DataFrame, SparkSession

from spark_nsfw.read.source import Rows, Source, Unit
from spark_nsfw.schema import IMAGE, STATUS, Status, metadata_schema
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.cluster import reader_workers
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.udf import score_column
from spark_nsfw.spark.worker import recipe_identity, worker_scorer

__all__ = ["PLANS", "Plan", "StatusCounts", "iter_unit_rows", "metadata_rows", "sample_rows"]

Plan = Literal["dataframe", "fused"]
PLANS: tuple[Plan, ...] = get_args(Plan)

#: Tasks where nobody says how many.
_MAX_TASKS = 1024

_log = logging.getLogger(__name__)


class StatusCounts(AccumulatorParam[Counter[str]]):
    """Rows by status, summed up over tasks that succeeded."""

    def zero(self, value: Counter[str]) -> Counter[str]:
        """No rows."""
        return Counter()

    def addInPlace(self, value1: Counter[str], value2: Counter[str]) -> Counter[str]:  # noqa: N802
        """The sum of both, in the first."""
        value1.update(value2)
        return value1


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
    result = spark_schema(metadata_schema(schema, recipe.result_fields))
    if plan == "dataframe" and recipe.embedder is not None:
        samples = sample_rows(spark, units, source, schema, num_tasks=num_tasks, counts=counts)
        return score_column(samples, recipe, identity, counts).select(result.names)

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = worker_scorer(recipe, identity)
        for batch in scorer.score_rows(iter_unit_rows(_units_of(batches, units), source, schema)):
            count(batch, counts)
            yield batch

    return _numbers(spark, units, num_tasks).mapInArrow(score, result)


def sample_rows(
    spark: SparkSession,
    units: Sequence[Unit],
    source: Source,
    schema: pa.Schema,
    *,
    images: bool = True,
    num_tasks: int | None = None,
    counts: Any = None,
) -> DataFrame:
    """Read units: the source's rows, with each row's encoded image in the column ``image``.

    Args:
        spark, units, source, schema, num_tasks: as for `metadata_rows`.
        images: whether there is a column ``image``.
        counts: as for `metadata_rows`; of the rows that need no scoring.
    """
    columns = schema.append(pa.field(IMAGE, pa.binary())) if images else schema

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch, contents in iter_unit_rows(_units_of(batches, units), source, schema):
            count(batch, counts, lambda status: status != Status.OK.value)
            arrays = [*batch.columns, *([pa.array(contents, pa.binary())] if images else [])]
            yield pa.RecordBatch.from_arrays(arrays, schema=columns)

    with reader_workers(spark):
        return _numbers(spark, units, num_tasks).mapInArrow(read, spark_schema(columns))


def count(
    batch: pa.RecordBatch, counts: Any, counted: Callable[[str], bool] = lambda status: True
) -> None:
    """Add a batch's rows to an accumulator of `StatusCounts`."""
    if counts is not None:
        by_status = pc.value_counts(batch.column(STATUS)).to_pylist()
        counts.add(Counter({e["values"]: e["counts"] for e in by_status if counted(e["values"])}))


def iter_unit_rows(units: Iterable[Unit], source: Source, schema: pa.Schema) -> Iterator[Rows]:
    """The rows of units, one unit after the other; one that is gone has none."""
    for unit in units:
        rows = iter(source.read(unit, schema))
        try:
            first = next(rows)
        except FileNotFoundError:
            # Not a row: were it back tomorrow, nobody would look at it again.
            _log.warning("%s is gone since it was listed", unit.place)
            continue
        yield first
        yield from rows


def _units_of(batches: Iterable[pa.RecordBatch], units: Sequence[Unit]) -> Iterator[Unit]:
    for batch in batches:
        for number in batch.column(0).to_pylist():
            yield units[number]


def _numbers(spark: SparkSession, units: Sequence[Unit], num_tasks: int | None) -> DataFrame:
    num_tasks = min(max(1, len(units)), num_tasks or _MAX_TASKS)
    return spark.range(0, len(units), 1, num_tasks)
