"""``spark-nsfw models``: weights for machines without internet."""

from __future__ import annotations

import argparse

from spark_nsfw.cli.arguments import DEFAULT_MODEL, Commands
from spark_nsfw.cli.exit_status import ExitStatus

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("models", help="stage weights for machines without internet")
    fetch = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "fetch",
        help="fetch towers and detectors into a directory",
        description="Fetch CLIP towers and LAION's detectors, with their checksums, into one "
        "directory; `spark-nsfw score --models DIR` takes them from there. Run it again to add "
        "more. Files that are there are never replaced.",
    )
    fetch.add_argument(
        "directory", help="a directory of its own: new, empty, or filled by `models fetch`"
    )
    fetch.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"timm tower; may be repeated (default: {DEFAULT_MODEL})",
    )
    fetch.add_argument("--aesthetic", action="store_true", help="also fetch LAION-Aesthetics V2")
    fetch.add_argument("--q16", action="store_true", help="also fetch Q16's prompts")
    fetch.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from spark_nsfw.score.aesthetic import AESTHETIC_FILE
    from spark_nsfw.score.q16 import Q16_FILE
    from spark_nsfw.score.staging import fetch_models

    others = [AESTHETIC_FILE] * options.aesthetic + [Q16_FILE] * options.q16
    fetch_models(options.directory, options.model or [DEFAULT_MODEL], others=others)
    return ExitStatus.DONE
