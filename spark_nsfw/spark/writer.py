"""Metadata rows → Parquet partitioned by shard, with provenance in every file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

from pyarrow import fs
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from spark_nsfw.note import PROVENANCE
from spark_nsfw.schema import SHARD, STATUS
from spark_nsfw.storage import resolve

__all__ = [
    "count_statuses",
    "delete_staging",
    "hadoop_filesystem",
    "partition_values",
    "read_provenance",
    "with_provenance",
    "write_metadata",
    "write_schema",
]

#: The partition that holds no rows. Readers guess the type of partition values: where
#: every shard has a number for a name they would read ``00000`` as 0. One name that is
#: no number makes all of them strings, in Spark, pandas, pyarrow and DuckDB alike.
SCHEMA_PARTITION = "__schema__"

#: Writers that a task keeps open, one per shard. Below this number Spark does not sort
#: the rows by shard before it writes them, and so leaves them in the tar's order.
_OPEN_WRITERS = {"spark.sql.maxConcurrentOutputFileWriters": "64"}


def with_provenance(
    metadata: DataFrame, columns: Sequence[str], provenance: dict[str, Any]
) -> DataFrame:
    """Note on the result columns what made them.

    Spark writes columns' metadata into the footer of every Parquet file and gives it
    back as ``df.schema["nsfw_score"].metadata``.
    """
    for column in columns:
        if column in metadata.columns:
            metadata = metadata.withMetadata(column, {PROVENANCE: json.dumps(provenance)})
    return metadata


def read_provenance(schema: StructType) -> dict[str, Any] | None:
    """The note that `with_provenance` left, or None."""
    for field in schema:
        note = (field.metadata or {}).get(PROVENANCE)
        if note is not None:
            return dict(json.loads(note))
    return None


def write_schema(metadata: DataFrame, output: str) -> None:
    """Write the partition without rows: columns, provenance, and that shards are strings."""
    rows = metadata.sparkSession.createDataFrame([], metadata.drop(SHARD).schema)
    partition = f"{output.rstrip('/')}/{SHARD}={SCHEMA_PARTITION}"
    rows.write.mode("overwrite").option("compression", "zstd").parquet(partition)


def write_metadata(metadata: DataFrame, output: str) -> None:
    """Write rows, replacing the partitions of their shards and no others."""
    spark = metadata.sparkSession
    with session_settings(spark, _OPEN_WRITERS):
        (
            metadata.write.mode("overwrite")
            .option("partitionOverwriteMode", "dynamic")
            .option("compression", "zstd")
            # Files are moved into the staging directory as tasks end, side by side, not by the
            # driver one after the other: nobody reads them there before all are whole.
            .option("mapreduce.fileoutputcommitter.algorithm.version", "2")
            .partitionBy(SHARD)
            .parquet(output)
        )


def count_statuses(spark: SparkSession, output: str, shards: Iterable[str]) -> dict[str, int]:
    """Rows by status that an output holds of these shards.

    Reads the one small column of their own partitions, and lists no others. `observe`
    would count while the rows are written, but RAPIDS cannot plan a query that has it
    (NVIDIA/spark-rapids 14152).
    """
    escape = spark._jvm.org.apache.spark.sql.catalyst.catalog.ExternalCatalogUtils.escapePathName  # type: ignore[union-attr]
    partitions = [f"{output.rstrip('/')}/{SHARD}={escape(name)}" for name in shards]
    reader = spark.read.schema(f"{STATUS} string")
    try:
        statuses = reader.parquet(*partitions)
    except AnalysisException:  # a shard without rows has no partition
        partitions = [path for path in partitions if _exists(spark, path)]
        if not partitions:
            return {}
        statuses = reader.parquet(*partitions)
    return {row[STATUS]: row["count"] for row in statuses.groupBy(STATUS).count().collect()}


def _exists(spark: SparkSession, url: str) -> bool:
    filesystem, path = hadoop_filesystem(spark, url)
    return bool(filesystem.exists(path))


def partition_values(output: str) -> list[str]:
    """The shards that an output has rows of, and the one name that is none."""
    filesystem, path = resolve(output)
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    prefix = f"{SHARD}="
    names = (entry.base_name for entry in entries)
    return [unquote(name[len(prefix) :]) for name in names if name.startswith(prefix)]


def delete_staging(output: str) -> None:
    """Delete what a killed driver left of a write that was under way.

    Readers that take every Parquet file below the output would count its rows twice. Nobody
    may be writing to the output meanwhile.
    """
    filesystem, path = resolve(output)
    for entry in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        if entry.base_name.startswith(".spark-staging-"):
            filesystem.delete_dir(entry.path)


def hadoop_filesystem(spark: SparkSession, url: str) -> tuple[Any, Any]:
    """Hadoop's filesystem of a URL, and its path there."""
    jvm: Any = spark._jvm
    path = jvm.org.apache.hadoop.fs.Path(url)
    return path.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf()), path


class session_settings:  # noqa: N801  # reads as a verb at its call sites
    """Runtime settings of a session for the length of a with block.

    Args:
        spark: the session.
        settings: values by name; names that this Spark lacks are fine.
    """

    def __init__(self, spark: SparkSession, settings: dict[str, str]) -> None:
        self._spark = spark
        self._settings = settings
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        for name, value in self._settings.items():
            self._before[name] = self._spark.conf.get(name, None)
            self._spark.conf.set(name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                self._spark.conf.unset(name)
            else:
                self._spark.conf.set(name, value)
