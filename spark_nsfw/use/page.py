"""Report data → one HTML page that helps to choose a threshold.

The page is self-contained: charts are inline SVG, thumbnails data URLs, and there is no
script.
"""

from __future__ import annotations

import base64
import json
from itertools import pairwise

import numpy as np

from spark_nsfw.errors import InputError
from spark_nsfw.use.charts import label_charts, progress_chart, score_charts
from spark_nsfw.use.report import NUM_BANDS, ReportData, Thumbnail, images_per_second, outliers

__all__ = ["render"]


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
        charts=score_charts(data),
        label_charts=[] if data.labels is None else label_charts(data, data.labels),
        wanted_threshold=wanted,
        wanted_position=None if wanted is None else data.at(wanted),
        high_outliers=outliers(data.shards, "num_high"),
        failed_outliers=outliers(data.shards, "num_failed"),
        images_per_second=images_per_second(data.shards),
        progress=progress_chart(data),
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
