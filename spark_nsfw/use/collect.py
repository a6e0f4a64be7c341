"""Metadata → what the report shows, whatever counts its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Protocol, TypeVar
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pandas as pd

from spark_nsfw.errors import InputError
from spark_nsfw.files import iter_files
from spark_nsfw.schema import KEY, SHARD, STATUS
from spark_nsfw.use.agreement import (
    MAX_RANKED,
    Agreement,
    ContestedSample,
    Decisions,
    most_contested,
    rank_correlations,
)
from spark_nsfw.use.report import (
    NUM_BINS,
    LabelCounts,
    ReportData,
    ScoreCounts,
    ShardCounts,
    Thumbnail,
)
from spark_nsfw.use.thresholds import (
    SHARES_KEPT,
    LabelThreshold,
    fewest_digits_that_keep,
    thresholds_above,
    thresholds_below,
)

__all__ = ["DEFAULT_SCORE", "ReportRows", "collect", "samples_shown", "with_images"]

_Sample = TypeVar("_Sample", Thumbnail, ContestedSample)

_SAMPLES_PER_BAND = 8
_SAMPLES_PER_GROUP = 8

#: The column that a report is about where nobody says.
DEFAULT_SCORE = "nsfw_score"

#: Columns that a run makes beside the scores.
_NOT_SCORES = frozenset({"embedding_norm"})


class ReportRows(Protocol):
    """The rows of an output, counted.

    Scores count as float64. A label is true for an unsafe sample, false for a safe one, and
    null for one of which neither is known.
    """

    @property
    def columns(self) -> Sequence[str]:
        """Names of all columns."""

    @property
    def noted_fractions(self) -> Sequence[str]:
        """Columns of fractions that carry a note on what made them."""

    def ends(self, column: str) -> tuple[float, float] | None:
        """The least and the most score; None if there is none."""

    def bins(
        self, column: str, low: float, high: float, label: str | None
    ) -> dict[bool | None, npt.NDArray[np.int64]]:
        """Scores by label and bin, (`NUM_BINS`,) each; all under None without a label."""

    def quantiles(
        self, column: str, shares: Sequence[float], num_scored: int, unsafe: str | None = None
    ) -> list[float]:
        """The least scores that such shares of them do not exceed.

        Args:
            column: of the scores.
            shares: above 0 and at most 1.
            num_scored: how many there are.
            unsafe: a label, to count only samples that are unsafe.
        """

    def num_below(self, column: str, thresholds: Sequence[float]) -> list[int]:
        """Scores below each threshold."""

    def num_removed(
        self, column: str, thresholds: Sequence[float], label: str
    ) -> list[tuple[int, int]]:
        """Unsafe and safe samples at or above each threshold."""

    def num_by_status(self) -> dict[str, int]:
        """Rows by status."""

    def shards(self, column: str, threshold: float) -> list[ShardCounts]:
        """One entry each, by name; when they were written is not known."""

    def band_samples(self, column: str, low: float, high: float, number: int) -> list[Thumbnail]:
        """Up to ``number`` samples of every score band, by score, the same ones every time."""

    def locations(
        self, samples: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[int, int]]:
        """Where the images of samples begin in their shards, and their bytes.

        Args:
            samples: shard and key of each.

        Returns:
            Those that are known, by shard and key.
        """

    def decisions(self, first: tuple[str, float], second: tuple[str, float]) -> Decisions:
        """How two columns decide at a threshold each."""

    def with_all(self, columns: Sequence[str], max_rows: int) -> tuple[int, pd.DataFrame]:
        """How many samples have every score, and their shard, key and scores.

        Of more than ``max_rows`` a sample of about that size, the same every time.
        """


def collect(
    rows: ReportRows,
    metadata: str,
    notes: Sequence[str] = (),
    *,
    score_column: str | None = None,
    threshold: float | None = None,
    other_thresholds: Mapping[str, float] | None = None,
    label_column: str | None = None,
    wanted_recall: float = 0.95,
    with_samples: bool = False,
) -> ReportData:
    """Count what `spark_nsfw.use.page.render` shows; its samples have no images yet.

    Args:
        rows: of an output of ``spark-nsfw score`` or ``classify``.
        metadata: where it is.
        notes: what made it, as `spark_nsfw.note.inspect_output` tells.
        score_column: which score it is about; None takes ``nsfw_score`` where there is one,
            else the first score.
        threshold: at which shards are compared; None takes the middle of the range.
        other_thresholds: those of other score columns, by column; the middle of the range
            where none is given.
        label_column: of booleans, or of numbers that are 1 where a sample is unsafe.
        wanted_recall: share of the unsafe samples that is to be removed.
        with_samples: of every score band.

    Raises:
        InputError: a column is not there, or nothing has a score.
    """
    if not 0 < wanted_recall <= 1:
        raise InputError(f"--recall (wanted_recall) is above 0 and at most 1, not {wanted_recall}")
    columns = _score_columns(rows, score_column, metadata)
    for name in (SHARD, STATUS, KEY, *([label_column] if label_column else [])):
        if name not in rows.columns:
            option = " for --label-column (label_column)" if name == label_column else ""
            there = ", ".join(rows.columns)
            raise InputError(f"{metadata} has no column {name!r}{option}; there are {there}")
    thresholds = dict(other_thresholds or {})
    for name in thresholds.keys() - set(columns):
        raise InputError(
            f"--threshold {name}=…: {metadata} has no score column {name!r}, "
            f"only {', '.join(columns)}"
        )
    if threshold is not None:
        thresholds[columns[0]] = threshold
    ends = {column: rows.ends(column) for column in columns}
    if ends[columns[0]] is None:
        raise InputError(f"{metadata}: nothing has a score")
    label_of = {columns[0]: label_column}
    distributions = [
        _distribution(rows, column, _range(*of_it), thresholds, label_of.get(column))
        for column, of_it in ends.items()
        if of_it is not None
    ]
    main, labels = distributions[0]
    others = [score for score, _ in distributions[1:]]
    written = _times_written(metadata)
    return ReportData(
        source=metadata,
        score=main,
        num_by_status=rows.num_by_status(),
        shards=[
            replace(shard, written=written.get(shard.shard))
            for shard in rows.shards(main.column, main.threshold)
        ],
        others=others,
        notes=[json.loads(note) for note in notes if note.startswith("{")],
        labels=labels,
        wanted_recall=wanted_recall,
        wanted=None if labels is None else _label_threshold(rows, main, labels, wanted_recall),
        thumbnails=(
            rows.band_samples(main.column, main.low, main.high, _SAMPLES_PER_BAND)
            if with_samples
            else ()
        ),
        agreement=_agreement(rows, [main, *others]) if others else None,
    )


def _score_columns(rows: ReportRows, main: str | None, metadata: str) -> list[str]:
    """The columns that hold scores, the main one first."""
    found = [name for name in rows.noted_fractions if name not in _NOT_SCORES]
    if main is None and (DEFAULT_SCORE in rows.columns or not found):
        main = DEFAULT_SCORE
    elif main is None:
        main = found[0]
    if main not in rows.columns:
        raise InputError(
            f"{metadata} has no column {main!r}; there are {', '.join(rows.columns)}. Name the one "
            "with the scores with --score-column (score_column)"
        )
    return [main, *(name for name in found if name != main)]


def _distribution(
    rows: ReportRows,
    column: str,
    bounds: tuple[float, float],
    thresholds: Mapping[str, float],
    label: str | None,
) -> tuple[ScoreCounts, LabelCounts | None]:
    """A column's scores, and those among unsafe and safe samples."""
    low, high = bounds
    none = np.zeros(NUM_BINS, np.int64)
    counts = rows.bins(column, low, high, label)
    threshold = thresholds.get(column, (low + high) / 2)
    score = ScoreCounts(column, low, high, sum(counts.values(), none), threshold, 0)
    quantiles = rows.quantiles(column, SHARES_KEPT, score.num_scored)
    candidates = [thresholds_above(quantile) for quantile in quantiles]
    num_kept, *counted = rows.num_below(
        column, [threshold, *(value for values in candidates for value in values)]
    )
    each = iter(counted)
    found = [
        fewest_digits_that_keep(wanted, score.num_scored, [(value, next(each)) for value in values])
        for wanted, values in zip(SHARES_KEPT, candidates, strict=True)
    ]
    score = replace(score, num_high=score.num_scored - num_kept, share_thresholds=found)
    if label is None:
        return score, None
    return score, LabelCounts(label, counts.get(True, none), counts.get(False, none))


