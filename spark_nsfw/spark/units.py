"""Units → DataFrame of their rows with image bytes, and what the plans share with it.

No torch: a Python worker that only reads does not import it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.accumulators import AccumulatorParam
from pyspark.sql import DataFrame, SparkSession

from spark_nsfw.read.source import Rows, Source, Unit
from spark_nsfw.schema import IMAGE, STATUS, Status
from spark_nsfw.spark.cluster import num_slots, reader_workers
from spark_nsfw.spark.stores import on_workers
from spark_nsfw.spark.types import spark_schema

__all__ = [
    "StatusCounts",
    "count_rows",
    "iter_unit_rows",
    "sample_rows",
    "tasks_of",
    "unit_numbers",
    "units_of",
]

#: Tasks where nobody says how many.
_MAX_TASKS = 1024

#: A task fills its pipeline at its start and drains it at its end, a fraction of a second in
#: which cores idle: small shards share a task.
_TASK_BYTES = 128 << 20

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
        spark: classic or Connect.
        units: of the source.
        source: reads them.
        schema: of the source's rows.
        images: whether there is a column ``image``.
        num_tasks: that the units are sliced into.
        counts: an accumulator of `StatusCounts`, for the rows that need no scoring.
    """
    columns = schema.append(pa.field(IMAGE, pa.binary())) if images else schema

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch, contents in iter_unit_rows(units_of(batches, units), source, schema):
            count_rows(batch, counts, lambda status: status != Status.OK.value)
            arrays = [*batch.columns, *([pa.array(contents, pa.binary())] if images else [])]
            yield pa.RecordBatch.from_arrays(arrays, schema=columns)

    with reader_workers(spark):
        return unit_numbers(spark, units, num_tasks).mapInArrow(
            on_workers(read), spark_schema(columns)
        )


def count_rows(
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


def units_of(batches: Iterable[pa.RecordBatch], units: Sequence[Unit]) -> Iterator[Unit]:
    """The units whose numbers a task is given."""
    for batch in batches:
        for number in batch.column(0).to_pylist():
            yield units[number]


def tasks_of(units: Sequence[Unit], slots: int, at_most: int) -> int:
    """Tasks for some units: not so many that each is over before it is in full swing.

    Args:
        units: to be sliced.
        slots: tasks that run at a time; so many there are at least.
        at_most: taken where nobody knows how large the units are.
    """
    num_bytes = sum(unit.num_bytes for unit in units)
    if num_bytes == 0:
        return at_most
    rounds = -(-num_bytes // (_TASK_BYTES * slots))
    return min(slots * rounds, max(slots, at_most))


def unit_numbers(spark: SparkSession, units: Sequence[Unit], num_tasks: int | None) -> DataFrame:
    """A row with a number for each unit, sliced without a shuffle.

    A unit goes to one task, the same one however often a stage is tried.
    """
    num_tasks = num_tasks or tasks_of(units, num_slots(spark), _MAX_TASKS)
    num_tasks = min(max(1, len(units)), num_tasks)
    return spark.range(0, len(units), 1, num_tasks)
