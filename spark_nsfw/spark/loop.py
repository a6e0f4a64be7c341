"""The loop: what the source has and the output lacks, scored and appended in waves.

::

    missing = [unit for unit in source.units() if unit.name not in output.done()]
    for wave in waves(missing):
        output.append(metadata_rows(wave, source, recipe))

The output is the only record of what is done. A unit's rows appear in it whole or not at
all, so a run that was killed goes on with the difference, deleting a partition is asking for
it anew, and two runs side by side cost work, not rows.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from spark_nsfw.errors import (
    InputError,
    JobError,
    JobStoppedError,
    NothingToReadError,
    StorageError,
)
from spark_nsfw.files import exists
from spark_nsfw.read.source import GrowingSource, Source, Unit
from spark_nsfw.schema import ERROR_MESSAGE, SHARD, STATUS, Status, metadata_schema
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.cluster import num_slots
from spark_nsfw.spark.mixing import refuse_mixing
from spark_nsfw.spark.output import Output, num_tasks_for, with_note
from spark_nsfw.spark.plans import PLANS, Plan, metadata_rows
from spark_nsfw.spark.progress import Progress, ProgressStyle
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.units import StatusCounts, tasks_of
from spark_nsfw.spark.waves import (
    Crashes,
    ReadFailures,
    WaveSizes,
    is_read_failure,
    reason,
    write_apart,
)
from spark_nsfw.use.metadata import refuse_names
from spark_nsfw.use.summary import counted

__all__ = ["WATCH_SECONDS", "JobOptions", "Run"]

#: Tasks that a slot gets in a wave, so that slow units do not queue behind each other.
_TASKS_PER_SLOT = 8

#: Names of files in a wave, at most: 20 MB of them.
_MAX_NAMES = 1_000_000

#: How often a run scores units whose rows do not turn up.
_MAX_ROUNDS = 3

#: Seconds between looks for a request to stop while Spark works.
_STOP_POLL_SECONDS = 0.5

#: Seconds between looks for new units, at least.
WATCH_SECONDS = 5.0


@dataclass(frozen=True)
class JobOptions:
    """How a run goes.

    Attributes:
        plan: ``dataframe`` passes images through Spark, ``fused`` reads and scores in
            one Python worker; the rows are the same.
        shards_per_wave: units that are scored and written together; None takes as many as
            take about five minutes.
        allow_changes: go on with an output that was begun with other models.
        watch: keep running, and score units as they arrive, until stopped.
        settle_seconds: with ``watch``, a unit is read once it has not changed for so long.
        progress: how the run tells what it does, see `spark_nsfw.spark.progress.Progress`.

    Raises:
        InputError: a value that cannot work.
    """

    plan: Plan = "dataframe"
    shards_per_wave: int | None = None
    allow_changes: bool = False
    watch: bool = False
    settle_seconds: float = 30.0
    progress: ProgressStyle = "auto"

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise InputError(f"--plan (plan) is {' or '.join(map(repr, PLANS))}, not {self.plan!r}")
        if self.shards_per_wave is not None and self.shards_per_wave < 1:
            raise InputError("--shards-per-wave (shards_per_wave) is at least 1")


def _wave(units: Sequence[Unit], position: int, number: int) -> Sequence[Unit]:
    """The next units, at most so many; their files' names go to every task."""
    end, num_names = position, 0
    while end < min(len(units), position + number) and num_names < _MAX_NAMES:
        num_names += len(units[end].members)
        end += 1
    return units[position:end]


def _places(unit: Unit) -> list[str]:
    """What there is of a unit, as long as it is there."""
    return [f"{unit.place}/{name}" for name in unit.members] or [unit.place]


