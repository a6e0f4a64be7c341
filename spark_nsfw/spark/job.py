"""The job: checks first, then the loop, then the summary."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from spark_nsfw.errors import JobError, JobStoppedError, NothingToReadError
from spark_nsfw.files import write_text
from spark_nsfw.note import merged_note
from spark_nsfw.ownership import STATE
from spark_nsfw.read.source import Source, Unit
from spark_nsfw.schema import (
    CAPTION,
    CONTRACT_COLUMNS,
    EXTRA_JSON,
    LOCATION_COLUMNS,
    SCHEMA_PARTITION,
    SHARD,
    metadata_schema,
)
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.loop import WATCH_SECONDS, JobOptions, Run
from spark_nsfw.spark.mixing import refuse_mixing, without_missing_norms
from spark_nsfw.spark.output import Output, ParquetOutput, noted_schema
from spark_nsfw.spark.progress import Progress
from spark_nsfw.spark.session import session_settings
from spark_nsfw.spark.summary import summarize
from spark_nsfw.spark.types import arrow_schema, spark_schema
from spark_nsfw.spark.waves import as_job_error
from spark_nsfw.spark.worker import device_kind
from spark_nsfw.use.metadata import refuse_names, refuse_place
from spark_nsfw.use.summary import Summary, counted

__all__ = ["JobOptions", "run_job", "write_units"]

#: How long a worker may compute without giving rows; it is taken for hung then. On a CPU 256 images
#: of a large tower take long.
_HUNG_SECONDS = {"cuda": 1800, "cpu": 7200}
_HUNG = "spark.sql.execution.pyspark.udf.idleTimeoutSeconds"

_SETTINGS = {
    # With images of 100 KB, Spark's 10,000 rows would make a gigabyte of one Arrow batch.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
    # A run beside this one may delete a file that both wrote while this one sums up.
    "spark.sql.files.ignoreMissingFiles": "true",
    # Tells where a worker was when it crashed.
    "spark.sql.execution.pyspark.udf.faulthandler.enabled": "true",
    # With a limit, kills a worker whose decoder hangs, from Spark 4.1 on.
    "spark.sql.execution.pyspark.udf.killOnIdleTimeout": "true",
}


def run_job(
    spark: SparkSession,
    source: Source,
    recipe: Recipe,
    output: str,
    options: JobOptions | None = None,
    report: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Score every unit of a source that the output does not have yet.

    Args:
        spark: classic or Connect.
        source: what to read.
        recipe: what to compute.
        output: directory of the Parquet metadata, a path or URL that Spark writes to.
        options: how the run goes.
        report: takes lines of progress; by default they go to stderr.
        stop: set it to end the run; the next run scores what is not written by then.

    Returns:
        What the whole output holds, earlier runs included. The same is written as JSON to
        ``_spark_nsfw/summary.json`` in the output.

    Raises:
        InputError: nothing to read, invalid arguments, or an output that must not be
            written to.
        JobError: the output was made with other weights or columns, or from inputs of
            another root; or Spark failed.
        JobStoppedError: ``stop`` was set before all units were done.
    """
    place = ParquetOutput(spark, output)
    refuse_place(place.url, source)
    run = write_units(spark, source, recipe, place, options, report, stop)
    seconds = run.progress.seconds
    with session_settings(spark, _SETTINGS), as_job_error(f"cannot summarize {place.url}"):
        summary = replace(
            summarize(place.rows(), place.url, recipe.score_columns, len(place.done())),
            provenance=run.note,
            num_new_images=run.progress.num_images,
            seconds=seconds,
        )
    write_text(f"{place.url}/{STATE}/summary.json", json.dumps(asdict(summary), indent=2))
    return summary


def write_units(
    spark: SparkSession,
    source: Source,
    recipe: Recipe,
    output: Output,
    options: JobOptions | None = None,
    report: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Run:
    """The loop itself: `run_job` into any output, without the summary."""
    options, stop = options or JobOptions(), stop or threading.Event()
    units = _first_units(source, options, stop)
    refuse_names(units, output.url)
    cannot = "Spark cannot run the package's code on its workers"
    with session_settings(spark, _SETTINGS), as_job_error(cannot):
        # On a cluster a task has run after this: an executor is there to count slots by.
        kind = device_kind(spark, recipe.device)
    recipe = recipe.ready(device=kind)
    has_limit = str(spark.conf.get(_HUNG, "0")).rstrip("ms") != "0"  # Spark's own is 0 or 0ms
    hung = {} if has_limit else {_HUNG: str(_HUNG_SECONDS[kind])}
    with session_settings(spark, _SETTINGS | hung):
        run = _begin(spark, source, recipe, output, options, stop, units, report)
        run.progress.watch(spark)
        try:
            run.write_difference(units)
            if options.watch:
                run.keep_watching(units)
        finally:
            run.progress.finish()
    if not run.progress.num_waves:
        run.progress.say(f"nothing to do: {counted(len(units), 'shard')}, all scored before")
    return run


def _first_units(source: Source, options: JobOptions, stop: threading.Event) -> list[Unit]:
    """The units that are there; with ``watch``, as soon as there is one.

    Raises:
        InputError: there are none, or inputs that cannot work.
        JobStoppedError: stopped before there was one.
    """
    while True:
        try:
            return source.units()
        except NothingToReadError as exc:
            if not options.watch:
                raise
            if stop.wait(WATCH_SECONDS):
                raise JobStoppedError("stopped while waiting for the first shard") from exc


def _begin(
    spark: SparkSession,
    source: Source,
    recipe: Recipe,
    output: Output,
    options: JobOptions,
    stop: threading.Event,
    units: Sequence[Unit],
    report: Callable[[str], None] | None,
) -> Run:
    """Begin an output, or continue it.

    Raises:
        JobError: it was begun with different settings, or cannot be written.
    """
    note = merged_note(recipe.describe(), source.describe())
    if output.schema() is None:
        if output.done():
            raise JobError(
                f"{output.url} has rows, but not the partition {SHARD}={SCHEMA_PARTITION} that "
                "says what made them: --overwrite deletes them and starts anew"
            )
        columns = spark_schema(metadata_schema(source.schema(units=units), recipe.result_fields))
        if output.schema() is None:  # another run may have begun it while this one read shards
            output.begin(noted_schema(columns, recipe.result_columns, note), note)
    existing = output.schema()
    if existing is not None:
        recipe = without_missing_norms(recipe, existing)
    refuse_mixing(output, recipe, note, options.allow_changes)
    assert existing is not None
    schema = source.schema(_own_columns(existing, recipe, note))
    progress = Progress(style=options.progress, report=report)
    return Run(spark, source, recipe, output, options, stop, note, schema, progress)


def _own_columns(existing: StructType, recipe: Recipe, note: dict[str, Any]) -> list[pa.Field]:
    """The dataset's own columns as the first run settled them, and those of images' locations."""
    ours = {*CONTRACT_COLUMNS, *recipe.result_columns} - {EXTRA_JSON, *LOCATION_COLUMNS}
    if note["rows"].get("captions"):
        ours.add(CAPTION)
    return [field for field in arrow_schema(existing) if field.name not in ours]