def _range(least: float, most: float) -> tuple[float, float]:
    """0 to 1 where all scores are, else whole numbers around them."""
    if least >= 0 and most <= 1:
        return 0.0, 1.0
    return float(np.floor(least)), float(np.floor(most) + 1)


def _label_threshold(
    rows: ReportRows, score: ScoreCounts, labels: LabelCounts, recall: float
) -> LabelThreshold | None:
    """The highest threshold that removes this share of the unsafe samples.

    As short as it can be without being lower by half a bin of the charts. None if nothing is
    labelled unsafe.
    """
    num_unsafe, num_safe = int(labels.unsafe.sum()), int(labels.safe.sum())
    if not num_unsafe:
        return None
    # A quantile is the value at or below its rank; the next one may remove enough, too.
    ranks = [1 - recall, min(1.0, 1 - recall + 1 / num_unsafe)]
    found = rows.quantiles(score.column, ranks, num_unsafe, unsafe=labels.column)
    slack = (score.high - score.low) / NUM_BINS / 2
    values = [next(v for v in thresholds_below(q) if v >= q - slack) for q in (score.low, *found)]
    best = None
    removed = rows.num_removed(score.column, values, labels.column)
    for value, (of_unsafe, of_safe) in zip(values, removed, strict=True):
        if of_unsafe >= recall * num_unsafe:
            best = LabelThreshold(
                value,
                of_unsafe / num_unsafe,
                of_unsafe / (of_unsafe + of_safe),
                of_safe / max(1, num_safe),
            )
    return best


