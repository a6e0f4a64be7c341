"""Command line: ``spark-nsfw score INPUT... OUTPUT`` and the other verbs, one module each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spark_nsfw.cli import classify, concepts, export, inspect, models, report, score
from spark_nsfw.cli.exit_status import ExitStatus
from spark_nsfw.cli.parser import Parser
from spark_nsfw.cli.stores import reach_stores
from spark_nsfw.errors import InputError, JobStoppedError, SparkNsfwError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: failed; for ``export`` also: some of the chosen samples could not be copied.
    2: bad arguments; nothing was changed. 3: ``score`` is done, but more samples and shards
    failed than ``--max-failed`` allows, or a shard was set aside, or nothing could be scored.
    4: stopped.
    """
    options = _parser().parse_args(arguments)
    try:
        reach_stores(options)
        return int(options.run(options))
    except SparkNsfwError as exc:
        print(f"spark-nsfw: {exc}", file=sys.stderr)
        if isinstance(exc, JobStoppedError):
            return ExitStatus.STOPPED
        return ExitStatus.BAD_ARGUMENTS if isinstance(exc, InputError) else ExitStatus.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="spark-nsfw", description="Find NSFW images in shards, tables and folders with Spark."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for verb in (score, classify, report, export, models, concepts, inspect):
        verb.add_parser(commands)
    return parser
