"""Ctrl-C and SIGTERM → an orderly stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stop_at_signals"]


@contextmanager
def stop_at_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one ends the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    stopped_at = 0.0

    def handle(number: int, _: object) -> None:
        nonlocal stopped_at
        now = time.monotonic()
        if stop.is_set() and now - stopped_at < 1:
            return  # one signal that came both to the process and to its group
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stopped_at = now
        print("spark-nsfw: stopping; press again to end at once", file=sys.stderr, flush=True)
        stop.set()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
