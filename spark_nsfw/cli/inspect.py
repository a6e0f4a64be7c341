"""``spark-nsfw inspect``: what made an output."""

from __future__ import annotations

import argparse
import sys

from spark_nsfw.cli.arguments import Commands
from spark_nsfw.cli.exit_status import ExitStatus

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="say what made an output",
        description="Summarize which tower, detectors, weights and options made the Parquet files "
        "of an output, and warn where they differ. Reads only the files' footers and writes "
        "nothing.",
        epilog="Exit status: 0 all rows were made in one way; 1 in several; 2 bad arguments.",
    )
    parser.add_argument("output", help="directory of Parquet metadata, or one file")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with the complete notes"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.use.inspection import inspect_ways, ways_json, ways_text

    ways = inspect_ways(options.output)
    print((ways_json if options.json else ways_text)(options.output, ways))
    if len(ways) > 1:
        warning = f"WARNING: {options.output} mixes rows that were made in {len(ways)} ways"
        print(warning, file=sys.stderr if options.json else sys.stdout)
        return ExitStatus.FAILED
    return ExitStatus.DONE
