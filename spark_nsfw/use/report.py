"""Counts of scores → one page that helps to choose a threshold.

The page is self-contained: charts are inline SVG, thumbnails data URLs, and there is
no script. A sample is removed where its score is at least the threshold, and kept
below it, as ``--where "nsfw_score < 0.5"`` does.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spark_nsfw.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NUM_BINS", "LabelCounts", "ReportData", "ShardCounts", "Thumbnail", "render"]

#: Bins of the score's range: thresholds are told to this share of it.
NUM_BINS = 10_000

#: Bars of a histogram, and bands of the contact sheet.
_NUM_BARS, NUM_BANDS = 50, 10

#: Standard deviations from what chance alone would give, from which on a shard stands out.
_OUTLIER_DEVIATIONS = 4.0
_MAX_OUTLIERS = 10

_INK, _MUTED, _ACCENT, _WARM = "#1d2733", "#6b7785", "#2f6fde", "#d9542b"


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
class ReportData:
    """What the page tells.

    Attributes:
        source: where the metadata is.
        score_column: which score it is about.
        low, high: the range of the bins.
        counts: int64 (NUM_BINS,), scored samples by bin.
        num_by_status: rows by status.
        shards: one entry each.
        notes: what made the rows; more than one where an output is a mixture.
        threshold: the one that shards are compared at, and that the charts mark.
        labels: of a column that says which samples are unsafe.
        wanted_recall: for which a threshold is looked for.
        thumbnails: samples around each score band.
    """

    source: str
    score_column: str
    low: float
    high: float
    counts: npt.NDArray[np.int64]
    num_by_status: dict[str, int]
    shards: Sequence[ShardCounts]
    notes: Sequence[dict[str, Any]] = ()
    threshold: float = 0.5
    labels: LabelCounts | None = None
    wanted_recall: float = 0.95
    thumbnails: Sequence[Thumbnail] = field(default_factory=tuple)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The thresholds that bins start at, and the end of the last: (NUM_BINS + 1,)."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def share_kept(self) -> npt.NDArray[np.float64]:
        """Share of the scored samples below each of `edges`."""
        return 1 - _from_above(self.counts) / max(1, int(self.counts.sum()))

    def threshold_for(self, recall: float) -> float | None:
        """The highest threshold that still removes this share of the unsafe samples."""
        if self.labels is None or not self.labels.unsafe.any():
            return None
        return float(self.edges[np.flatnonzero(self.labels.recall >= recall)[-1]])

    def at(self, threshold: float) -> int:
        """The position in `edges` that is closest to a threshold."""
        return int(np.abs(self.edges - threshold).argmin())


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


def render(data: ReportData) -> str:
    """The page, as HTML.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise InputError(f"the report needs {exc.name}: pip install 'spark-nsfw[report]'") from exc
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nsfw.use"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    wanted = data.threshold_for(data.wanted_recall)
    steps = np.linspace(data.low, data.high, 11)[1:-1]
    total = int(data.counts.sum())
    page = environment.get_template("report.html.jinja").render(
        data=data,
        num_scored=total,
        num_rows=sum(data.num_by_status.values()),
        statuses=sorted(data.num_by_status.items(), key=lambda item: -item[1]),
        kept=[
            (step, data.share_kept[data.at(step)], round(total * data.share_kept[data.at(step)]))
            for step in steps
        ],
        kept_at_threshold=float(data.share_kept[data.at(data.threshold)]),
        charts=_charts(data),
        label_charts=[] if data.labels is None else _label_charts(data, data.labels),
        wanted_threshold=wanted,
        wanted_position=None if wanted is None else data.at(wanted),
        high_outliers=outliers(data.shards, "num_high"),
        failed_outliers=outliers(data.shards, "num_failed"),
        images_per_second=images_per_second(data.shards),
        progress=_progress_chart(data),
        bands=_bands(data),
        notes=[json.dumps(note, indent=2, sort_keys=True) for note in data.notes],
        mixed=len(data.notes) > 1,
    )
    return str(page)


