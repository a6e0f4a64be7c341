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
from spark_nsfw.files import file_info, write_text
from spark_nsfw.storage import is_below, open_input, resolve
from spark_nsfw.use.agreement import Agreement, ContestedSample
from spark_nsfw.use.charts import label_charts, progress_chart, score_charts
from spark_nsfw.use.provenance import detector_words, random_words, tower_words
from spark_nsfw.use.report import (
    NUM_BANDS,
    ReportData,
    ScoreCounts,
    Thumbnail,
    images_per_second,
    outliers,
)
from spark_nsfw.use.thresholds import MAX_EXACT_SCORES, significant

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
            raise InputError(f"{url} is in the input {place}: write the report elsewhere")
    filesystem, path = resolve(url)
    info = file_info(url)
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
    import markupsafe  # jinja2 is built on it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nsfw.use"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "significant": significant,
        "share": _share,
        # Where a narrow table may break a column's name.
        "name": lambda name: markupsafe.escape(name).replace("_", markupsafe.Markup("_<wbr>")),
    }
    columns = [score.column for score in (data.score, *data.others)]
    scored = data.score.num_scored
    page = environment.get_template("report.html.jinja").render(
        mark=_MARK,
        data=data,
        random=random_words(data.notes),
        detectors=[(column, detector_words(data.notes, column)) for column in columns],
        towers=tower_words(data.notes),
        num_rows=sum(data.num_by_status.values()),
        statuses=sorted(data.num_by_status.items(), key=lambda item: -item[1]),
        kept_at_threshold=(scored - data.score.num_high) / max(1, scored),
        distributions=[
            (score, score_charts(score), _round_thresholds(score))
            for score in (data.score, *data.others)
        ],
        label_charts=[] if data.labels is None else label_charts(data, data.labels),
        high_outliers=outliers(data.shards, "num_high"),
        failed_outliers=outliers(data.shards, "num_failed"),
        images_per_second=images_per_second(data.shards),
        progress=progress_chart(data),
        bands=_bands(data),
        contested=_contested(data.agreement),
        threshold_of={s.column: s.threshold for s in (data.score, *data.others)},
        max_exact=MAX_EXACT_SCORES,
        notes=[json.dumps(note, indent=2, sort_keys=True) for note in data.notes],
        mixed=len(data.notes) > 1,
    )
    return str(page)


def _share(share: float) -> str:
    """A share in per cent; never 0 or 100 where it is only close to it."""
    text = f"{share:.2%}"
    if text == "100.00%" and share < 1:
        return "> 99.99%"
    return "< 0.01%" if text == "0.00%" and share > 0 else text


def _round_thresholds(score: ScoreCounts) -> list[tuple[float, float, int]]:
    """Nine thresholds at equal steps, the share that each keeps, and how many images."""
    found = []
    for step in np.linspace(score.low, score.high, 11)[1:-1].tolist():
        share = float(score.share_kept[score.at(step)])
        found.append((round(step, 9), share, round(score.num_scored * share)))
    return found


def _bands(data: ReportData) -> list[tuple[float, float, list[tuple[Thumbnail, str | None]]]]:
    """Score bands from low to high: their ends, and their thumbnails as data URLs."""
    low, high = data.score.low, data.score.high
    inside: list[list[tuple[Thumbnail, str | None]]] = [[] for _ in range(NUM_BANDS)]
    for thumbnail in data.thumbnails:
        position = int((thumbnail.score - low) / (high - low) * NUM_BANDS)
        inside[min(position, NUM_BANDS - 1)].append((thumbnail, _data_url(thumbnail.jpeg)))
    ends = pairwise(np.linspace(low, high, NUM_BANDS + 1).tolist())
    return [(*both, some) for both, some in zip(ends, inside, strict=True) if some]


def _contested(agreement: Agreement | None) -> list[list[tuple[ContestedSample, str | None]]]:
    """The samples that columns rank most differently, if there are images of any."""
    groups = [] if agreement is None else agreement.contested
    if not any(sample.jpeg for group in groups for sample in group):
        return []
    return [[(sample, _data_url(sample.jpeg)) for sample in group] for group in groups]


def _data_url(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
