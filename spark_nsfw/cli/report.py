"""``spark-nsfw report``: metadata → one HTML page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spark_nsfw.cli.arguments import Commands
from spark_nsfw.cli.exit_status import ExitStatus
from spark_nsfw.cli.parser import share

if TYPE_CHECKING:
    from spark_nsfw.read.source import ImageSource
    from spark_nsfw.use.report import ReportData

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="show scores, failures and what thresholds keep on one HTML page",
        description="Show the distribution of scores, what each threshold keeps, failures, "
        "unusual shards, throughput and provenance of an output on one self-contained HTML page.",
    )
    parser.add_argument("metadata", help="an output of `spark-nsfw score` or `classify`")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the HTML file; replaces an older report, and refuses to replace anything else",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        metavar="INPUT",
        help="the shards, tables or folders that were scored: adds images from every score band, "
        "blurred until clicked",
    )
    parser.add_argument(
        "--score-column",
        metavar="NAME",
        help="which of the score columns the report is about (default: nsfw_score if there is "
        "one, else the first); the others are shown beside it",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        action="append",
        default=[],
        metavar="[NAME=]SCORE",
        help="compare shards and detectors at this score; with NAME=, that of another score "
        "column; may be repeated (default: the middle of the range)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="column that is true or 1 for unsafe samples: adds precision, recall and ROC",
    )
    parser.add_argument(
        "--recall",
        type=share,
        default=0.95,
        help="share of the labelled unsafe samples to remove; the page gives the threshold for it "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.use.page import refuse_missing_libraries, refuse_page_file, write_page

    inputs = ShardInputs.parse(options.shards) if options.shards else None
    roots = [] if inputs is None else [inputs.filesystem + root for root in inputs.roots]
    refuse_page_file(options.output, [options.metadata, *roots])
    refuse_missing_libraries()

    write_page(options.output, _collect(options))
    print(f"report    {options.output}")
    return ExitStatus.DONE


def _collect(options: argparse.Namespace) -> ReportData:
    """Without Spark where the output is small."""
    from spark_nsfw.note import inspect_output
    from spark_nsfw.storage import absolute
    from spark_nsfw.use.collect import collect, samples_shown, with_images
    from spark_nsfw.use.local_rows import small_rows

    thresholds = dict(options.threshold)
    asked = {
        "score_column": options.score_column,
        "threshold": thresholds.pop("", None),
        "other_thresholds": thresholds,
        "label_column": options.label_column,
        "wanted_recall": options.recall,
    }
    metadata = absolute(options.metadata)
    notes = inspect_output(metadata)
    source = _source(options.shards, list(notes)) if options.shards else None
    footers = [footer for of_note in notes.values() for footer in of_note]
    rows = small_rows(footers, options.score_column, options.label_column)
    if rows is None:
        from spark_nsfw.spark.report import collect_report
        from spark_nsfw.spark.session import active_or_local_session

        return collect_report(
            active_or_local_session(), metadata, **asked, source=source, notes=list(notes)
        )
    data = collect(rows, metadata, list(notes), **asked, with_samples=source is not None)
    if source is None:
        return data
    from spark_nsfw.use.thumbnails import refuse_none, samples_by_unit, thumbnails

    shown = samples_shown(data)
    units = samples_by_unit(shown, source, rows.locations(shown))
    drawn = thumbnails(units, source)
    refuse_none(drawn, units)
    return with_images(data, drawn)


def _source(paths: Sequence[str], notes: Sequence[str]) -> ImageSource:
    """What was scored, read as it was then."""
    from spark_nsfw.read.inputs import INPUT_FORMATS, InputOptions, open_source

    note = json.loads(next((note for note in notes if note.startswith("{")), "{}"))
    kind, read = note.get("inputs", {}).get("kind"), note.get("rows", {})
    return open_source(
        paths,
        InputOptions(
            format=kind if kind in INPUT_FORMATS else None,
            image_column=read.get("image_column"),
            id_col=read.get("id_col") if kind == "parquet" else None,
        ),
    )


def _threshold(text: str) -> tuple[str, float]:
    """``0.5`` → the main column's, under an empty name; ``aesthetic_score=5`` → that column's."""
    name, _, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a score nor NAME=SCORE, such as 0.5 or aesthetic_score=5"
        ) from None
