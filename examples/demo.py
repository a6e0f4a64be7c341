"""From photographs to scored Parquet: ``python -m examples.demo DIRECTORY``.

Makes shards of real photographs with some damaged files among them, scores them, and
shows what came out. Real CLIP weights are used where ``CLIP_CHECKPOINT`` names a file.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.photographs import damaged_samples, write_photograph_shards, write_shard
from spark_nsfw import NsfwClassifier, SparkNsfwError
from spark_nsfw.cli import main
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.score.nsfw import NsfwDetector
from spark_nsfw.spark.session import active_or_local_session

#: Says that a directory is a demo's own, whose shards and metadata the next one may replace.
MARKER = ".spark_nsfw_demo"


def make_shards(directory: Path) -> None:
    """Three whole shards, one that was cut off in transit, and one of damaged samples."""
    write_photograph_shards(directory, num_shards=4, samples_per_shard=50)
    write_shard(directory / "damaged.tar", damaged_samples())
    last = directory / "00003.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])


def tower_arguments() -> list[str]:
    """The real tower where its weights are at hand, else a small random one."""
    checkpoint = os.environ.get("CLIP_CHECKPOINT")
    if checkpoint:
        return ["--clip-checkpoint", checkpoint]
    print(
        "CLIP_CHECKPOINT names no file with CLIP's weights: the tower is a small random one.\n"
        "Its scores mean nothing; everything else is as in a real run.\n"
    )
    return ["--model", "test_vit2", "--embedding-size", "768", "--no-pretrained"]


def detector_arguments(directory: Path) -> list[str]:
    """LAION's detector from ``NSFW_CHECKPOINT`` or the internet, else a random one."""
    checkpoint = os.environ.get("NSFW_CHECKPOINT")
    if checkpoint:
        return ["--nsfw-checkpoint", checkpoint]
    try:
        NsfwClassifier().for_embedding_size(768)
        return []
    except SparkNsfwError as exc:
        print(f"LAION's detector cannot be had, a random one takes its place:\n  {exc}\n")
    torch.manual_seed(0)
    path = directory / "random_detector.safetensors"
    save_file(NsfwDetector(DETECTORS[768].widths).state_dict(), path)
    return ["--nsfw-checkpoint", str(path)]


def run(directory: Path) -> int:
    """Make, score, show."""
    shards, output = directory / "shards", directory / "metadata"
    marker = directory / MARKER
    if directory.exists() and any(directory.iterdir()) and not marker.exists():
        print(f"{directory} has files that no demo made: give another directory", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for left_over in (shards, output):
        shutil.rmtree(left_over, ignore_errors=True)
    make_shards(shards)
    arguments = [str(shards), str(output), *tower_arguments(), *detector_arguments(directory)]
    print("spark-nsfw score", " ".join(arguments), "\n", flush=True)
    status = main(["score", *arguments])
    metadata = active_or_local_session().read.parquet(str(output))
    columns = ["shard", "key", "status", "nsfw_score", "image_embedding", "error_message"]
    print("\nFirst rows:")
    metadata.select(columns).orderBy("shard", "key").show(5, truncate=28)
    print("What could not be scored:")
    failed = metadata.where("status != 'ok'").select("shard", "key", "status", "error_message")
    failed.orderBy("shard", "key").show(50, truncate=60)
    return status


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
