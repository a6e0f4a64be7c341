"""What a report tells: counts of scores, and what follows from them.

A sample is removed where its score is at least the threshold, and kept below it, as
``--where "nsfw_score < 0.5"`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from spark_nsfw.use.agreement import Agreement
from spark_nsfw.use.thresholds import LabelThreshold, ShareThreshold

__all__ = [
    "NUM_BANDS",
    "NUM_BINS",
    "LabelCounts",
    "ReportData",
    "ScoreCounts",
    "ShardCounts",
    "Thumbnail",
    "images_per_second",
    "outliers",
]

#: Bins of the score's range: charts are accurate to 1/NUM_BINS of it.
NUM_BINS = 10_000

#: Score bands of the contact sheet.
NUM_BANDS = 10

#: A shard stands out from this many standard deviations of what chance alone would give.
_OUTLIER_DEVIATIONS = 4.0
_MAX_OUTLIERS = 10


@dataclass(frozen=True)
class ShardCounts:
    """What one shard holds.

    Attributes:
        shard: its name.
        num_rows: of all kinds.
        num_failed: whose status is not ``ok``.
        num_high: whose score is at least the threshold.
        written: when its file was written, in seconds since 1970; None if unknown.
    """

    shard: str
    num_rows: int
    num_failed: int
    num_high: int
    written: float | None = None


@dataclass(frozen=True)
class Thumbnail:
    """One image of the contact sheet; ``jpeg`` is None where it could not be read."""

    shard: str
    key: str
    score: float
    jpeg: bytes | None


@dataclass(frozen=True)
class LabelCounts:
    """Labelled samples by bin of their score: int64 (NUM_BINS,) each."""

    column: str
    unsafe: npt.NDArray[np.int64]
    safe: npt.NDArray[np.int64]

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Share of the unsafe that is removed, by threshold: (NUM_BINS + 1,), falling."""
        return _from_above(self.unsafe) / max(1, int(self.unsafe.sum()))

    @property
    def false_positive_rate(self) -> npt.NDArray[np.float64]:
        """Share of the safe that is removed, by threshold: (NUM_BINS + 1,), falling."""
        return _from_above(self.safe) / max(1, int(self.safe.sum()))

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Share of the removed that is unsafe, by threshold; NaN where nothing is removed."""
        unsafe, removed = _from_above(self.unsafe), _from_above(self.unsafe + self.safe)
        with np.errstate(invalid="ignore"):
            return unsafe / removed

    @property
    def area_under_roc(self) -> float:
        """The chance that an unsafe sample scores higher than a safe one."""
        heights = (self.recall[:-1] + self.recall[1:]) / 2
        return float((heights * -np.diff(self.false_positive_rate)).sum())


@dataclass(frozen=True)
class ScoreCounts:
    """The distribution of one score column.

    Attributes:
        column: its name.
        low, high: the range of the bins.
        counts: int64 (NUM_BINS,), scored samples by bin.
        threshold: the one that the charts mark and that decisions are compared at.
        num_high: scores that are at least the threshold.
        share_thresholds: those that keep certain shares of the images.
    """

    column: str
    low: float
    high: float
    counts: npt.NDArray[np.int64]
    threshold: float
    num_high: int
    share_thresholds: Sequence[ShareThreshold] = ()

    @property
    def num_scored(self) -> int:
        """Samples with a score."""
        return int(self.counts.sum())

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The thresholds that bins start at, and the end of the last: (NUM_BINS + 1,)."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def share_kept(self) -> npt.NDArray[np.float64]:
        """Share of the scored samples below each of `edges`."""
        return 1 - _from_above(self.counts) / max(1, self.num_scored)

    def at(self, threshold: float) -> int:
        """The position in `edges` that is closest to a threshold."""
        return int(np.abs(self.edges - threshold).argmin())


@dataclass(frozen=True)
class ReportData:
    """What the page tells.

    Attributes:
        source: where the metadata is.
        score: of the column that the report is about.
        num_by_status: rows by status.
        shards: one entry each.
        others: the other score columns.
        notes: what made the rows; more than one where an output is a mixture.
        labels: of a column that says which samples are unsafe.
        wanted_recall: for which a threshold is looked for.
        wanted: that threshold; None without labels, or if nothing is labelled unsafe.
        thumbnails: samples around each score band.
        agreement: of the score columns; None where there is one.
    """

    source: str
    score: ScoreCounts
    num_by_status: dict[str, int]
    shards: Sequence[ShardCounts]
    others: Sequence[ScoreCounts] = ()
    notes: Sequence[dict[str, Any]] = ()
    labels: LabelCounts | None = None
    wanted_recall: float = 0.95
    wanted: LabelThreshold | None = None
    thumbnails: Sequence[Thumbnail] = field(default_factory=tuple)
    agreement: Agreement | None = None


def _from_above(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Samples at or above the start of each bin, and above the last: (B,) → (B + 1,)."""
    return np.append(counts[::-1].cumsum()[::-1], 0)


def outliers(
    shards: Sequence[ShardCounts], count_of: str
) -> list[tuple[ShardCounts, float, float]]:
    """Shards with more or fewer of something than chance alone would give.

    Args:
        shards: all of them.
        count_of: ``num_failed`` or ``num_high``.

    Returns:
        Shard, its share, and how many standard deviations of a binomial distribution it is
        from the share of all; those furthest off first.
    """
    total = sum(shard.num_rows for shard in shards)
    share = sum(getattr(shard, count_of) for shard in shards) / max(1, total)
    found = []
    for shard in shards:
        deviation = (shard.num_rows * share * (1 - share)) ** 0.5
        if deviation:
            count = getattr(shard, count_of)
            distance = (count - shard.num_rows * share) / deviation
            if abs(distance) > _OUTLIER_DEVIATIONS:
                found.append((shard, count / shard.num_rows, distance))
    return sorted(found, key=lambda entry: -abs(entry[2]))[:_MAX_OUTLIERS]


def images_per_second(shards: Sequence[ShardCounts]) -> float | None:
    """Rows written between the first and the last file, by the files' times.

    Rows of the first moment are not counted: when work on them began is not known.
    """
    times = [shard.written for shard in shards if shard.written is not None]
    if not times or max(times) - min(times) < 1:
        return None
    first = min(times)
    rows = sum(s.num_rows for s in shards if s.written is not None and s.written > first)
    return rows / (max(times) - first)
