"""What a command's exit status says."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitStatus"]


class ExitStatus(IntEnum):
    """The statuses that commands end with."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    TOO_MANY_FAILED = 3
    STOPPED = 4
