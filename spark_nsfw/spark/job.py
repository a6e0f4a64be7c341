"""The job: a stream of shards that ends.

Spark's file source lists the shards without reading them, ``availableNow`` runs
until the last one, each micro-batch is a wave of shards that is scored and written
over its own partitions, and the checkpoint makes a rerun continue where a kill
stopped it and take only new shards after that. A wave that is replayed overwrites
what it wrote before, so no row is lost and none doubled. In the end every shard that
was listed and has no rows is read once more, so that one which vanished has a row too.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from spark_nsfw.errors import InputError, JobError, JobStoppedError, SparkNsfwError
from spark_nsfw.note import PROVENANCE, refuse_another_note
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import SampleOptions
from spark_nsfw.schema import ERROR_MESSAGE, SHARD, STATUS, Status
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder
from spark_nsfw.score.recipe import provenance
from spark_nsfw.spark.progress import Progress, ProgressStyle
from spark_nsfw.spark.reader import (
    SHARD_SOURCE_OPTIONS,
    list_shards,
    read_samples,
    settle_columns,
)
from spark_nsfw.spark.summary import Summary, summarize
from spark_nsfw.spark.types import arrow_fields
from spark_nsfw.spark.udf import score_samples, score_shards, settled
from spark_nsfw.spark.waves import Crashes, reason, write_apart
from spark_nsfw.spark.workers import device_kind
from spark_nsfw.spark.writer import (
    SCHEMA_PARTITION,
    count_statuses,
    delete_staging,
    hadoop_filesystem,
    partition_values,
    read_provenance,
    session_settings,
    with_provenance,
    write_metadata,
    write_schema,
)
from spark_nsfw.storage import absolute, hadoop_path, last_change, list_files, write_text

__all__ = ["JobOptions", "run_job"]

#: Everything of ours in the output that is not a row; readers skip names with an underscore.
_STATE = "_spark_nsfw"

_BINARY_FILE = "path string, modificationTime timestamp, length long, content binary"

#: Shards in a wave for each task that runs at a time, at least. The end of a wave leaves a
#: slot idle for half a shard on average: with this many, for less than two per cent.
_SHARDS_PER_SLOT = 32
_MIN_SHARDS_PER_WAVE = 256

#: Tasks that a slot gets in a wave, so that slow shards do not queue behind each other.
_TASKS_PER_SLOT = 8

#: With ``watch``, once all is done that was there in the beginning.
_WATCH_TRIGGER = {"processingTime": "5 seconds"}

#: What of the note has to stay as it is, whatever is allowed to change.
_NEVER_MIXED = ("rows", "inputs")

#: Tasks that list the shards of a wave, at least.
_MIN_LISTING_TASKS = 32

#: Seconds between two looks at whether to stop.
_STOP_POLL_SECONDS = 1


def _settings(spark: SparkSession) -> dict[str, str]:
    slots = num_slots(spark)
    return {
        # With images of 100 KB, Spark's 10,000 rows would make a gigabyte of one Arrow batch.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
        "spark.sql.files.minPartitionNum": str(_TASKS_PER_SLOT * slots),
        # By default Spark looks up every shard of a wave in a task of its own.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(
            max(_MIN_LISTING_TASKS, slots)
        ),
        # A shard that vanishes would fail its wave; it gets its row in the end.
        "spark.sql.files.ignoreMissingFiles": "true",
    }


def num_slots(spark: SparkSession) -> int:
    """Tasks that run at a time: what the cores allow, or the GPUs if those are fewer.

    Counts executors that have registered; with dynamic allocation there may be more later.
    """
    context, conf = spark.sparkContext, spark.sparkContext.getConf()
    slots = context.defaultParallelism // int(conf.get("spark.task.cpus", "1"))
    gpus = int(conf.get("spark.executor.resource.gpu.amount", "0"))
    per_task = float(conf.get("spark.task.resource.gpu.amount", "0"))
    if gpus and per_task:
        # Tasks may share a GPU; none has parts of two.
        per_executor = gpus * int(1 / per_task) if per_task < 1 else int(gpus / per_task)
        slots = min(slots, max(1, num_executors(spark)) * per_executor)
    return max(1, slots)


def num_executors(spark: SparkSession) -> int:
    """Executors that have registered, or as many as were asked for if those are more."""
    context: Any = spark.sparkContext
    registered = len(context._jsc.sc().statusTracker().getExecutorInfos()) - 1  # and the driver
    return max(registered, int(context.getConf().get("spark.executor.instances", "0")))


@dataclass(frozen=True)
class JobOptions:
    """How a run goes.

    Attributes:
        plan: ``dataframe`` passes images through Spark, ``fused`` reads and scores in
            one Python worker; the rows are the same.
        shards_per_wave: shards that are scored and written together: what a kill can
            cost, and how often progress is saved. None takes 32 for each task that runs
            at a time, and at least 256.
        columns: which of the dataset's own columns to keep; None keeps all, () none.
        keep_embeddings: whether the output has the embedding column.
        device: a torch device; by default the task's GPU if there is one.
        samples: how shards become rows; its ``passthrough`` is settled by the job.
        allow_changes: go on with an output that other models or another version began.
        watch: keep running, and score shards as they arrive, until stopped.
        settle_seconds: with ``watch``, a shard is read once it has not changed for so long.
        progress: how the run tells what it does, see `spark_nsfw.spark.progress.Progress`.
    """

    plan: str = "dataframe"
    shards_per_wave: int | None = None
    columns: Sequence[str] | None = None
    keep_embeddings: bool = True
    device: str | None = None
    samples: SampleOptions = field(default_factory=SampleOptions)
    allow_changes: bool = False
    watch: bool = False
    settle_seconds: float = 30.0
    progress: ProgressStyle = "auto"

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
    stop: threading.Event | None = None,
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
        stop: when set, the run ends; the wave under way is scored anew by the next run.

    Returns:
        What the whole output holds, earlier runs included. The same is written as JSON to
        ``_spark_nsfw/summary.json`` in the output.

    Raises:
        InputError: nothing to read, or arguments that cannot work.
        JobError: the output was made with other weights or columns, or from inputs of
            another root, or Spark failed.
        JobStoppedError: ``stop`` was set before all shards were done.
    """
    if not hasattr(spark, "_jsparkSession"):
        raise InputError(
            "the job needs a classic session: its stream of shards runs in the driver, and "
            "through Spark Connect there is none. Take ImageTextPairDataset.save_metadata or "
            "score_samples there, or submit the job to the cluster"
        )
    options = options or JobOptions()
    stop = stop or threading.Event()
    if options.plan not in ("dataframe", "fused"):
        raise InputError(f"plan is 'dataframe' or 'fused', not {options.plan!r}")
    if options.shards_per_wave is not None and options.shards_per_wave < 1:
        raise InputError("shards_per_wave is at least 1")
    output = absolute(hadoop_path(output))
    # A task has run after this: at least one executor is there to count slots by.
    kind = device_kind(spark, options.device)
    embedder = embedder.ready(kind)
    options = replace(options, device=options.device or kind)  # none falls back to a CPU
    with session_settings(spark, _settings(spark)):
        shards = _first_shards(spark, inputs, options, stop)
        chosen = settled(embedder, classifiers)
        note = provenance(embedder, chosen) | {
            "rows": options.describe(),
            "inputs": {"filesystem": inputs.filesystem, "roots": list(inputs.roots)},
        }

        delete_staging(output)
        existing = _existing_schema(spark, output)
        path_of_shard = {inputs.shard_name(path): path for path in shards}
        if existing is None:
            passthrough = settle_columns(
                spark, shards, options.samples.id_col, options.columns, options.samples.captions
            )
        else:
            results = _result_columns(embedder, chosen)
            if not options.keep_embeddings:
                results.remove(embedder.image_embedding_column)
            _refuse_another_output(output, existing, results, note, options.allow_changes)
            passthrough = _passthrough_of(existing, options, embedder, chosen)
        job = _Job(
            spark, inputs, output, embedder, chosen, note,
            replace(options, samples=replace(options.samples, passthrough=passthrough)), stop,
            Progress(path_of_shard, partition_values(output), options.progress, report),
            path_of_shard,
        )  # fmt: skip
        if existing is None:
            job.begin_output()
        job.progress.watch(spark.sparkContext)
        try:
            job.run_stream({"availableNow": True})
            job.read_rowless_shards()
            if options.watch:
                job.run_stream(_WATCH_TRIGGER)
        finally:
            job.progress.finish()
        if not job.progress.num_waves:
            job.progress.say(f"nothing to do: all {len(shards):,} shards were scored before")
        seconds = job.progress.seconds
        columns = [classifier.pred_column for classifier in chosen]
        summary = replace(
            summarize(spark.read.parquet(output), output, columns),
            provenance=note,
            num_new_images=job.progress.num_images,
            seconds=seconds,
        )
    write_text(f"{output.rstrip('/')}/{_STATE}/summary.json", json.dumps(asdict(summary), indent=2))
    return summary


