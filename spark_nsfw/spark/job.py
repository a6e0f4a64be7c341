"""The job: a stream of shards that ends.

Spark's file source lists the shards without reading them, ``availableNow`` runs
until the last one, each micro-batch is a wave of shards that is scored and written
over its own partitions, and the checkpoint makes a rerun continue where a kill
stopped it and take only new shards after that. A wave that is replayed overwrites
what it wrote before, so no row is lost and none doubled.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from spark_nsfw.classifiers import ImageClassifier
from spark_nsfw.embedders import TimmImageEmbedder
from spark_nsfw.errors import InputError, JobError
from spark_nsfw.inputs import ShardInputs
from spark_nsfw.provenance import provenance, refuse_another_note
from spark_nsfw.samples import SampleOptions
from spark_nsfw.schema import SHARD, STATUS, Status
from spark_nsfw.spark.reader import (
    SHARD_SOURCE_OPTIONS,
    list_shards,
    read_samples,
    settle_columns,
)
from spark_nsfw.spark.summary import Summary, summarize
from spark_nsfw.spark.types import arrow_fields
from spark_nsfw.spark.udf import score_samples, score_shards, settled
from spark_nsfw.spark.workers import device_kind
from spark_nsfw.spark.writer import (
    SCHEMA_PARTITION,
    read_provenance,
    session_settings,
    with_provenance,
    write_metadata,
    write_schema,
)

__all__ = ["JobOptions", "run_job"]

#: Everything of ours in the output that is not a row; readers skip names with an underscore.
_STATE = "_spark_nsfw"

_BINARY_FILE = "path string, modificationTime timestamp, length long, content binary"

_SETTINGS = {
    # With images of 100 KB, Spark's 10,000 rows would make a gigabyte of one Arrow batch.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
}


@dataclass(frozen=True)
class JobOptions:
    """How a run goes.

    Attributes:
        plan: ``dataframe`` passes images through Spark, ``fused`` reads and scores in
            one Python worker; the rows are the same.
        shards_per_wave: shards that are scored and written together: what a kill can
            cost, and how often progress is saved.
        columns: which of the dataset's own columns to keep; None keeps all, () none.
        keep_embeddings: whether the output has the embedding column.
        device: a torch device; by default the task's GPU if there is one.
        samples: how shards become rows; its ``passthrough`` is settled by the job.
    """

    plan: str = "dataframe"
    shards_per_wave: int = 256
    columns: Sequence[str] | None = None
    keep_embeddings: bool = True
    device: str | None = None
    samples: SampleOptions = field(default_factory=SampleOptions)

    def describe(self) -> dict[str, Any]:
        """What decides which rows and columns come out, as plain JSON types."""
        return {
            "columns": None if self.columns is None else list(self.columns),
            "keep_embeddings": self.keep_embeddings,
            "captions": self.samples.captions,
            "id_col": self.samples.id_col,
            "image_extensions": list(self.samples.image_extensions),
            "max_image_bytes": self.samples.max_image_bytes,
        }


def run_job(
    spark: SparkSession,
    inputs: ShardInputs,
    output: str,
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier] | None = None,
    options: JobOptions | None = None,
    report: Callable[[str], None] | None = None,
) -> Summary:
    """Score every shard that the output does not have yet.

    Args:
        spark: a classic session; Spark Connect has no ``foreachBatch`` on the driver.
        inputs: where the shards are.
        output: directory of the Parquet metadata, a path or URL that Spark writes to.
        embedder: the CLIP tower.
        classifiers: applied to its embeddings; None takes the embedder's own.
        options: how the run goes.
        report: is given lines of progress; by default they go to stderr.

    Returns:
        What the whole output holds, earlier runs included.

    Raises:
        InputError: nothing to read, or arguments that cannot work.
        JobError: the output was made with other weights or columns, or Spark failed.
    """
    options = options or JobOptions()
    if options.plan not in ("dataframe", "fused"):
        raise InputError(f"plan is 'dataframe' or 'fused', not {options.plan!r}")
    if options.shards_per_wave < 1:
        raise InputError("shards_per_wave is at least 1")
    output = output if ":" in output or output.startswith("/") else os.path.abspath(output)
    shards = list_shards(spark, inputs)
    embedder = embedder.with_precision_of(device_kind(spark, options.device))
    chosen = settled(embedder, classifiers)
    note = provenance(embedder, chosen) | {"rows": options.describe()}

    existing = _existing_schema(spark, output)
    if existing is None:
        passthrough = settle_columns(spark, shards[0], options.samples.id_col, options.columns)
    else:
        refuse_another_note(output, read_provenance(existing) or {}, note)
        passthrough = _passthrough_of(existing, options, embedder, chosen)
    samples = replace(options.samples, passthrough=passthrough)

    def score(paths: DataFrame) -> DataFrame:
        how: dict[str, Any] = {
            "device": options.device,
            "keep_embeddings": options.keep_embeddings,
        }
        if options.plan == "fused":
            scored = score_shards(paths, inputs, samples, embedder, chosen, **how)
        else:
            scored = score_samples(read_samples(paths, inputs, samples), embedder, chosen, **how)
        return with_provenance(scored, _result_columns(embedder, chosen), note)

    report = report or partial(print, file=sys.stderr)
    progress = _Progress(len(shards), report)

    def write_wave(paths: DataFrame, wave: int) -> None:
        observation = Observation()
        counts = [F.count_if(F.col(STATUS) == s.value).alias(s.value) for s in Status]
        write_metadata(score(paths).observe(observation, *counts), output)
        progress.add(wave, paths.count(), observation.get)

    with session_settings(spark, _SETTINGS):
        if existing is None:
            write_schema(score(spark.createDataFrame([], "path string")), output)
        started = time.monotonic()
        _run_stream(spark, inputs, output, options.shards_per_wave, write_wave)
        seconds = time.monotonic() - started
    if not progress.num_shards_done:
        report(f"nothing to do: all {len(shards):,} shards were scored before")

    columns = [classifier.pred_column for classifier in chosen]
    summary = summarize(spark.read.parquet(output), output, columns)
    return replace(summary, provenance=note, num_new_images=progress.num_images, seconds=seconds)


def _run_stream(
    spark: SparkSession,
    inputs: ShardInputs,
    output: str,
    shards_per_wave: int,
    write_wave: Callable[[DataFrame, int], None],
) -> None:
    """Hand every shard that has not been written yet to ``write_wave``, once."""
    stream = (
        spark.readStream.format("binaryFile")
        .schema(_BINARY_FILE)
        .options(**SHARD_SOURCE_OPTIONS)
        .option("maxFilesPerTrigger", shards_per_wave)
        .option("maxFileAge", "100000d")  # old shards count as much as new ones
        .load(inputs.glob)
        .select("path")
    )
    query = (
        stream.writeStream.foreachBatch(write_wave)
        .option("checkpointLocation", f"{output.rstrip('/')}/{_STATE}/checkpoint")
        .trigger(availableNow=True)
        .start()
    )
    try:
        query.awaitTermination()
    except StreamingQueryException as exc:
        raise JobError(f"a wave of shards failed; run again to resume: {exc}") from exc
    finally:
        query.stop()


def _result_columns(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier]
) -> list[str]:
    return [embedder.image_embedding_column, *(c.pred_column for c in classifiers)]


def _passthrough_of(
    existing: StructType,
    options: JobOptions,
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier],
) -> tuple[pa.Field, ...]:
    """The dataset's own columns as the first run settled them."""
    ours = {*options.samples.schema.names, *_result_columns(embedder, classifiers)}
    return tuple(field for field in arrow_fields(existing) if field.name not in ours)


