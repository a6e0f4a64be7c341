"""Command line: ``spark-nsfw score INPUT... OUTPUT``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spark_nsfw.errors import InputError, JobStoppedError, SparkNsfwError

if TYPE_CHECKING:
    from spark_nsfw.score.classifier import ImageClassifier
    from spark_nsfw.spark.summary import Summary

__all__ = ["main"]

#: Exit statuses, besides 0 for done.
_FAILED, _BAD_ARGUMENTS, _TOO_MANY_FAILED, _STOPPED = 1, 2, 3, 4

_DEFAULT_MODEL = "vit_large_patch14_clip_quickgelu_224.openai"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: failed. 2: bad arguments. 3: ``score`` is done, but more samples and shards
    failed than ``--max-failed`` allows, or a shard was set aside, or nothing could be scored.
    4: stopped.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except SparkNsfwError as exc:
        print(f"spark-nsfw: {exc}", file=sys.stderr)
        if isinstance(exc, JobStoppedError):
            return _STOPPED
        return _BAD_ARGUMENTS if isinstance(exc, InputError) else _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spark-nsfw", description="Find NSFW images in WebDataset shards with Spark."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    score = commands.add_parser(
        "score",
        help="score every image of some shards into Parquet",
        description="Score every image of WebDataset shards with CLIP and LAION's NSFW detector, "
        "and write Parquet metadata partitioned by shard. A run that was stopped continues "
        "where it was when it is started again.",
        epilog="Exit status: 0 done; 1 failed; 2 bad arguments; 3 done, but more samples and "
        "shards failed than --max-failed allows, or a shard was set aside, or nothing could be "
        "scored; 4 stopped, the same command goes on.",
    )
    _add_score_arguments(score)
    score.set_defaults(run=_score)

    _add_classify_parser(commands)
    _add_report_parser(commands)
    _add_export_parser(commands)

    models = commands.add_parser("models", help="stage weights for machines without internet")
    fetch = models.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "fetch",
        help="fetch towers and detectors into a directory",
        description="Fetch CLIP towers and LAION's detectors, with their checksums, into one "
        "directory; `spark-nsfw score --models DIR` takes them from there.",
    )
    fetch.add_argument("directory")
    fetch.add_argument(
        "--model", action="append", help=f"timm tower; may be repeated (default: {_DEFAULT_MODEL})"
    )
    fetch.add_argument("--aesthetic", action="store_true", help="LAION-Aesthetics V2, too")
    fetch.set_defaults(run=_fetch)

    inspect = commands.add_parser(
        "inspect",
        help="say what made an output",
        description="Say which tower, detector, weights and options made the Parquet files of "
        "an output, and warn where they differ.",
    )
    inspect.add_argument("output", help="directory of Parquet metadata, or one file")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        nargs="+",
        help="directory, .tar file, glob or brace range such as 'shards/{00000..00099}.tar'; "
        "several may be given",
    )
    parser.add_argument("output", help="directory for the Parquet metadata")

    model = parser.add_argument_group("models")
    model.add_argument("--model", default=_DEFAULT_MODEL, help="timm tower (default: %(default)s)")
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
        type=int,
        metavar="D",
        help="width of the embeddings, for towers without a projection of their own",
    )
    _add_classifier_arguments(model)

    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="images per forward pass on a GPU; a CPU takes eight at a time (default: %(default)s)",
    )
    speed.add_argument(
        "--num-threads",
        type=int,
        default=4,
        help="decoding threads per worker (default: %(default)s)",
    )
    speed.add_argument(
        "--precision",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the tower; auto: float16 on a GPU, float32 on a CPU",
    )
    speed.add_argument(
        "--decode",
        choices=["exact", "fast"],
        default="fast",
        help="exact: OpenAI's pixels bit for bit; fast: half the time for JPEG, and scores move "
        "less than by float16 (default: %(default)s)",
    )
    speed.add_argument(
        "--device",
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
        type=int,
        metavar="N",
        help="shards written together: what a kill can cost (default: 32 for each task that "
        "runs at a time, at least 256)",
    )

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the output and start anew; asks first",
    )
    run.add_argument("--yes", action="store_true", help="do not ask before deleting")
    run.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on with an output that other models or another version began",
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
        type=float,
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
        "--id-col", default="key", help="sample id in sidecars and JSON (default: %(default)s)"
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
        metavar="A,B",
        help="which members are images, in order of preference (default: jpg, jpeg, png, webp and "
        "what else pillow opens)",
    )


def _add_classifier_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--nsfw-checkpoint",
        metavar="FILE",
        help="detector: LAION's zip, NeMo Curator's .pth, dataset2metadata's state dict or "
        "safetensors (default: LAION's, downloaded once)",
    )
    group.add_argument(
        "--nsfw-variant",
        choices=["torch", "laion"],
        default="torch",
        help="torch: scores as NeMo Curator and DataComp have them; laion: as LAION's "
        "TensorFlow model gives them (default: %(default)s)",
    )
    group.add_argument(
        "--aesthetic",
        action="store_true",
        help="score with LAION-Aesthetics V2, too, into aesthetic_score (ViT-L/14 only)",
    )
    group.add_argument(
        "--aesthetic-checkpoint",
        metavar="FILE",
        help="its sac+logos+ava1-l14-linearMSE.pth (default: downloaded once)",
    )
    group.add_argument(
        "--models",
        metavar="DIR",
        help="directory or URL made by `spark-nsfw models fetch`, instead of the internet",
    )


def _classifiers(options: argparse.Namespace) -> list[ImageClassifier]:
    from spark_nsfw.score.aesthetic import AestheticClassifier
    from spark_nsfw.score.nsfw import NsfwClassifier

    classifiers: list[ImageClassifier] = [
        NsfwClassifier(
            model_path=options.nsfw_checkpoint,
            variant=options.nsfw_variant,
            models_dir=options.models,
        )
    ]
    if options.aesthetic or options.aesthetic_checkpoint:
        classifiers.append(
            AestheticClassifier(model_path=options.aesthetic_checkpoint, models_dir=options.models)
        )
    return classifiers


def _score(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` does not wait for torch and Spark.
    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions
    from spark_nsfw.score.embedder import TimmImageEmbedder
    from spark_nsfw.spark.job import JobOptions, delete_output, run_job
    from spark_nsfw.spark.session import active_or_local_session
    from spark_nsfw.spark.udf import settled

    embedder = TimmImageEmbedder(
        options.model,
        pretrained=options.pretrained and options.clip_checkpoint is None,
        batch_size=options.batch_size,
        num_threads_per_worker=options.num_threads,
        checkpoint_path=options.clip_checkpoint,
        precision=None if options.precision == "auto" else options.precision,
        embedding_size=options.embedding_size,
        decode=options.decode,
        models_dir=options.models,
        classifiers=_classifiers(options),
    )
    extensions = _names(options.image_extensions)
    job = JobOptions(
        plan=options.plan,
        shards_per_wave=options.shards_per_wave,
        columns=_names(options.columns),
        keep_embeddings=options.embeddings,
        device=options.device,
        allow_changes=options.allow_changes,
        watch=options.watch,
        settle_seconds=options.settle_seconds,
        progress=options.progress,
        samples=SampleOptions(
            image_extensions=IMAGE_EXTENSIONS if extensions is None else extensions,
            captions=options.captions,
            id_col=options.id_col,
        ),
    )
    inputs = ShardInputs.parse(options.input)
    settled(embedder, None)  # weights that cannot be had are told before Spark starts
    spark = active_or_local_session()
    if options.overwrite:
        if not options.yes:
            _ask(f"Delete {options.output} and score everything anew?")
        delete_output(spark, options.output)
    with _stop_at_signals() as stop:
        summary = run_job(spark, inputs, options.output, embedder, options=job, stop=stop)
    print(summary)
    return _status_of(summary, options.max_failed)


def _ask(question: str) -> None:
    """Go on only if a person says yes."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} There is nobody to ask; say --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was deleted")


