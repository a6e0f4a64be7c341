"""Metadata → thresholds that keep or remove a given share, counted as they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_nsfw.use.report import NUM_BINS, LabelCounts, ScoreCounts
from spark_nsfw.use.thresholds import (
    MAX_EXACT_SCORES,
    SHARES_KEPT,
    LabelThreshold,
    fewest_digits_that_keep,
    thresholds_above,
    thresholds_below,
)

__all__ = ["label_threshold", "share_thresholds"]

#: Spark's own measure: quantiles' ranks are off by at most one in so many.
_EXACT, _APPROXIMATE = 1_000_000, 100_000


def share_thresholds(rows: DataFrame, scores: Sequence[ScoreCounts]) -> list[ScoreCounts]:
    """The same with `ScoreCounts.share_thresholds` and `ScoreCounts.num_high`.

    The thresholds come from quantiles; what each keeps is counted.
    """
    quantiles = rows.agg(*(_quantiles(s.column, SHARES_KEPT, s.num_scored) for s in scores))
    # A query for each column: one for all is too large for the JVM to compile, and slower.
    return [
        _with_thresholds(rows, score, values)
        for score, values in zip(scores, quantiles.collect()[0], strict=True)
    ]


def _with_thresholds(rows: DataFrame, score: ScoreCounts, quantiles: list[float]) -> ScoreCounts:
    column = F.col(f"`{score.column}`")
    candidates = [thresholds_above(quantile) for quantile in quantiles]
    counts = [F.count_if(column < F.lit(value)) for values in candidates for value in values]
    is_high = column >= F.lit(score.threshold)
    num_high, *num_kept = rows.agg(F.count_if(is_high), *counts).collect()[0]
    counted = iter(num_kept)
    found = [
        fewest_digits_that_keep(
            wanted, score.num_scored, [(value, next(counted)) for value in values]
        )
        for wanted, values in zip(SHARES_KEPT, candidates, strict=True)
    ]
    return replace(score, num_high=num_high, share_thresholds=found)


def label_threshold(
    rows: DataFrame,
    score: ScoreCounts,
    is_unsafe: Column,
    labels: LabelCounts,
    recall: float,
) -> LabelThreshold | None:
    """The highest threshold that removes this share of the unsafe samples.

    As short as it can be without being lower by half a bin of the charts.

    Args:
        rows: all of an output.
        score: of the column in question.
        is_unsafe: a column of booleans; null where a sample has no label.
        labels: the labelled samples that have a score.
        recall: the share, above 0 and at most 1.

    Returns:
        None if nothing is labelled unsafe.
    """
    num_unsafe, num_safe = int(labels.unsafe.sum()), int(labels.safe.sum())
    if not num_unsafe:
        return None
    # A quantile is the value at or below its rank; the next one may remove enough, too.
    ranks = [1 - recall, min(1.0, 1 - recall + 1 / num_unsafe)]
    unsafe = rows.where(is_unsafe)
    found = unsafe.agg(_quantiles(score.column, ranks, num_unsafe)).collect()[0][0]
    slack = (score.high - score.low) / NUM_BINS / 2
    values = [next(v for v in thresholds_below(q) if v >= q - slack) for q in (score.low, *found)]
    removed = F.col(f"`{score.column}`")
    counts = iter(
        rows.agg(
            *(
                F.count_if((removed >= F.lit(value)) & label)
                for value in values
                for label in (is_unsafe, ~is_unsafe)
            )
        ).collect()[0]
    )
    best = None
    for value in values:
        of_unsafe, of_safe = next(counts), next(counts)
        if of_unsafe >= recall * num_unsafe:
            best = LabelThreshold(
                value,
                of_unsafe / num_unsafe,
                of_unsafe / (of_unsafe + of_safe),
                of_safe / max(1, num_safe),
            )
    return best


def _quantiles(column: str, shares: Sequence[float], num_scored: int) -> Column:
    accuracy = _EXACT if num_scored <= MAX_EXACT_SCORES else _APPROXIMATE
    return F.percentile_approx(F.col(f"`{column}`").cast("double"), list(shares), accuracy)
