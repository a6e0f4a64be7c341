"""``spark-nsfw inspect``: what made an output."""

from __future__ import annotations

import argparse

from spark_nsfw.cli.arguments import Commands
from spark_nsfw.cli.exit_status import ExitStatus

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="say what made an output",
        description="Say which tower, detector, weights and options made the Parquet files of "
        "an output, and warn where they differ. Writes nothing.",
        epilog="Exit status: 0 all rows were made in one way; 1 in several; 2 bad arguments.",
    )
    parser.add_argument("output", help="directory of Parquet metadata, or one file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.note import inspect_output

    notes = inspect_output(options.output)
    for note, files in notes.items():
        print(f"{len(files):,} files, such as {files[0]}:\n{note}\n")
    if len(notes) > 1:
        print(f"WARNING: {options.output} mixes rows that were made in {len(notes)} ways")
        return ExitStatus.FAILED
    return ExitStatus.DONE
