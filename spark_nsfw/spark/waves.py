"""A wave of shards, written whole, whatever one of them does to its worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["reason", "write_apart"]

Count = TypeVar("Count")

#: What Spark says when a Python worker or its executor died, or had no memory left.
_CRASH = re.compile(
    r"Python worker exited unexpectedly|ExecutorLostFailure|\b(_Array)?MemoryError\b"
)


def write_apart(
    shards: Sequence[str],
    write: Callable[[Sequence[str]], Count],
    set_aside: Callable[[str, str], Count],
) -> list[Count]:
    """Write shards together; where a worker dies of one, in halves, until it is alone.

    Args:
        shards: their paths.
        write: scores shards and replaces their rows; may be called again for the same ones.
        set_aside: is given the path of a shard that kills its worker, and the error.

    Returns:
        What the calls that succeeded gave, one for each part.

    Raises:
        Exception: whatever else went wrong; it is not the shards' fault.
    """
    try:
        return [write(shards)]
    except Exception as exc:
        if not _CRASH.search(str(exc)):
            raise
        if len(shards) == 1:
            return [set_aside(shards[0], reason(exc))]
    half = len(shards) // 2
    return [
        *write_apart(shards[:half], write, set_aside),
        *write_apart(shards[half:], write, set_aside),
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