@dataclass
class Run:
    """What the waves of a run share."""

    spark: SparkSession
    source: Source
    recipe: Recipe
    output: Output
    options: JobOptions
    stop: threading.Event
    note: dict[str, Any]
    schema: pa.Schema
    progress: Progress

    def __post_init__(self) -> None:
        self.slots = num_slots(self.spark)
        self.sizes = WaveSizes(self.slots, self.options.shards_per_wave)
        self.crashes = Crashes(self._set_aside)
        self.failures = ReadFailures()
        context = getattr(self.spark, "_sc", None)  # Spark Connect has none, and no counts
        self.counts = None if context is None else context.accumulator(Counter(), StatusCounts())
        self.counted_before: Counter[str] = Counter()  # the write under way
        self.unpublished: Counter[str] = Counter()
        self.num_set_aside = 0
        self.known_keys: dict[str, set[str]] = {}

    def keep_watching(self, units: Sequence[Unit]) -> None:
        """Write units as they arrive, until stopped.

        Args:
            units: those that are known.

        Raises:
            JobStoppedError: stopped while there were some left.
        """
        pause = WATCH_SECONDS
        while not self.stop.wait(pause):
            began = time.monotonic()
            units = self._look(units)
            wanted = self._remaining(units)
            pause = max(WATCH_SECONDS, 10 * (time.monotonic() - began))
            self._write_units(wanted)
        if self._missing(self._remaining(self._look(units))):
            raise self._stopped()

    def write_difference(self, units: Sequence[Unit]) -> None:
        """Write every unit that the output does not have, wave by wave.

        Raises:
            JobError: a wave failed, or rows do not turn up.
            JobStoppedError: the run was stopped, and there are some left.
        """
        self._write_units(self._remaining(units))
        if isinstance(self.source, GrowingSource) and self.progress.num_waves:
            # A run beside this one may have seen other files.
            self._write_units(self._remaining(units))

    def _write_units(self, units: Sequence[Unit]) -> None:
        self.progress.know(unit.name for unit in units)
        missing = self._missing(units)
        for _ in range(_MAX_ROUNDS):
            missing = self._settled(missing)
            self._write_waves(missing)
            if not missing:
                return
            with self._told():
                self.crashes.blame_units()  # there are no others by which to tell
            self._refuse_mixing()
            # That a write returned proves nothing: what counts is what is there.
            missing = self._missing(missing)
            if missing:
                missing = self._still_there(missing)
        if missing:
            raise JobError(
                f"{counted(len(missing), 'shard')} without rows after {_MAX_ROUNDS} tries, such as "
                f"{missing[0].place}: run again to resume"
            )

    def _write_waves(self, units: Sequence[Unit]) -> None:
        """Write units wave by wave.

        If a unit cannot be read now, all others of its wave and the waves after it are still
        written, and the run fails at the end. At a second such wave it fails at once: the
        store may be down.
        """
        unreadable, position = None, 0
        while position < len(units):
            wave = _wave(units, position, self.sizes.next)
            try:
                self._write_wave(wave)
            except JobError as exc:
                if unreadable is not None or not is_read_failure(exc):
                    raise
                unreadable = exc
            position += len(wave)
        if unreadable is not None:
            raise unreadable

    def _look(self, known: Sequence[Unit]) -> Sequence[Unit]:
        """The units that are there now, or those that are known where they cannot be listed."""
        adopt_stores(self.spark)
        try:
            units = self.source.units()
        except NothingToReadError:  # one of several that were named is enough for it
            return known
        except StorageError as exc:
            self.progress.say(f"the input cannot be listed now, trying again: {exc}")
            return known
        refuse_names(units, self.output.url)
        return units

    def _remaining(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units, without samples that are done in another unit."""
        if not isinstance(self.source, GrowingSource):
            return units
        adopt_stores(self.spark)
        units, doubled = self.source.remaining(units, self.output.done(), self._keys)
        self.output.forget(doubled)
        return units

    def _keys(self, names: Iterable[str]) -> dict[str, set[str]]:
        """The keys of units that are done, which never change."""
        names = list(names)
        unknown = [name for name in names if name not in self.known_keys]
        self.known_keys.update(self.output.keys(unknown))
        return {name: self.known_keys[name] for name in names}

    def _missing(self, units: Sequence[Unit]) -> list[Unit]:
        adopt_stores(self.spark)
        done = self.output.done()
        self.progress.done = done & self.progress.units
        return [unit for unit in units if unit.name not in done]

    def _settled(self, units: Sequence[Unit]) -> list[Unit]:
        """With ``watch``, those that nobody has changed for a while."""
        if not self.options.watch:
            return list(units)
        latest = time.time() - self.options.settle_seconds
        return [unit for unit in units if unit.modified_seconds <= latest]

    def _still_there(self, missing: Sequence[Unit]) -> list[Unit]:
        """Those of some units that are still there; the others are told."""
        there = [unit for unit in missing if any(map(exists, _places(unit)))]
        gone = [unit for unit in missing if unit not in there]
        if gone:
            self.progress.say(
                f"{counted(len(gone), 'shard')} disappeared before being scored, such as "
                f"{gone[0].place}"
            )
            self.progress.forget(unit.name for unit in gone)
        return there

    def _write_wave(self, units: Sequence[Unit]) -> None:
        if self.stop.is_set():
            raise self._stopped()
        began, before, names = time.monotonic(), self._counted(), [unit.name for unit in units]
        try:
            with self._told():
                write_apart(units, self._write, self._left, self.crashes, self.failures)
        except JobError as exc:
            if is_read_failure(exc):
                left = {unit.name for unit in self._missing(units)}
                if len(left) < len(units):
                    written = [name for name in names if name not in left]
                    self.progress.add(written, self._counted() - before)
            raise
        self.sizes.took(len(units), time.monotonic() - began)
        self.progress.add(names, self._counted() - before)

    def _counted(self) -> Counter[str]:
        rows = Counter() if self.counts is None else Counter(self.counts.value)
        if self.num_set_aside:
            rows[Status.SHARD_CRASHED.value] += self.num_set_aside
        return rows - self.unpublished

    def _left(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of a failed write that are missing; if all of them are, its rows do not count."""
        left = self._missing(units)
        if len(left) == len(units):
            self.unpublished += self._counted() - self.counted_before
        return left

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Spark's errors inside as one line, or as the stop that they are."""
        try:
            with self._cancelled_when_stopped():
                yield
        except (PySparkException, Py4JError) as exc:
            if self.stop.is_set():
                raise self._stopped() from exc
            raise JobError(f"a wave of shards failed, run again to resume: {reason(exc)}") from exc

    @contextmanager
    def _cancelled_when_stopped(self) -> Iterator[None]:
        """Spark's jobs inside end when the run is to stop."""
        context = getattr(self.spark, "_sc", None)
        if context is None:
            yield
            return
        group, finished = f"spark-nsfw {uuid.uuid4()}", threading.Event()

        def cancel() -> None:
            while not finished.wait(_STOP_POLL_SECONDS):
                if self.stop.is_set():
                    context.cancelJobGroup(group)

        names = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
        before = {name: context.getLocalProperty(name) for name in names}
        context.setJobGroup(group, "spark-nsfw: a wave of shards", interruptOnCancel=True)
        watcher = threading.Thread(target=cancel, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            for name, value in before.items():
                context.setLocalProperty(name, value)

    def _stopped(self) -> JobStoppedError:
        return JobStoppedError(
            f"stopped after {counted(self.progress.num_new_units, 'shard')} in this run; "
            "run the same command again to continue"
        )

    def _write(self, units: Sequence[Unit]) -> None:
        """Score units and append their rows."""
        adopt_stores(self.spark)
        wanted = tasks_of(units, self.slots, _TASKS_PER_SLOT * self.slots)
        num_tasks = num_tasks_for(len(units), wanted)
        rows = metadata_rows(
            self.spark, units, self.source, self.recipe, self.schema, self.options.plan,
            num_tasks=num_tasks, counts=self.counts,
        )  # fmt: skip
        self._refuse_mixing()
        self.counted_before = self._counted()
        self.output.append(with_note(rows, self.recipe.result_columns, self.note))

    def _refuse_mixing(self) -> None:
        """Notice a run with different settings that began at the same time."""
        refuse_mixing(self.output, self.recipe, self.note, self.options.allow_changes)

    def _set_aside(self, unit: Unit, error: str) -> None:
        """Write one row for a unit that kills its worker."""
        if not self._missing([unit]):
            return  # another run had better luck
        columns = spark_schema(metadata_schema(self.schema, self.recipe.result_fields))
        row = {
            SHARD: unit.name,
            STATUS: Status.SHARD_CRASHED.value,
            ERROR_MESSAGE: f"every Python worker that read this shard died: {error}",
        }
        values = tuple(row.get(name) for name in columns.names)
        rows = self.spark.createDataFrame([values], columns).coalesce(1)
        self.output.append(with_note(rows, self.recipe.result_columns, self.note))
        self.num_set_aside += 1
        self.progress.say(f"set aside {unit.place}: {error}")
