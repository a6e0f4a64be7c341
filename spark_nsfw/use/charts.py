"""Counts of scores → charts as inline SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from spark_nsfw.use.report import LabelCounts, ReportData, ScoreCounts, images_per_second

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["label_charts", "progress_chart", "score_charts"]

_NUM_BARS = 50

_INK, _MUTED, _ACCENT, _WARM = "#1d2733", "#6b7785", "#2f6fde", "#d9542b"


def score_charts(data: ScoreCounts) -> list[tuple[str, str]]:
    """Title and SVG of the charts about one score column."""
    bars = data.counts.reshape(_NUM_BARS, -1).sum(axis=1)
    ends = np.linspace(data.low, data.high, _NUM_BARS + 1)

    def histogram(axes: Axes) -> None:
        axes.bar(ends[:-1], bars, np.diff(ends), align="edge", color=_ACCENT)
        axes.axvline(data.threshold, color=_WARM, linewidth=1.2)
        axes.set_xlabel(data.column)
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


def label_charts(data: ReportData, labels: LabelCounts) -> list[tuple[str, str]]:
    """Title and SVG of the charts that need labels."""
    edges = data.score.edges

    def by_threshold(axes: Axes) -> None:
        axes.plot(edges, labels.recall, color=_ACCENT, label="recall")
        axes.plot(edges, labels.precision, color=_WARM, label="precision")
        if data.wanted is not None:
            axes.axvline(data.wanted.value, color=_MUTED, linewidth=1, linestyle=":")
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


def progress_chart(data: ReportData) -> str | None:
    """SVG of the rows written over time; None where the files' times do not tell."""
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
