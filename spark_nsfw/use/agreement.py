"""Scores of several detectors → how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from spark_nsfw.schema import KEY, SHARD

__all__ = [
    "MAX_RANKED",
    "Agreement",
    "ContestedSample",
    "Decisions",
    "most_contested",
    "rank_correlations",
]

#: Images whose ranks are compared: all of them up to so many, else a sample of about that size.
MAX_RANKED = 200_000


@dataclass(frozen=True)
class Decisions:
    """How two columns decide about the images that have both scores.

    Attributes:
        first, second: the columns.
        num_images: that have both scores.
        num_only_first: at or above the first column's threshold and below the second's.
        num_only_second: the other way round.
    """

    first: str
    second: str
    num_images: int
    num_only_first: int
    num_only_second: int

    @property
    def share_differing(self) -> float:
        """Share of the images that the two decide differently about."""
        return (self.num_only_first + self.num_only_second) / max(1, self.num_images)


@dataclass(frozen=True)
class ContestedSample:
    """A sample that one column ranks high and another low.

    Attributes:
        shard, key: which it is.
        high_column, low_column: what ranks it high, and what low.
        high_score, low_score: its scores there.
        high_rank, low_rank: shares of the ranked images that it is above.
        jpeg: its thumbnail; None where it could not be read.
    """

    shard: str
    key: str
    high_column: str
    low_column: str
    high_score: float
    low_score: float
    high_rank: float
    low_rank: float
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Agreement:
    """How far the score columns agree.

    Attributes:
        columns: C of them, the main one first.
        correlations: Spearman's rank correlations, float64 (C, C); NaN where a column has
            the same score for all.
        num_ranked: images whose ranks were compared.
        num_images: that have a score in every column; more than were ranked if those are a
            sample.
        decisions: of every two columns.
        contested: groups of samples, those that are ranked most differently first.
    """

    columns: Sequence[str]
    correlations: npt.NDArray[np.float64]
    num_ranked: int
    num_images: int
    decisions: Sequence[Decisions]
    contested: Sequence[Sequence[ContestedSample]] = ()


def rank_correlations(scores: pd.DataFrame, columns: Sequence[str]) -> npt.NDArray[np.float64]:
    """Spearman's rank correlations of columns without gaps, ties at their mean rank: (C, C)."""
    ranks = scores[list(columns)].rank().to_numpy(np.float64)  # (N, C)
    deviations = ranks - ranks.mean(axis=0)
    lengths = np.sqrt((deviations**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = deviations.T @ deviations / np.outer(lengths, lengths)
    clipped: npt.NDArray[np.float64] = np.clip(correlations, -1, 1)
    return clipped


def most_contested(
    scores: pd.DataFrame, columns: Sequence[str], limit: int
) -> list[list[ContestedSample]]:
    """The samples that the first column and each other one rank most differently.

    Args:
        scores: columns shard, key and the scores, without gaps.
        columns: score columns, the main one first.
        limit: samples in a group.

    Returns:
        For each other column two groups: what the main one ranks higher, and what it ranks
        lower. A group without any is left out.
    """
    scores = scores.sort_values([SHARD, KEY], ignore_index=True)
    ranks = (scores[list(columns)].rank() - 1) / max(1, len(scores) - 1)
    pairs = [(columns[0], other) for other in columns[1:]]
    groups = []
    for high, low in (order for pair in pairs for order in (pair, pair[::-1])):
        difference = ranks[high] - ranks[low]
        first = difference[difference > 0].sort_values(ascending=False, kind="stable").index[:limit]
        group = [
            ContestedSample(
                str(scores.at[row, SHARD]),
                str(scores.at[row, KEY]),
                high,
                low,
                float(scores.at[row, high]),
                float(scores.at[row, low]),
                float(ranks.at[row, high]),
                float(ranks.at[row, low]),
            )
            for row in first
        ]
        if group:
            groups.append(group)
    return groups
