"""Report data → one HTML page that helps to choose a threshold.

The page is self-contained: charts are inline SVG, thumbnails data URLs, and there is no
script.
"""

from __future__ import annotations

import base64
import json
import posixpath
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pyarrow import fs

from spark_nsfw.errors import InputError
from spark_nsfw.files import write_text
from spark_nsfw.storage import is_below, open_input, resolve
from spark_nsfw.use.charts import label_charts, progress_chart, score_charts
from spark_nsfw.use.report import NUM_BANDS, ReportData, Thumbnail, images_per_second, outliers

__all__ = ["refuse_missing_libraries", "refuse_page_file", "render", "write_page"]

#: By this a page is known as ours, and may be replaced by a newer one.
_MARK = '<meta name="generator" content="spark_nsfw report">'
_HEAD_BYTES = 1024


def refuse_page_file(url: str, places: Sequence[str]) -> None:
    """Refuse a path or URL at which no page may be written.

    Args:
        url: where the page would be.
        places: what the page is about: paths or URLs of the metadata and of shards.

    Raises:
        InputError: there is a file that is no report, or a directory; its directory is
            missing; or it is below one of the places.
        OSError: it cannot be looked at now.
    """
    for place in places:
        if is_below(url, place):
            raise InputError(f"{url} is in {place}, which is read: write the report elsewhere")
    filesystem, path = resolve(url)
    info = filesystem.get_file_info(path)
    if info.type is fs.FileType.NotFound:
        directory = posixpath.dirname(path)
        local = isinstance(filesystem, fs.LocalFileSystem)  # others have no directories to lack
        if local and filesystem.get_file_info(directory).type is not fs.FileType.Directory:
            raise InputError(f"{url}: there is no directory {directory}; create it first")
        return
    if info.type is not fs.FileType.File:
        raise InputError(f"{url} is not a file: give the name of an HTML file")
    with open_input(url) as stream:
        if _MARK.encode() not in stream.read(_HEAD_BYTES):
            raise InputError(f"{url} is there and is no report: write the report elsewhere")


def write_page(url: str, data: ReportData) -> None:
    """Write the page, in UTF-8, in place of an older one.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
        StorageError: it cannot be written now. What was there before is unchanged.
    """
    write_text(url, render(data))


def refuse_missing_libraries() -> None:
    """Refuse to begin a report without the libraries that draw it.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise InputError(f"the report needs {exc.name}: pip install 'spark-nsfw[report]'") from exc


def render(data: ReportData) -> str:
    """The page, as HTML.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    refuse_missing_libraries()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nsfw.use"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    wanted = data.threshold_for(data.wanted_recall)
    steps = np.linspace(data.low, data.high, 11)[1:-1]
    total = int(data.counts.sum())
    page = environment.get_template("report.html.jinja").render(
        mark=_MARK,
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
