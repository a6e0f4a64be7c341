"""``spark-nsfw score``: images → Parquet metadata."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from spark_nsfw.cli.arguments import (
    DEFAULT_MODEL,
    Commands,
    add_detector_arguments,
    detectors,
    names,
)
from spark_nsfw.cli.exit_status import status_of
from spark_nsfw.cli.parser import at_least_one, device, seconds
from spark_nsfw.cli.signals import stop_at_signals
from spark_nsfw.errors import InputError, NothingToReadError

if TYPE_CHECKING:
    from spark_nsfw.read.source import Source
    from spark_nsfw.score.recipe import Recipe

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "score",
        help="score every image of some shards, tables or folders into Parquet",
        description="Score every image of WebDataset shards, Parquet files or folders with "
        "CLIP and LAION's NSFW detector, or with others, and write Parquet metadata partitioned by "
        "shard. Run a stopped command again to continue where it stopped.",
        epilog="Exit status: 0 done; 1 failed; 2 bad arguments; 3 done, but more samples and "
        "shards failed than --max-failed allows, or a shard was set aside, or nothing could be "
        "scored; 4 stopped: run the same command again to go on.",
    )
    _add_arguments(parser)
    parser.set_defaults(run=_run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        nargs="+",
        help="directory, file, glob or brace range such as 'shards/{00000..00099}.tar'; "
        "several may be given",
    )
    parser.add_argument("output", help="directory for the Parquet metadata")

    model = parser.add_argument_group("models")
    model.add_argument(
        "--model",
        help=f"timm tower for detectors that score embeddings (default: {DEFAULT_MODEL}); named "
        "beside detectors that see pixels alone, it adds the embeddings",
    )
    model.add_argument(
        "--clip-checkpoint",
        metavar="FILE",
        help="CLIP weights: timm's or open_clip's file, or OpenAI's ViT-L-14.pt",
    )
    model.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="download the tower's weights unless --clip-checkpoint is given; "
        "--no-pretrained takes random ones, whose scores mean nothing",
    )
    model.add_argument(
        "--embedding-size",
        type=at_least_one,
        metavar="D",
        help="width of the embeddings, for towers without a projection of their own",
    )
    add_detector_arguments(model)

    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size",
        type=at_least_one,
        help="images per forward pass on a GPU (default: 256, and 64 in tasks of one core); a CPU "
        "takes eight at a time",
    )
    speed.add_argument(
        "--num-threads",
        type=at_least_one,
        help="decoding threads per worker (default: 4, or on a GPU the task's cores less two)",
    )
    speed.add_argument(
        "--engine",
        choices=["torch", "openvino"],
        default="torch",
        help="what computes the tower on a CPU; openvino needs the extra of that name; "
        "docs/performance.md says where it pays (default: %(default)s)",
    )
    speed.add_argument(
        "--precision",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the networks; auto: float16 on a GPU, float32 on a CPU",
    )
    speed.add_argument(
        "--decode",
        choices=["exact", "fast"],
        help="exact: the pixels of the model's own code bit for bit; fast: half the time for JPEG, "
        "and scores move less than by float16 (default: fast, but exact for open_nsfw)",
    )
    speed.add_argument(
        "--device",
        type=device,
        help="torch device such as cuda:0 or cpu (default: the task's GPU, else the CPU)",
    )
    speed.add_argument(
        "--plan",
        choices=["dataframe", "fused"],
        default="dataframe",
        help="dataframe: images pass through Spark; fused: one Python worker reads and scores; "
        "the rows are the same (default: %(default)s)",
    )
    speed.add_argument(
        "--shards-per-wave",
        type=at_least_one,
        metavar="N",
        help="shards written together (default: as many as take about five minutes)",
    )

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="delete what earlier runs wrote to the output and start anew; asks first",
    )
    run.add_argument("--yes", action="store_true", help="do not ask before deleting")
    run.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on with an output that was begun with other models or options",
    )
    run.add_argument(
        "--max-failed",
        type=_limit,
        metavar="N|P%",
        help="exit with status 3 when more samples of the output failed, a number or a share; "
        "a damaged shard counts as one",
    )
    run.add_argument(
        "--watch",
        action="store_true",
        help="keep running and score shards as they arrive, until stopped (Ctrl-C, SIGTERM)",
    )
    run.add_argument(
        "--settle-seconds",
        type=seconds,
        default=30,
        metavar="S",
        help="with --watch, read a shard once it has not changed for so long "
        "(default: %(default)s)",
    )
    run.add_argument(
        "--progress",
        choices=["auto", "lines", "json"],
        default="auto",
        help="on stderr: a live line on a terminal, else a line or a JSON object per wave",
    )

    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--input-format",
        choices=["webdataset", "parquet", "files"],
        help="tar shards, Parquet files with a column of images, or image files (default: the "
        "first of these that is found)",
    )
    rows.add_argument(
        "--image-column",
        metavar="NAME",
        help="of Parquet: encoded images, struct<bytes, path>, or paths of files (default: the "
        "column that holds images)",
    )
    rows.add_argument(
        "--id-col",
        metavar="NAME",
        help="sample id in sidecars, JSON and Parquet (default: key; the number of the row in a "
        "Parquet file without)",
    )
    rows.add_argument(
        "--columns",
        metavar="A,B",
        help="which of the dataset's own columns to keep (default: all; '' for none)",
    )
    rows.add_argument("--captions", action="store_true", help="keep the .txt member as caption")
    rows.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the image_embedding column (default: yes)",
    )
    rows.add_argument(
        "--image-extensions",
        type=_extensions,
        metavar="A,B",
        help="which members are images, in order of preference (default: jpg, jpeg, png, webp and "
        "what else pillow opens)",
    )


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` waits for nothing.
    from spark_nsfw.use.metadata import MetadataFiles, refuse_names, refuse_place

    source = _source(options)
    output = MetadataFiles.at(options.output)
    refuse_place(output.url, source)
    if not options.watch:
        refuse_names(source.units(), output.url)
    has_files = output.has_files
    replacing = options.overwrite and has_files
    if replacing and not options.yes:
        _ask(f"Delete {options.output} and score everything anew?")

    from spark_nsfw.spark.session import start_session

    # Meanwhile torch is imported and weights are looked at. Where there is an output already,
    # there may be nothing to do for workers.
    session = start_session(scores=replacing or not has_files)

    from spark_nsfw.spark.job import JobOptions, run_job
    from spark_nsfw.spark.mixing import refuse_other_results

    recipe = _recipe(options).ready()
    if not replacing:
        refuse_other_results(output, recipe)
    job = JobOptions(
        plan=options.plan,
        shards_per_wave=options.shards_per_wave,
        allow_changes=options.allow_changes,
        watch=options.watch,
        settle_seconds=options.settle_seconds,
        progress=options.progress,
    )
    spark = session()
    if replacing:
        output.delete()
    with stop_at_signals() as stop:
        summary = run_job(spark, source, recipe, output.url, options=job, stop=stop)
    print(summary)
    return status_of(summary, options.max_failed)


def _source(options: argparse.Namespace) -> Source:
    from spark_nsfw.read.inputs import InputOptions, open_source
    from spark_nsfw.read.shards import IMAGE_EXTENSIONS

    asked = InputOptions(
        format=options.input_format,
        image_column=options.image_column,
        id_col=options.id_col,
        columns=names(options.columns),
        captions=options.captions,
        image_extensions=options.image_extensions or IMAGE_EXTENSIONS,
        settle_seconds=options.settle_seconds if options.watch else 0,
    )

    def tell(line: str) -> None:
        print(f"spark-nsfw: {line}", file=sys.stderr)

    try:
        return open_source(options.input, asked, tell)
    except NothingToReadError:
        if not options.watch or options.input_format is not None:
            raise
        return open_source(options.input, replace(asked, format="webdataset"))  # it will come


def _recipe(options: argparse.Namespace) -> Recipe:
    from spark_nsfw.score.classifier import ImageClassifier
    from spark_nsfw.score.recipe import Recipe
    from spark_nsfw.score.timm_embedder import TimmImageEmbedder

    speed = {
        "batch_size": options.batch_size,
        "num_threads_per_worker": options.num_threads,
        "precision": None if options.precision == "auto" else options.precision,
        **({} if options.decode is None else {"decode": options.decode}),
    }
    chosen, embedder = detectors(options, **speed), None
    if (
        any(isinstance(each, ImageClassifier) for each in chosen)
        or options.model
        or options.clip_checkpoint
    ):
        embedder = TimmImageEmbedder(
            options.model or DEFAULT_MODEL,
            pretrained=options.pretrained and options.clip_checkpoint is None,
            checkpoint_path=options.clip_checkpoint,
            embedding_size=options.embedding_size,
            models_dir=options.models,
            engine=options.engine,
            **speed,
        )
    elif options.engine != "torch":
        raise InputError("--engine is about a CLIP tower, and no detector here needs one")
    return Recipe.of(embedder, chosen, device=options.device, keep_embeddings=options.embeddings)


def _ask(question: str) -> None:
    """Go on only if a person says yes."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} There is nobody to ask; say --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was deleted")


def _limit(text: str) -> float | int:
    """``12`` → 12 samples, ``1.5%`` → a share of 0.015."""
    try:
        limit = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        limit = -1
    if not 0 <= limit < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples nor a share such as 0.5%"
        )
    return limit


def _extensions(text: str) -> tuple[str, ...]:
    """``jpg, .PNG`` → (``jpg``, ``png``)."""
    found = tuple(name.lstrip(".").lower() for name in names(text) or () if name.strip("."))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no extension, such as jpg,png")
    return found
