"""Where metadata goes: Parquet partitioned by shard, and the only record of what is done."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable
from typing import Any, Protocol

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import ArrayType, DoubleType, FloatType, StructField, StructType

from spark_nsfw.errors import JobError
from spark_nsfw.note import PROVENANCE
from spark_nsfw.schema import SHARD
from spark_nsfw.spark.committer import committer_of
from spark_nsfw.spark.session import session_settings
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.types import arrow_schema
from spark_nsfw.use.metadata import MetadataFiles

__all__ = [
    "Output",
    "ParquetOutput",
    "noted_schema",
    "num_tasks_for",
    "read_note",
    "with_note",
]

_log = logging.getLogger(__name__)

#: Writers that a task keeps open, one per shard. Up to this number Spark does not sort
#: the rows by shard before it writes them, and so leaves them in their unit's order.
_MAX_UNITS_PER_TASK = 64


class Output(Protocol):
    """Where a run writes."""

    url: str

    def note(self) -> dict[str, Any] | None:
        """What made its rows; None if it is not begun."""
        ...

    def schema(self) -> StructType | None:
        """Its columns; None if it is not begun."""
        ...

    def begin(self, schema: StructType, note: dict[str, Any]) -> None:
        """Make it ready for rows of these columns."""
        ...

    def done(self) -> set[str]:
        """Names of the units whose rows it has."""
        ...

    def keys(self, units: Iterable[str]) -> dict[str, set[str]]:
        """The keys of the rows of each of some units."""
        ...

    def forget(self, units: Iterable[str]) -> None:
        """Delete the rows of units."""
        ...

    def append(self, rows: DataFrame) -> None:
        """Add rows of units that it does not have."""
        ...

    def rows(self) -> DataFrame:
        """All its rows."""
        ...

    def delete(self) -> None:
        """Delete what runs have written, and nothing else."""
        ...


class ParquetOutput:
    """A directory of Parquet files with a partition ``shard=…`` for each unit.

    Args:
        spark: classic or Connect.
        url: a path or URL that Spark writes to.
    """

    def __init__(self, spark: SparkSession, url: str) -> None:
        adopt_stores(spark)
        self._files = MetadataFiles.at(url)
        self.url = self._files.url
        self._spark = spark
        self._committer = committer_of(spark, self.url)
        _log.info("files are committed to %s by %s", self.url, self._committer.name)

    def note(self) -> dict[str, Any] | None:
        """What made its rows, empty if nothing was noted; None if it is not begun."""
        return self._files.note()

    def schema(self) -> StructType | None:
        """Its columns without ``shard``; None if it is not begun."""
        found = self._files.spark_schema()
        return None if found is None else StructType.fromJson(json.loads(found))

    def begin(self, schema: StructType, note: dict[str, Any]) -> None:
        """Write the partition without rows: columns, note, and that shards are strings.

        Raises:
            JobError: the output cannot be written.
        """
        columns = StructType([field for field in schema if field.name != SHARD])
        try:
            self._files.begin(arrow_schema(columns), columns.json(), {PROVENANCE: json.dumps(note)})
        except OSError as exc:
            raise JobError(f"{self.url} cannot be written: {exc}") from exc

    def done(self) -> set[str]:
        """Names of the units whose rows it has; a unit that was written twice has them once.

        Raises:
            JobError: two writes made a unit's rows with different settings.
        """
        return self._files.done()

    def keys(self, units: Iterable[str]) -> dict[str, set[str]]:
        """The keys of the rows of each of some units; none of a unit that has no rows."""
        return self._files.keys(units)

    def forget(self, units: Iterable[str]) -> None:
        """Delete the rows of units: they are not done any more."""
        self._files.forget(units)

    def append(self, rows: DataFrame) -> None:
        """Add rows of units that are not `done`, each in one task of their own.

        Every write has an attempt number of its own, so that writes of two runs, or a dead
        one's, cannot publish or delete each other's files.
        """
        attempt = 1 + secrets.randbelow(2**31 - 2)
        options = self._committer.options | _without_dictionaries(rows.schema)
        options["mapreduce.job.application.attempt.id"] = str(attempt)
        settings = self._committer.settings | {
            "spark.sql.maxConcurrentOutputFileWriters": str(_MAX_UNITS_PER_TASK)
        }
        try:
            with session_settings(self._spark, settings):
                (
                    rows.write.mode("append")
                    .options(compression="zstd", **options)
                    .partitionBy(SHARD)
                    .parquet(self.url)
                )
        finally:
            self._files.delete_attempt(attempt)

    def rows(self) -> DataFrame:
        """All its rows, ``shard`` a string."""
        return self._spark.read.parquet(self.url)

    def delete(self) -> None:
        """Delete the files that runs have written, by their names; never a tree.

        Raises:
            InputError: there are other files as well; nothing is deleted.
        """
        self._files.delete()


def _without_dictionaries(schema: StructType) -> dict[str, str]:
    """Options that keep Parquet from looking for repeated numbers in embeddings.

    There are hardly any, and looking for them took nearly a third of the JVM's time
    (docs/performance.md).
    """
    return {
        f"parquet.enable.dictionary#{field.name}.list.element": "false"
        for field in schema
        if isinstance(field.dataType, ArrayType)
        and isinstance(field.dataType.elementType, FloatType | DoubleType)
    }


def num_tasks_for(num_units: int, at_least: int) -> int:
    """Tasks to slice units into, so that each task's units are written in their order."""
    return max(at_least, -(-num_units // _MAX_UNITS_PER_TASK))


def with_note(rows: DataFrame, columns: Iterable[str], note: dict[str, Any]) -> DataFrame:
    """Note on the result columns what made them.

    Spark writes columns' metadata into the footer of every Parquet file and gives it
    back as ``df.schema["nsfw_score"].metadata``.
    """
    for column in columns:
        if column in rows.columns:
            rows = rows.withMetadata(column, {PROVENANCE: json.dumps(note)})
    return rows


def noted_schema(schema: StructType, columns: Iterable[str], note: dict[str, Any]) -> StructType:
    """The schema of rows that have gone through `with_note`."""
    noted, text = set(columns), json.dumps(note)
    return StructType(
        [
            StructField(f.name, f.dataType, True, {PROVENANCE: text} if f.name in noted else None)
            for f in schema
        ]
    )


def read_note(schema: StructType) -> dict[str, Any] | None:
    """The note that `with_note` left, or None."""
    for field in schema:
        note = (field.metadata or {}).get(PROVENANCE)
        if note is not None:
            return dict(json.loads(note))
    return None
