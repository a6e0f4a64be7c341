"""A wave of units, written whole, whatever one of them does to its worker."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException

from spark_nsfw.errors import JobError, StorageError
from spark_nsfw.read.source import Unit

__all__ = [
    "Crashes",
    "ReadFailures",
    "WaveSizes",
    "as_job_error",
    "is_read_failure",
    "reason",
    "write_apart",
]

#: What Spark says when a Python worker or its executor died, was hung, or had no memory left.
_CRASH = re.compile(
    r"Python worker exited unexpectedly|terminated due to idle timeout|ExecutorLostFailure"
    r"|\b(_Array)?MemoryError\b"
)

#: A frame of faulthandler's.
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_MOST_FRAMES = 6

#: This many crashes before anything is written point to the cluster, not to the units.
_MAX_CRASHES_AT_FIRST = 4

#: A wave takes about so long. Its end leaves slots idle while the last units finish; its
#: length is what a kill can cost where a store takes files only at the end of a write.
_WAVE_SECONDS = 300.0

#: Units of the first wave for each slot, and of any wave at least.
_FIRST_UNITS_PER_SLOT, _LEAST_UNITS_PER_SLOT = 32, 8

#: Units in a wave, at most, and how much larger one may be than the one before.
_MOST_UNITS, _GROWTH = 20_000, 8


class WaveSizes:
    """How many units the next wave has, so that it takes about five minutes.

    Args:
        num_slots: tasks that run at a time.
        fixed: units in every wave; None goes by the time that waves take.
    """

    def __init__(self, num_slots: int, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._least = _LEAST_UNITS_PER_SLOT * num_slots
        self._next = _FIRST_UNITS_PER_SLOT * num_slots

    @property
    def next(self) -> int:
        """Units in the next wave."""
        return self._fixed or self._next

    def took(self, num_units: int, seconds: float) -> None:
        """Learn from a wave that is written."""
        fitting = int(num_units * _WAVE_SECONDS / max(seconds, 1e-3))
        self._next = max(self._least, min(fitting, _GROWTH * num_units, _MOST_UNITS))


class Crashes:
    """The units of a run that kill their workers.

    Until something is written, the cluster may be to blame: such units wait, and if there are
    several, the run fails.

    Args:
        set_aside: takes a unit that kills its worker, and the error.
    """

    def __init__(self, set_aside: Callable[[Unit, str], None]) -> None:
        self._set_aside = set_aside
        self._waiting: list[tuple[Unit, str]] = []
        self._workers_live = False

    def add(self, unit: Unit, error: str) -> None:
        """Set a unit aside, as soon as it is certain to be the cause.

        Raises:
            JobError: every unit so far killed its worker; none is set aside.
        """
        self._waiting.append((unit, error))
        if self._workers_live:
            self.blame_units()
        elif len(self._waiting) >= _MAX_CRASHES_AT_FIRST:
            raise JobError(
                f"every worker died, with each of the first {len(self._waiting)} shards alone: "
                f"{error}. No shard was set aside. Check the executors' memory "
                "(spark.executor.memoryOverhead), the batch size, and that the workers' libraries "
                "run at all; the shards are "
                f"{', '.join(unit.place for unit, _ in self._waiting)}"
            )

    def blame_units(self) -> None:
        """Set aside all that wait: workers live with other units, or there are no others."""
        waiting, self._waiting = self._waiting, []
        for unit, error in waiting:
            self._set_aside(unit, error)

    def written(self) -> None:
        """Something was written: workers do live."""
        self._workers_live = True
        self.blame_units()


class ReadFailures:
    """Tells a unit that cannot be read now from a store that cannot be read at all.

    If two parts with no unit in common fail one after the other, and nothing was written in
    between, the store is to blame.
    """

    def __init__(self) -> None:
        self._last: set[str] = set()

    def add(self, units: Sequence[Unit]) -> bool:
        """Note a part that failed without writing anything; returns whether to give up."""
        names = {unit.name for unit in units}
        outage = bool(self._last) and self._last.isdisjoint(names)
        self._last = names
        return outage

    def written(self) -> None:
        """Something was written, so the store can be read."""
        self._last = set()


def write_apart(
    units: Sequence[Unit],
    write: Callable[[Sequence[Unit]], None],
    missing: Callable[[Sequence[Unit]], Sequence[Unit]],
    crashes: Crashes,
    failures: ReadFailures,
) -> None:
    """Write units together; isolate those that kill their worker or cannot be read now.

    A part that fails is tried again in halves. If its worker died, the halves come next. If a
    unit could not be read, they wait until the rest has been tried: every try of an
    unreadable store takes long, and the first two parts already tell what is wrong.

    Args:
        units: that are not written yet.
        write: scores units and appends their rows.
        missing: says which of some units are not written; asked after every failure, since a
            write that failed may have published some of its units.
        crashes, failures: of the run, earlier waves included.

    Raises:
        JobError: workers die of whatever they are given.
        Exception: the read failure of a single unit, once all the others are written, or that
            of the store, at once; any other error, which is not the units' fault.
    """
    parts, unreadable, any_written = deque([units]), None, False
    while parts:
        part = parts.popleft()
        left: Sequence[Unit] = ()
        try:
            write(part)
        except Exception as exc:
            crashed = _CRASH.search(str(exc)) is not None
            if not crashed and not is_read_failure(exc):
                raise
            left = missing(part)
            if len(left) == len(part):
                if not crashed and failures.add(part):
                    raise
                if len(part) == 1:
                    if crashed:
                        crashes.add(part[0], reason(exc))
                    else:
                        unreadable = unreadable or exc
                    continue
        if len(left) < len(part):
            any_written = True
            crashes.written()
            failures.written()
        half = (len(left) + 1) // 2
        halves = [units for units in (left[:half], left[half:]) if units]
        if left and crashed:
            parts.extendleft(reversed(halves))
        else:
            parts.extend(halves)
    if any_written:
        failures.written()
    if unreadable is not None:
        raise unreadable


@contextmanager
def as_job_error(what: str) -> Iterator[None]:
    """Spark's errors inside become a `JobError` of one line.

    Args:
        what: what could not be done.
    """
    try:
        yield
    except (PySparkException, Py4JError) as exc:
        raise JobError(f"{what}: {reason(exc)}") from exc


def is_read_failure(error: BaseException) -> bool:
    """Whether Spark failed because a unit cannot be read now."""
    return f"{StorageError.__name__}: " in reason(error)


def reason(error: BaseException) -> str:
    """What went wrong, in one line, out of Spark's pages of stack traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Python's own last word, then Java's innermost; a death says more than what came of it.
    python = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): \S", line)]
    java = [line for line in lines if re.match(r"(Caused by)?: [\w.$]+: \S", line)]
    told = [line.split(": ", 2)[2] for line in java]
    death = [line.rstrip(": ") + _stack(lines) for line in (*told, *lines) if _CRASH.search(line)]
    return next(iter([*death[:1], *python[-1:], *told[-1:], *lines[:1]]), repr(error))


def _stack(lines: Sequence[str]) -> str:
    """Where a thread was when it killed its worker, innermost first, as faulthandler tells it."""
    starts = [n for n, line in enumerate(lines) if line.startswith("Current thread 0x")]
    if not starts:
        return ""
    frames = itertools.takewhile(bool, map(_FRAME.match, lines[starts[0] + 1 :]))
    told = [f"{frame[3]} ({frame[1]}, line {frame[2]})" for frame in frames if frame]
    return f", in {', '.join(told[:_MOST_FRAMES])}"
