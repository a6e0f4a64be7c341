"""``spark-nsfw classify``: stored embeddings → Parquet metadata."""

from __future__ import annotations

import argparse

from spark_nsfw.cli.arguments import Commands, add_detector_arguments, detectors
from spark_nsfw.cli.exit_status import status_of
from spark_nsfw.cli.parser import device
from spark_nsfw.cli.signals import stop_at_signals
from spark_nsfw.errors import InputError
from spark_nsfw.storage import absolute

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "classify",
        help="score stored embeddings without reading an image",
        description="Score stored embeddings: an output of `spark-nsfw score`, sidecars such as "
        "NeMo Curator's with a column of embeddings, or clip-retrieval's img_emb/*.npy with "
        "metadata/*.parquet. Run a stopped command again to continue where it stopped.",
        epilog="OUTPUT is a directory of its own: empty, new, or of an earlier run that scored "
        "the same embeddings in the same way.",
    )
    parser.add_argument("metadata", help="directory of the embeddings, or one Parquet file")
    parser.add_argument("output", help="directory for the Parquet metadata")
    add_detector_arguments(parser.add_argument_group("models"))
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
    parser.add_argument(
        "--device", type=device, help="torch device (default: the task's GPU, else the CPU)"
    )
    parser.add_argument(
        "--progress",
        choices=["auto", "lines", "json"],
        default="auto",
        help="on stderr: a live line on a terminal, else a line or a JSON object per wave",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from spark_nsfw.ownership import refuse_overlap
    from spark_nsfw.read.embeddings import EmbeddingSource
    from spark_nsfw.score.classifier import ImageClassifier
    from spark_nsfw.score.recipe import Recipe
    from spark_nsfw.score.stored import refuse_missing_norms
    from spark_nsfw.spark.job import JobOptions, run_job
    from spark_nsfw.spark.session import start_session
    from spark_nsfw.use.metadata import MetadataFiles, refuse_foreign_files

    chosen = detectors(options)
    for each in chosen:
        if not isinstance(each, ImageClassifier):
            raise InputError(
                f"{each.model_name} looks at images, and classify reads none: `spark-nsfw score` "
                "takes it"
            )
    output, metadata = MetadataFiles.at(options.output), absolute(options.metadata)
    refuse_overlap(output.url, [metadata])
    refuse_foreign_files(output.url)
    session = start_session(scores=True)
    source = EmbeddingSource.open(metadata, options.embedding_column, options.id_col)
    recipe = Recipe(
        None,
        tuple(chosen),
        device=options.device,
        keep_embeddings=options.embeddings,
        embedding_column=options.embedding_column,
    )
    refuse_missing_norms(recipe.heads, source.columns.values(), metadata)
    recipe = recipe.ready(embedding_size=source.width)
    with stop_at_signals() as stop:
        summary = run_job(
            session(),
            source,
            recipe,
            output.url,
            options=JobOptions(progress=options.progress),
            stop=stop,
        )
    print(summary)
    return status_of(summary)