@contextmanager
def _stop_at_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one ends the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    stopped_at = 0.0

    def handle(number: int, _: object) -> None:
        nonlocal stopped_at
        now = time.monotonic()
        if stop.is_set() and now - stopped_at < 1:
            return  # one signal that came both to the process and to its group
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stopped_at = now
        print("spark-nsfw: stopping; once more ends it at once", file=sys.stderr, flush=True)
        stop.set()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _limit(text: str) -> float | int:
    """``12`` → 12 samples, ``1.5%`` → a share of 0.015."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of samples nor a share such as 0.5%"
        ) from None


def _status_of(summary: Summary, max_failed: float | int | None) -> int:
    from spark_nsfw.spark.summary import counted

    failed = summary.num_samples - summary.num_scored
    damaged = summary.num_damaged_shards
    limit = max_failed * summary.num_samples if isinstance(max_failed, float) else max_failed
    if limit is not None and failed + damaged > limit:
        print(
            f"spark-nsfw: {failed:,} of {summary.num_samples:,} samples and "
            f"{counted(damaged, 'shard')} failed, more than --max-failed",
            file=sys.stderr,
        )
        return _TOO_MANY_FAILED
    if summary.num_crashed_shards:
        print(
            f"spark-nsfw: {summary.num_crashed_shards:,} shards were set aside: every worker that "
            "read them died; see the rows with status shard_crashed",
            file=sys.stderr,
        )
        return _TOO_MANY_FAILED
    if not summary.num_scored:
        print("spark-nsfw: not one sample could be scored", file=sys.stderr)
        return _TOO_MANY_FAILED
    return 0


def _add_classify_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    classify = commands.add_parser(
        "classify",
        help="score embeddings that are already there, without reading an image",
        description="Score stored embeddings: an output of `spark-nsfw score`, sidecars such as "
        "NeMo Curator's with a column of embeddings, or clip-retrieval's img_emb/*.npy with "
        "metadata/*.parquet.",
    )
    classify.add_argument("metadata", help="directory of the embeddings, or one Parquet file")
    classify.add_argument("output", help="directory for the Parquet metadata")
    _add_classifier_arguments(classify.add_argument_group("models"))
    classify.add_argument(
        "--embedding-column",
        default="image_embedding",
        metavar="NAME",
        help="holds the embeddings (default: %(default)s)",
    )
    classify.add_argument(
        "--id-col",
        metavar="NAME",
        help="holds the samples' keys (default: key; for clip-retrieval image_path)",
    )
    classify.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="copy the embeddings to the output (default: no)",
    )
    classify.add_argument("--device", help="torch device (default: the task's GPU, else the CPU)")
    classify.set_defaults(run=_classify)


def _classify(options: argparse.Namespace) -> int:
    from spark_nsfw.spark.classify import classify_metadata
    from spark_nsfw.spark.session import active_or_local_session

    summary = classify_metadata(
        active_or_local_session(),
        options.metadata,
        options.output,
        _classifiers(options),
        embedding_column=options.embedding_column,
        id_col=options.id_col,
        keep_embeddings=options.embeddings,
        device=options.device,
    )
    print(summary)
    return 0


def _add_report_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="show scores, failures and what thresholds keep, as one HTML page",
        description="Show the distribution of scores, what each threshold keeps, failures, shards "
        "that stand out, throughput and provenance of an output, as one self-contained HTML page.",
    )
    report.add_argument("metadata", help="an output of `spark-nsfw score` or `classify`")
    report.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file")
    report.add_argument(
        "--shards",
        nargs="+",
        metavar="INPUT",
        help="the shards that were scored: adds images of every score band, blurred until clicked",
    )
    report.add_argument("--score-column", default="nsfw_score", metavar="NAME")
    report.add_argument(
        "--threshold", type=float, help="to compare shards at (default: the middle of the range)"
    )
    report.add_argument(
        "--label-column",
        metavar="NAME",
        help="true or 1 where a sample is unsafe: adds precision, recall and ROC",
    )
    report.add_argument(
        "--recall",
        type=float,
        default=0.95,
        help="share of the labelled unsafe samples to remove, for which a threshold is found "
        "(default: %(default)s)",
    )
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.spark.report import collect_report
    from spark_nsfw.spark.session import active_or_local_session
    from spark_nsfw.use.report import render

    data = collect_report(
        active_or_local_session(),
        options.metadata,
        score_column=options.score_column,
        threshold=options.threshold,
        label_column=options.label_column,
        wanted_recall=options.recall,
        inputs=ShardInputs.parse(options.shards) if options.shards else None,
    )
    Path(options.output).write_text(render(data), "utf-8")
    print(f"report    {options.output}")
    return 0


def _add_export_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write new shards of the samples that satisfy a predicate",
        description="Write WebDataset shards of the samples whose metadata satisfies a predicate. "
        "Members are copied as they are, each shard gets a sidecar Parquet, and a run that was "
        "stopped continues where it was when it is started again.",
    )
    export.add_argument("metadata", help="an output of `spark-nsfw score` or `classify`")
    export.add_argument("output", help="directory for the new shards")
    export.add_argument(
        "--shards",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="the shards that were scored: the INPUT of `spark-nsfw score`",
    )
    export.add_argument(
        "--where",
        required=True,
        metavar="PREDICATE",
        help="what to keep, in Spark SQL over the metadata, such as 'nsfw_score < 0.5'",
    )
    export.add_argument(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="regroup samples into shards of this many, named 00000, 00001 and so on "
        "(default: the shards stay, with what is kept of each)",
    )
    export.add_argument(
        "--renumber",
        action="store_true",
        help="give regrouped samples new keys such as 000420031",
    )
    export.add_argument(
        "--old-id-col",
        default="source_key",
        metavar="NAME",
        help="the sidecars' column that keeps the old keys then (default: %(default)s)",
    )
    export.add_argument(
        "--shard-digits",
        type=int,
        default=5,
        metavar="N",
        help="of the regrouped shards' numbers (default: %(default)s)",
    )
    export.add_argument(
        "--columns",
        metavar="A,B",
        help="which columns of the metadata the sidecars get (default: all)",
    )
    export.add_argument(
        "--keep-unscored",
        action="store_true",
        help="keep samples without a score, too, whatever the predicate says",
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.spark.export import export_metadata
    from spark_nsfw.spark.session import active_or_local_session
    from spark_nsfw.use.regroup import ExportOptions

    summary = export_metadata(
        active_or_local_session(),
        options.metadata,
        options.output,
        ShardInputs.parse(options.shards),
        options.where,
        columns=_names(options.columns),
        keep_unscored=options.keep_unscored,
        options=ExportOptions(
            samples_per_shard=options.samples_per_shard,
            renumber=options.renumber,
            shard_digits=options.shard_digits,
            old_id_col=options.old_id_col,
        ),
    )
    print(summary)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from spark_nsfw.score.aesthetic import AESTHETIC_FILE
    from spark_nsfw.score.staging import fetch_models

    others = [AESTHETIC_FILE] if options.aesthetic else []
    fetch_models(options.directory, options.model or [_DEFAULT_MODEL], others=others)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from spark_nsfw.note import inspect_output

    notes = inspect_output(options.output)
    for note, files in notes.items():
        print(f"{len(files):,} files, such as {files[0]}:\n{note}\n")
    if len(notes) > 1:
        print(f"WARNING: {options.output} mixes rows that were made in {len(notes)} ways")
    return 0 if len(notes) == 1 else 1


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
