"""A wave of shards, written whole, whatever one of them does to its worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from spark_nsfw.errors import JobError

__all__ = ["Crashes", "reason", "write_apart"]

Count = TypeVar("Count")

#: What Spark says when a Python worker or its executor died, or had no memory left.
_CRASH = re.compile(
    r"Python worker exited unexpectedly|ExecutorLostFailure|\b(_Array)?MemoryError\b"
)

#: So many shards are not to blame, if nothing else of a run could be written before them.
_MAX_CRASHES_AT_FIRST = 4


class Crashes(Generic[Count]):
    """The shards of a run that kill their workers.

    Until something is written, it may as well be the cluster that kills them: they wait,
    and where there are several of them, the run fails.

    Args:
        set_aside: is given the path of a shard that kills its worker, and the error.
    """

    def __init__(self, set_aside: Callable[[str, str], Count]) -> None:
        self._set_aside = set_aside
        self._waiting: list[tuple[str, str]] = []
        self._workers_live = False

    def add(self, shard: str, error: str) -> list[Count]:
        """Set a shard aside, as soon as it is sure that it is to blame.

        Raises:
            JobError: nothing but such shards was met so far; none of them is set aside.
        """
        self._waiting.append((shard, error))
        if self._workers_live:
            return self.blame_shards()
        if len(self._waiting) >= _MAX_CRASHES_AT_FIRST:
            raise JobError(
                f"every worker died, with each of the first {len(self._waiting)} shards alone: "
                f"{error}. No shard is set aside for it. Check the memory of executors "
                "(spark.executor.memoryOverhead), the batch size, and that the libraries of the "
                f"workers run there at all; the shards are {', '.join(s for s, _ in self._waiting)}"
            )
        return []

    def blame_shards(self) -> list[Count]:
        """Set aside all that wait: workers live with other shards, or there are no others."""
        waiting, self._waiting = self._waiting, []
        return [self._set_aside(*crash) for crash in waiting]

    def written(self) -> list[Count]:
        """Something was written: workers do live."""
        self._workers_live = True
        return self.blame_shards()


def write_apart(
    shards: Sequence[str], write: Callable[[Sequence[str]], Count], crashes: Crashes[Count]
) -> list[Count]:
    """Write shards together; where a worker dies of one, in halves, until it is alone.

    Args:
        shards: their paths.
        write: scores shards and replaces their rows; may be called again for the same ones.
        crashes: of the run, earlier waves included.

    Returns:
        What the calls that succeeded gave, one for each part.

    Raises:
        JobError: workers die of whatever they are given.
        Exception: whatever else went wrong; it is not the shards' fault.
    """
    try:
        counts = [write(shards)]
    except Exception as exc:
        if not _CRASH.search(str(exc)):
            raise
        if len(shards) == 1:
            return crashes.add(shards[0], reason(exc))
    else:
        return [*counts, *crashes.written()]
    half = len(shards) // 2
    return [
        *write_apart(shards[:half], write, crashes),
        *write_apart(shards[half:], write, crashes),
    ]


def reason(error: BaseException) -> str:
    """What went wrong, in one line, out of Spark's pages of stack traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Python's own last word, then Java's innermost; a death says more than what came of it.
    python = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): \S", line)]
    java = [line for line in lines if re.match(r"(Caused by)?: [\w.$]+: \S", line)]
    told = [line.split(": ", 2)[2] for line in java]
    death = [line for line in (*told, *lines) if _CRASH.search(line)]
    return next(iter([*death[:1], *python[-1:], *told[-1:], *lines[:1]]), repr(error))
