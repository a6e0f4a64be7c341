"""What other processes take."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import psutil

__all__ = ["most_pss_mib"]


def most_pss_mib(process: subprocess.Popen[Any]) -> float:
    """The most memory that a process and its children have at a time, until it ends, in MiB.

    A page that several share counts once (PSS).
    """
    most, root = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        pss = 0
        for each in [root, *root.children(recursive=True)]:
            try:
                pss += each.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        most = max(most, pss / 2**20)
        time.sleep(0.2)
    return most