def _bands(data: ReportData) -> list[tuple[float, float, list[tuple[Thumbnail, str | None]]]]:
    """Score bands from low to high: their ends, and their thumbnails as data URLs."""
    inside: list[list[tuple[Thumbnail, str | None]]] = [[] for _ in range(NUM_BANDS)]
    for thumbnail in data.thumbnails:
        position = int((thumbnail.score - data.low) / (data.high - data.low) * NUM_BANDS)
        inside[min(position, NUM_BANDS - 1)].append((thumbnail, _data_url(thumbnail.jpeg)))
    ends = pairwise(np.linspace(data.low, data.high, NUM_BANDS + 1).tolist())
    return [(*both, some) for both, some in zip(ends, inside, strict=True) if some]


def _data_url(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _charts(data: ReportData) -> list[tuple[str, str]]:
    """Title and SVG of the charts about all scores."""
    bars = data.counts.reshape(_NUM_BARS, -1).sum(axis=1)
    ends = np.linspace(data.low, data.high, _NUM_BARS + 1)
    column = data.score_column

    def histogram(axes: Axes) -> None:
        axes.bar(ends[:-1], bars, np.diff(ends), align="edge", color=_ACCENT)
        axes.axvline(data.threshold, color=_WARM, linewidth=1.2)
        axes.set_xlabel(column)
        axes.set_ylabel("samples")

    def log_histogram(axes: Axes) -> None:
        histogram(axes)
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.7)

    def kept(axes: Axes) -> None:
        axes.plot(data.edges, 100 * data.share_kept, color=_ACCENT)
        axes.axvline(data.threshold, color=_WARM, linewidth=1.2)
        axes.set_xlabel("threshold")
        axes.set_ylabel("kept, %")
        axes.set_ylim(0, 103)

    return [
        ("Scores", _svg(histogram)),
        ("Scores, counts on a log scale", _svg(log_histogram)),
        ("Share kept by threshold", _svg(kept)),
    ]


def _label_charts(data: ReportData, labels: LabelCounts) -> list[tuple[str, str]]:
    """Title and SVG of the charts that need labels."""
    wanted = data.threshold_for(data.wanted_recall)

    def by_threshold(axes: Axes) -> None:
        axes.plot(data.edges, labels.recall, color=_ACCENT, label="recall")
        axes.plot(data.edges, labels.precision, color=_WARM, label="precision")
        if wanted is not None:
            axes.axvline(wanted, color=_MUTED, linewidth=1, linestyle=":")
        axes.set_xlabel("threshold")
        axes.set_ylim(0, 1.03)
        axes.legend(frameon=False)

    def roc(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=":")
        axes.plot(labels.false_positive_rate, labels.recall, color=_ACCENT)
        axes.set_xlabel("safe samples removed, share")
        axes.set_ylabel("unsafe samples removed, share")

    return [
        ("Precision and recall by threshold", _svg(by_threshold)),
        (f"ROC, area {labels.area_under_roc:.4f}", _svg(roc)),
    ]


def _progress_chart(data: ReportData) -> str | None:
    written = sorted((s.written, s.num_rows) for s in data.shards if s.written is not None)
    if images_per_second(data.shards) is None:
        return None
    seconds = np.array([moment for moment, _ in written]) - written[0][0]
    rows = np.cumsum([count for _, count in written])

    def progress(axes: Axes) -> None:
        unit, name = (3600, "hours") if seconds[-1] > 7200 else (60, "minutes")
        axes.step(seconds / unit, rows, where="post", color=_ACCENT)
        axes.set_xlabel(f"{name} since the first file")
        axes.set_ylabel("rows written")
        axes.set_ylim(bottom=0)

    return _svg(progress)


def _svg(draw: Any) -> str:
    """One chart as inline SVG, its text as text."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "spark_nsfw",  # the same data gives the same page
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": "#c6ced8",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#eef1f5",
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
