"""From photographs to a report of their scores: ``python -m examples.demo DIRECTORY``.

Makes shards of real photographs with some damaged files among them, scores them, and
writes the report. Where the model hub answers, CLIP ViT-B/32 and LAION's detector score
them (``DEMO_MODEL`` names another tower, ``CLIP_CHECKPOINT`` a file of ViT-L/14's weights);
elsewhere Yahoo's open_nsfw, whose weights come in a package.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pyspark.sql import functions as F

from examples.photographs import (
    damaged_samples,
    originals,
    write_photograph_shards,
    write_shard,
)
from spark_nsfw import (
    NsfwClassifier,
    OpenNsfwClassifier,
    PixelClassifier,
    SparkNsfwError,
    TimmImageEmbedder,
    Transform,
)
from spark_nsfw.cli import main
from spark_nsfw.score.download import hub_problem
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.session import active_or_local_session

#: Says that a directory is a demo's own, whose shards and metadata the next one may replace.
MARKER = ".spark_nsfw_demo"

#: A real CLIP tower that a laptop takes: 350 MB, a third of a second for an image of one core.
MODEL = "vit_base_patch32_clip_quickgelu_224.openai"


class RedClassifier(PixelClassifier):
    """How red an image is, 0 to 1: no detector, but as much code as one of your own takes."""

    def __init__(self) -> None:
        super().__init__("red", Transform(64), mean=(0, 0, 0), std=(1, 1, 1))

    def load_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The mean of the first channel."""
        return lambda pixels: pixels[:, 0].mean(dim=(1, 2))


def make_shards(directory: Path) -> None:
    """The photographs as they are, crops of them, a shard that was cut off, and damaged samples."""
    write_shard(directory / "originals.tar", originals())
    write_photograph_shards(directory, num_shards=4, samples_per_shard=50)
    write_shard(directory / "damaged.tar", damaged_samples())
    last = directory / "00003.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])


def choose_detector() -> tuple[list[str], str]:
    """Arguments of ``spark-nsfw score``, and in a line what they mean."""
    checkpoint = os.environ.get("CLIP_CHECKPOINT")
    if checkpoint:
        return ["--clip-checkpoint", checkpoint], f"Real scores, by CLIP from {checkpoint}."
    has_open_nsfw, open_nsfw_problem = True, ""
    try:
        OpenNsfwClassifier().ready()
    except SparkNsfwError as exc:
        has_open_nsfw, open_nsfw_problem = False, str(exc)
    model = os.environ.get("DEMO_MODEL", MODEL)
    problem = hub_problem()
    if problem is None:
        try:
            Recipe.of(TimmImageEmbedder(model, pretrained=True), [NsfwClassifier()]).ready()
        except SparkNsfwError as exc:
            problem = str(exc)
        else:
            both = ["--detector", "laion", "--detector", "open_nsfw"] if has_open_nsfw else []
            beside = ", and by Yahoo's open_nsfw" if has_open_nsfw else ""
            return (
                ["--model", model, *both],
                f"Real scores, by LAION's detector on CLIP ({model}){beside}.",
            )
    if has_open_nsfw:
        return (
            ["--detector", "open_nsfw"],
            f"Real scores, by Yahoo's open_nsfw: CLIP's weights cannot be had here ({problem}).",
        )
    return (
        ["--model", "test_vit2", "--embedding-size", "768", "--no-pretrained",
         "--detector", "examples.demo:RedClassifier"],
        "NO REAL SCORES: the share of red stands in for a detector. CLIP's weights cannot be had "
        f"here ({problem}), nor open_nsfw's ({open_nsfw_problem}).",
    )  # fmt: skip


def say_and_run(*arguments: str) -> int:
    """Print a command, so that it can be pasted, and run it."""
    print("$", shlex.join(["spark-nsfw", *arguments]), flush=True)
    status = main(list(arguments))
    print(flush=True)
    return status


def run(directory: Path) -> int:
    """Make, score, show."""
    shards, output, report = (directory / name for name in ("shards", "metadata", "report.html"))
    marker = directory / MARKER
    if directory.exists() and any(directory.iterdir()) and not marker.exists():
        print(f"{directory} has files that no demo made: give another directory", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()
    make_shards(shards)
    arguments, meaning = choose_detector()
    if output.exists():
        arguments += ["--overwrite", "--yes"]  # deletes what score wrote, nothing else
    print(f"{meaning}\n")
    status = say_and_run("score", str(shards), str(output), *arguments)
    if status:
        return status
    metadata = active_or_local_session().read.parquet(str(output))
    scores = [name for name in metadata.columns if name.endswith("_score")]
    print("The photographs as they are:")
    metadata.where("shard = 'originals'").select("key", *scores).orderBy(scores[0]).show(20)
    print("The highest scores:")
    metadata.select("shard", "key", *scores).orderBy(F.desc(scores[0])).show(5)
    print("What could not be scored:")
    failed = metadata.where("status != 'ok'").select("shard", "key", "status", "error_message")
    failed.orderBy("shard", "key").show(50, truncate=60)
    status = say_and_run("report", str(output), "-o", str(report), "--shards", str(shards))
    print(f"{meaning}\nOpen {report} in a browser: it shows what every threshold keeps.")
    return status


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
