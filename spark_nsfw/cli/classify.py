"""``spark-nsfw classify``: stored embeddings → Parquet metadata."""

from __future__ import annotations

import argparse

from spark_nsfw.cli.arguments import Commands, add_classifier_arguments, classifiers
from spark_nsfw.cli.exit_status import ExitStatus

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "classify",
        help="score stored embeddings without reading an image",
        description="Score stored embeddings: an output of `spark-nsfw score`, sidecars such as "
        "NeMo Curator's with a column of embeddings, or clip-retrieval's img_emb/*.npy with "
        "metadata/*.parquet.",
        epilog="OUTPUT is a directory of its own: empty, new, or of an earlier run that scored "
        "the same embeddings in the same way.",
    )
    parser.add_argument("metadata", help="directory of the embeddings, or one Parquet file")
    parser.add_argument("output", help="directory for the Parquet metadata")
    add_classifier_arguments(parser.add_argument_group("models"))
    parser.add_argument(
        "--embedding-column",
        default="image_embedding",
        metavar="NAME",
        help="column that holds the embeddings (default: %(default)s)",
    )
    parser.add_argument(
        "--id-col",
        metavar="NAME",
        help="column that holds the samples' keys (default: key; for clip-retrieval image_path)",
    )
    parser.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="copy the embeddings to the output (default: no)",
    )
    parser.add_argument("--device", help="torch device (default: the task's GPU, else the CPU)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.ownership import refuse_foreign_metadata, refuse_overlap

    refuse_overlap(options.output, [options.metadata])
    refuse_foreign_metadata(options.output)

    from spark_nsfw.spark.classify import classify_metadata
    from spark_nsfw.spark.session import active_or_local_session

    summary = classify_metadata(
        active_or_local_session(),
        options.metadata,
        options.output,
        classifiers(options),
        embedding_column=options.embedding_column,
        id_col=options.id_col,
        keep_embeddings=options.embeddings,
        device=options.device,
    )
    print(summary)
    return ExitStatus.DONE
