"""What a run tells while it goes on: a line for people, or JSON for machines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Literal

from pyspark import SparkContext
from pyspark.sql import SparkSession

from spark_nsfw.schema import Status
from spark_nsfw.use.summary import counted

__all__ = ["Progress", "ProgressStyle"]

ProgressStyle = Literal["auto", "lines", "json"]

#: Seconds between two looks at a wave under way.
_REFRESH_SECONDS = 1.0


class Progress:
    """Counts what the waves wrote, and tells.

    Args:
        style: ``lines`` tells a line per wave, ``json`` a JSON object per wave; ``auto`` is
            ``lines``, and on a terminal keeps a line about the wave under way below them.
        report: is given the lines; by default they go to stderr.
    """

    def __init__(
        self,
        style: ProgressStyle = "auto",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.units: set[str] = set()
        self.done: set[str] = set()
        self.num_new_units = 0
        self.num_waves = 0
        self.num_by_status: Counter[str] = Counter()
        self._style = style
        self._report = report
        self._live = style == "auto" and report is None and sys.stderr.isatty()
        self._started = time.monotonic()
        self._finished = threading.Event()

    @property
    def num_images(self) -> int:
        """Images scored."""
        return self.num_by_status[Status.OK.value]

    @property
    def num_failed(self) -> int:
        """Samples of another status."""
        samples = (n for s, n in self.num_by_status.items() if not Status(s).is_shard_level)
        return sum(samples) - self.num_images

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    def know(self, units: Iterable[str]) -> None:
        """Count units."""
        self.units.update(units)

    def forget(self, units: Iterable[str]) -> None:
        """Count no units that are gone."""
        self.units.difference_update(units)
        self.done &= self.units

    def add(self, units: Sequence[str], num_by_status: Counter[str]) -> None:
        """Count a wave that is written, and tell."""
        self.num_waves += 1
        self.num_new_units += len(units)
        self.done.update(units)
        self.num_by_status += num_by_status
        if self._style == "json":
            self.say(json.dumps(self._record(len(units), num_by_status)))
        else:
            self.say(f"wave {self.num_waves}: {self._sentence()}")

    def say(self, line: str) -> None:
        """Tell one line."""
        if self._report is not None:
            self._report(line)
        else:
            clear = "\r\x1b[K" if self._live else ""
            print(f"{clear}{line}", file=sys.stderr, flush=True)

    def _sentence(self) -> str:
        left = ""
        num_left = len(self.units) - len(self.done)
        if self.num_new_units and num_left:
            seconds = num_left * self.seconds / self.num_new_units
            left = f", {timedelta(seconds=round(seconds))} left"
        return (
            f"{len(self.done):,} of {len(self.units):,} shards done; this run: "
            f"{counted(self.num_images, 'image')} scored, "
            f"{counted(self.num_failed, 'sample')} failed, "
            f"{self.num_images / self.seconds:,.1f} images/s{left}"
        )

    def _record(self, num_units: int, num_by_status: Counter[str]) -> dict[str, Any]:
        return {
            "wave": self.num_waves,
            "wave_shards": num_units,
            "wave_rows_by_status": dict(num_by_status),
            "num_shards": len(self.units),
            "num_shards_done": len(self.done),
            "num_images": self.num_images,
            "num_failed": self.num_failed,
            "seconds": round(self.seconds, 3),
        }

    def watch(self, spark: SparkSession) -> None:
        """Keep a line about the wave under way on the terminal, until `finish`."""
        context = getattr(spark, "_sc", None)
        if self._live and context is not None:
            threading.Thread(target=self._refresh, args=(context,), daemon=True).start()

    def _refresh(self, context: SparkContext) -> None:
        tracker = context.statusTracker()
        while not self._finished.wait(_REFRESH_SECONDS):
            stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
            tasks = [(s.numCompletedTasks, s.numTasks) for s in stages if s is not None]
            done, total = (sum(column) for column in zip(*tasks, strict=True)) if tasks else (0, 0)
            wave = f" | wave {self.num_waves + 1}: {done:,} of {total:,} tasks" if total else ""
            print(f"\r\x1b[K{self._sentence()}{wave}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Take the live line away."""
        self._finished.set()
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