def _first_shards(
    spark: SparkSession, inputs: ShardInputs, options: JobOptions, stop: threading.Event
) -> list[str]:
    """The shards that are there; with ``watch``, as soon as there is one.

    Raises:
        InputError: there are none, or inputs that cannot work.
        JobStoppedError: stopped before there was one.
    """
    while True:
        try:
            return list_shards(spark, inputs)
        except InputError as exc:
            if not options.watch or "has no shard" not in str(exc):
                raise
            if stop.wait(_STOP_POLL_SECONDS):
                raise JobStoppedError("stopped before there was a shard") from exc


@dataclass
class _Job:
    """What the waves of a run share."""

    spark: SparkSession
    inputs: ShardInputs
    output: str
    embedder: TimmImageEmbedder
    classifiers: list[ImageClassifier]
    note: dict[str, Any]
    options: JobOptions
    stop: threading.Event
    progress: Progress
    path_of_shard: dict[str, str]

    def __post_init__(self) -> None:
        self.crashes = Crashes(self._set_aside)
        self.in_wave = False

    def begin_output(self) -> None:
        """Write the partition without rows.

        Raises:
            JobError: the output cannot be written.
        """
        try:
            write_schema(self._score(self._paths([])), self.output)
        except (PySparkException, Py4JJavaError) as exc:
            raise JobError(f"{self.output} cannot be written: {reason(exc)}") from exc

    def run_stream(self, trigger: dict[str, Any]) -> None:
        """Write every shard that has not been written yet, wave by wave.

        Args:
            trigger: of Spark's; the stream ends by itself, or else when it is stopped.

        Raises:
            JobError: a wave failed.
            JobStoppedError: the run was stopped.
        """
        failures: list[BaseException] = []

        def write_wave(paths: DataFrame, _: int) -> None:
            try:
                self._write_wave(paths)
            except BaseException as exc:
                failures.append(exc)
                # Spark searches the text of its own pages of traces until its stack overflows.
                raise JobError(reason(exc)) from None

        per_wave = self.options.shards_per_wave or max(
            _MIN_SHARDS_PER_WAVE, _SHARDS_PER_SLOT * num_slots(self.spark)
        )
        checkpoint = f"{self.output.rstrip('/')}/{_STATE}/checkpoint"
        stream = (
            self.spark.readStream.format("binaryFile")
            .schema(_BINARY_FILE)
            .options(**SHARD_SOURCE_OPTIONS)
            .option("maxFilesPerTrigger", per_wave)
            .option("maxFileAge", "100000d")  # old shards count as much as new ones
            .load(self.inputs.glob)
            .select("path")
        )
        writer = stream.writeStream.foreachBatch(write_wave)
        writer = writer.option("checkpointLocation", checkpoint).trigger(**trigger)
        query, stopped = None, False
        try:
            query = writer.start()
            while not query.awaitTermination(_STOP_POLL_SECONDS):
                if not self.stop.is_set():
                    continue
                if self.in_wave:
                    stopped = True
                    break
                if trigger == _WATCH_TRIGGER:
                    query.processAllAvailable()  # returns if no shard is left, or fails at its wave
                    break
        except (PySparkException, Py4JJavaError) as exc:
            cause = failures[0] if failures else exc
            if self.stop.is_set():
                stopped = True
            elif isinstance(cause, SparkNsfwError):
                raise cause from exc
            elif failures:
                raise JobError(
                    f"a wave of shards failed, run again to resume: {reason(cause)}"
                ) from cause
            else:
                raise JobError(
                    f"the stream of shards failed: {reason(exc)}. If its checkpoint is damaged, "
                    f"delete {checkpoint} and run again: all shards are then scored anew"
                ) from exc
        finally:
            if query is not None:
                query.stop()
        if stopped:
            raise JobStoppedError(
                f"stopped after {self.progress.num_new_shards:,} shards in this run; "
                "the same command goes on from there"
            )

    def read_rowless_shards(self) -> None:
        """Read shards again that were listed and have no rows: empty ones, or vanished ones.

        Raises:
            JobError: they cannot be written.
            JobStoppedError: the run was stopped, and there are some.
        """
        self.crashes.blame_shards()  # there are no others by which to tell
        metadata = self.spark.read.parquet(self.output)
        written = {row[SHARD] for row in metadata.select(SHARD).distinct().collect()}
        rowless = [path for name, path in self.path_of_shard.items() if name not in written]
        if not rowless:
            return
        if self.stop.is_set():
            raise JobStoppedError("stopped before all shards were done; the same command goes on")
        try:
            counts = write_apart(rowless, self._write, self.crashes)
            counts += self.crashes.blame_shards()
        except (PySparkException, Py4JJavaError) as exc:
            raise JobError(
                f"shards without rows could not be read, run again to resume: {reason(exc)}"
            ) from exc
        num_by_status = sum(counts, Counter())
        if num_by_status:
            self.progress.add([*map(self.inputs.shard_name, rowless)], num_by_status)

    def _write_wave(self, shards: DataFrame) -> None:
        if self.stop.is_set():
            raise JobStoppedError("stopped before a wave")
        self.in_wave = True
        paths = [row["path"] for row in shards.collect()]
        self._remember(paths)
        if self.options.watch:
            self._wait_until_settled(paths)
        counts = write_apart(
            paths,
            lambda part: self._write(part, shards if len(part) == len(paths) else None),
            self.crashes,
        )
        self.in_wave = False
        self.progress.add([*map(self.inputs.shard_name, paths)], sum(counts, Counter()))

    def _remember(self, paths: Sequence[str]) -> None:
        """Refuse a shard that came later and would replace another one's rows."""
        for path in paths:
            known = self.path_of_shard.setdefault(self.inputs.shard_name(path), path)
            if known != path:
                self.inputs.check([known, path])

    def _wait_until_settled(self, paths: Sequence[str]) -> None:
        """Wait until no shard of a wave has changed for a while."""
        left = self.options.settle_seconds
        while left > 0 and not self.stop.wait(min(left, _STOP_POLL_SECONDS)):
            left = last_change(paths) + self.options.settle_seconds - time.time()

    def _score(self, paths: DataFrame) -> DataFrame:
        options = self.options
        how: dict[str, Any] = {
            "device": options.device,
            "keep_embeddings": options.keep_embeddings,
        }
        models = self.embedder, self.classifiers
        if options.plan == "fused":
            scored = score_shards(paths, self.inputs, options.samples, *models, **how)
        else:
            samples = read_samples(paths, self.inputs, options.samples)
            scored = score_samples(samples, *models, **how)
        return with_provenance(scored, _result_columns(*models), self.note)

    def _write(self, paths: Sequence[str], as_dataframe: DataFrame | None = None) -> Counter[str]:
        """Write the rows of some shards; rows by status."""
        shards = self._paths(paths) if as_dataframe is None else as_dataframe
        write_metadata(self._score(shards), self.output)
        names = [self.inputs.shard_name(path) for path in paths]
        return Counter(count_statuses(self.spark, self.output, names))

    def _set_aside(self, path: str, error: str) -> Counter[str]:
        """Write one row for a shard that kills its worker."""
        rows = self._score(self._paths([]))
        row = {
            SHARD: self.inputs.shard_name(path),
            STATUS: Status.SHARD_CRASHED.value,
            ERROR_MESSAGE: f"every worker that read it died: {error}",
        }
        values = tuple(row.get(name) for name in rows.columns)
        crashed = self.spark.createDataFrame([values], rows.schema)
        write_metadata(
            with_provenance(crashed, _result_columns(self.embedder, self.classifiers), self.note),
            self.output,
        )
        self.progress.say(f"set aside {path}: {error}")
        return Counter({Status.SHARD_CRASHED.value: 1})

    def _paths(self, paths: Sequence[str]) -> DataFrame:
        rows = self.spark.createDataFrame([(path,) for path in paths], "path string")
        return rows.repartition(min(max(len(paths), 1), _TASKS_PER_SLOT * num_slots(self.spark)))


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


