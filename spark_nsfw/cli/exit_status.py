"""What a command's exit status says."""

from __future__ import annotations

import sys
from enum import IntEnum

from spark_nsfw.use.summary import Summary, counted

__all__ = ["ExitStatus", "status_of"]


class ExitStatus(IntEnum):
    """The statuses that commands end with."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    TOO_MANY_FAILED = 3
    STOPPED = 4


def status_of(summary: Summary, max_failed: float | int | None = None) -> int:
    """The status of a run that has ended by itself; says on stderr why it is not 0."""
    failed = summary.num_samples - summary.num_scored
    damaged = summary.num_damaged_shards
    limit = max_failed * summary.num_samples if isinstance(max_failed, float) else max_failed
    if limit is not None and failed + damaged > limit:
        print(
            f"spark-nsfw: {failed:,} of {summary.num_samples:,} samples and "
            f"{counted(damaged, 'shard')} failed, more than --max-failed",
            file=sys.stderr,
        )
        return ExitStatus.TOO_MANY_FAILED
    if summary.num_crashed_shards:
        print(
            f"spark-nsfw: set aside {counted(summary.num_crashed_shards, 'shard')} that killed "
            "every worker; see the rows with status shard_crashed",
            file=sys.stderr,
        )
        return ExitStatus.TOO_MANY_FAILED
    if not summary.num_scored:
        print("spark-nsfw: not one sample could be scored", file=sys.stderr)
        return ExitStatus.TOO_MANY_FAILED
    return ExitStatus.DONE
