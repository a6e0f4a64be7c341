"""``spark-nsfw export``: metadata and a predicate → new shards."""

from __future__ import annotations

import argparse
import sys

from spark_nsfw.cli.arguments import Commands, names
from spark_nsfw.cli.exit_status import ExitStatus
from spark_nsfw.cli.parser import at_least_one

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write new shards of the samples that satisfy a predicate",
        description="Write WebDataset shards of the samples whose metadata satisfies a predicate. "
        "Members are copied byte for byte, and each shard gets a sidecar Parquet. Run a stopped "
        "export again to continue where it stopped.",
        epilog="OUTPUT is a directory of its own: empty, new, or of the same export. Files that "
        "no export wrote are never changed or deleted. Exit status: 0 done; 1 failed (run the "
        "same command again to resume), or done but for chosen samples that are not in the shards "
        "given; 2 bad arguments, nothing was written.",
    )
    parser.add_argument("metadata", help="an output of `spark-nsfw score` or `classify`")
    parser.add_argument("output", help="directory for the new shards")
    parser.add_argument(
        "--shards",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="the shards that were scored: the INPUT of `spark-nsfw score`",
    )
    parser.add_argument(
        "--allow-moved",
        action="store_true",
        help="accept shards in another place than the one that was scored, for a dataset that "
        "was moved or copied",
    )
    parser.add_argument(
        "--where",
        required=True,
        metavar="PREDICATE",
        help="which samples to keep, in Spark SQL over the metadata, such as 'nsfw_score < 0.5'",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=at_least_one,
        metavar="N",
        help="regroup samples into shards of this size, named 00000, 00001 and so on "
        "(default: keep the shards, each with what is kept of it)",
    )
    parser.add_argument(
        "--renumber",
        action="store_true",
        help="give regrouped samples new keys such as 000420031",
    )
    parser.add_argument(
        "--old-id-col",
        default="source_key",
        metavar="NAME",
        help="with --renumber, the sidecar column that keeps the old keys (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-digits",
        type=at_least_one,
        default=5,
        metavar="N",
        help="digits in the regrouped shards' names (default: %(default)s)",
    )
    parser.add_argument(
        "--columns",
        metavar="A,B",
        help="metadata columns that go into the sidecars (default: all)",
    )
    parser.add_argument(
        "--keep-unscored",
        action="store_true",
        help="also keep samples without a score, whatever the predicate says",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.use.export_output import refuse_export
    from spark_nsfw.use.regroup import ExportOptions

    inputs = ShardInputs.parse(options.shards)
    export_options = ExportOptions(
        samples_per_shard=options.samples_per_shard,
        renumber=options.renumber,
        shard_digits=options.shard_digits,
        old_id_col=options.old_id_col,
    )
    refuse_export(options.metadata, options.output, inputs, allow_moved=options.allow_moved)

    from spark_nsfw.spark.export import export_metadata
    from spark_nsfw.spark.session import active_or_local_session

    summary = export_metadata(
        active_or_local_session(),
        options.metadata,
        options.output,
        inputs,
        options.where,
        columns=names(options.columns),
        keep_unscored=options.keep_unscored,
        allow_moved=options.allow_moved,
        options=export_options,
    )
    print(summary)
    if summary.num_lost:
        print(
            f"spark-nsfw: {summary.num_lost:,} of the chosen samples could not be copied from the "
            f"shards given ({summary.problems[0]}); the others are exported. Restore the shards "
            "as they were scored, or score them anew, and export into another directory",
            file=sys.stderr,
        )
        return ExitStatus.FAILED
    return ExitStatus.DONE