def _existing_schema(spark: SparkSession, output: str) -> StructType | None:
    """The columns of an output that an earlier run has begun, or None."""
    schema_partition = f"{output.rstrip('/')}/{SHARD}={SCHEMA_PARTITION}"
    jvm: Any = spark._jvm  # Spark itself logs a stack trace for a path that is not there
    path = jvm.org.apache.hadoop.fs.Path(f"{schema_partition}/_SUCCESS")
    if not path.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf()).exists(path):
        return None
    return spark.read.parquet(schema_partition).schema


class _Progress:
    """Counts what the waves wrote, and tells.

    Args:
        num_shards: that the inputs have, done or not.
        report: is given a line per wave.
    """

    def __init__(self, num_shards: int, report: Callable[[str], None]) -> None:
        self.num_shards = num_shards
        self.num_shards_done = 0
        self.num_images = 0
        self._started = time.monotonic()
        self._report = report

    def add(self, wave: int, num_shards: int, num_by_status: dict[str, int]) -> None:
        """Count a wave that is written."""
        self.num_shards_done += num_shards
        num_rows = sum(num_by_status.values())
        self.num_images += num_by_status[Status.OK.value]
        seconds = time.monotonic() - self._started
        self._report(
            f"wave {wave}: {self.num_shards_done:,} shards done in this run, "
            f"{self.num_shards:,} in the input; {num_by_status[Status.OK.value]:,} images scored, "
            f"{num_rows - num_by_status[Status.OK.value]:,} rows failed; "
            f"{self.num_images / seconds:,.1f} images/s"
        )