def _agreement(rows: ReportRows, scores: Sequence[ScoreCounts]) -> Agreement | None:
    """Decisions are compared for all images, ranks for up to `MAX_RANKED`.

    None if no image has every score.
    """
    columns = [score.column for score in scores]
    num_images, ranked = rows.with_all(columns, MAX_RANKED)
    if not num_images:
        return None
    ranked = ranked.sort_values([SHARD, KEY], ignore_index=True)
    return Agreement(
        columns=columns,
        correlations=rank_correlations(ranked, columns),
        num_ranked=len(ranked),
        num_images=num_images,
        decisions=[
            rows.decisions((one.column, one.threshold), (other.column, other.threshold))
            for one, other in combinations(scores, 2)
        ],
        contested=most_contested(ranked, columns, _SAMPLES_PER_GROUP),
    )


def _times_written(metadata: str) -> dict[str, float]:
    """When the last file of each shard was written, in Unix seconds."""
    written: dict[str, float] = {}
    for entry in iter_files(metadata):
        partition, _, name = entry.name.rpartition("/")
        if (
            name.endswith(".parquet")
            and partition.startswith(f"{SHARD}=")
            and entry.modified_seconds
        ):
            shard = unquote(partition.removeprefix(f"{SHARD}="))
            written[shard] = max(written.get(shard, 0.0), entry.modified_seconds)
    return written


def samples_shown(data: ReportData) -> list[tuple[str, str]]:
    """Shard and key of every sample that the page shows."""
    contested = () if data.agreement is None else data.agreement.contested
    shown = [(each.shard, each.key) for each in data.thumbnails]
    shown += [(each.shard, each.key) for group in contested for each in group]
    return list(dict.fromkeys(shown))


def with_images(data: ReportData, jpeg_of: Mapping[tuple[str, str], bytes]) -> ReportData:
    """The same with images of its samples, by shard and key."""
    data = replace(data, thumbnails=_drawn(data.thumbnails, jpeg_of))
    if data.agreement is None:
        return data
    groups = [_drawn(group, jpeg_of) for group in data.agreement.contested]
    return replace(data, agreement=replace(data.agreement, contested=groups))


def _drawn(samples: Sequence[_Sample], jpeg_of: Mapping[tuple[str, str], bytes]) -> list[_Sample]:
    return [replace(each, jpeg=jpeg_of.get((each.shard, each.key))) for each in samples]