def _refuse_another_output(
    output: str,
    existing: StructType,
    results: Sequence[str],
    now: dict[str, Any],
    allow_changes: bool,
) -> None:
    """Refuse to mix rows that were made in different ways, unless told.

    Columns never mix. Nor do inputs of different roots: shards are named below their root, so
    that one dataset's would replace another's, or the same shard come back under another name.
    """
    before = read_provenance(existing) or {}
    before.setdefault("inputs", now["inputs"])  # notes of older outputs do not have them
    columns = [field.name for field in existing if PROVENANCE in (field.metadata or {})]
    refuse_another_note(
        output,
        {name: before.get(name) for name in _NEVER_MIXED} | {"result_columns": sorted(columns)},
        {name: now[name] for name in _NEVER_MIXED} | {"result_columns": sorted(results)},
        "or --overwrite to start anew",
    )
    if not allow_changes:
        remedy = "or --overwrite to start anew, or --allow-changes to mix both"
        refuse_another_note(output, before, now, remedy)


def _existing_schema(spark: SparkSession, output: str) -> StructType | None:
    """The columns of an output that an earlier run has begun, or None.

    A committed file tells; not every committer leaves a ``_SUCCESS``.
    """
    partition = f"{output.rstrip('/')}/{SHARD}={SCHEMA_PARTITION}"
    begun = any(name.endswith(".parquet") for name in list_files(partition)[1])
    # Spark itself logs a stack trace for a path that is not there.
    return spark.read.parquet(partition).schema if begun else None


def delete_output(spark: SparkSession, output: str) -> None:
    """Delete an output and what is known of its progress.

    Raises:
        InputError: it is no output of this job.
    """
    output = absolute(hadoop_path(output))
    filesystem, path = hadoop_filesystem(spark, output)
    if not filesystem.exists(path):
        return
    if SCHEMA_PARTITION not in partition_values(output):
        raise InputError(f"{output} is no output of spark-nsfw, and is not deleted")
    filesystem.delete(path, True)
