"""How long do slots wait at the ends of waves? ``python -m benchmarks.waves``.

The job runs over uneven shards, one of them ten times as long as the rest, in waves of
different sizes, the default last. Spark's event log is the timeline: a slot is busy while a
task runs in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from pyspark.sql import SparkSession

from benchmarks.table import report
from examples.photographs import encode, photographs, write_shard
from spark_nsfw import TimmImageEmbedder
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.cluster import num_slots
from spark_nsfw.spark.job import JobOptions, run_job


def write_uneven_shards(directory: Path, num_shards: int) -> int:
    """Shards of 10 to 30 images, and one of 200; returns the number of images."""
    jpegs = [encode(p, quality=90) for p, _ in zip(photographs(), range(50), strict=False)]
    draw = random.Random(0)
    lengths = [200, *(draw.randint(10, 30) for _ in range(num_shards - 1))]
    draw.shuffle(lengths)
    for number, length in enumerate(lengths):
        samples = ((f"{i:04}", [("jpg", draw.choice(jpegs))]) for i in range(length))
        write_shard(directory / f"{number:05}.tar", samples)
    return sum(lengths)


def busy_seconds(log: Path, since: float, until: float) -> float:
    """Seconds of tasks that ran between two points in Unix time."""
    total = 0.0
    for file in log.rglob("*"):
        if not file.is_file() or file.name.startswith("."):
            continue
        for line in file.read_text().splitlines():
            if line.startswith('{"Event":"SparkListenerTaskEnd"'):
                info = json.loads(line)["Task Info"]
                launched, finished = info["Launch Time"] / 1000, info["Finish Time"] / 1000
                if launched >= since and finished <= until:
                    total += finished - launched
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--per-wave", type=int, nargs="*", default=[4, 16, 64, 128])
    options = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join(["", str(Path(__file__).parents[1])])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.mkdir()
        spark = (
            SparkSession.builder.master(f"local[{len(os.sched_getaffinity(0))}]")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.eventLog.enabled", "true")
            .config("spark.eventLog.dir", log.as_uri())
            .config("spark.eventLog.compress", "false")
            .getOrCreate()
        )
        spark.sparkContext.setLogLevel("OFF")
        directory = Path(folder) / "in"
        num_images = write_uneven_shards(directory, options.shards)
        source = ShardSource(ShardInputs.parse(str(directory)))
        embedder = TimmImageEmbedder("test_vit", embedding_size=768)
        recipe = Recipe.of(embedder, device="cpu")
        spans = []
        for number, per_wave in enumerate([options.shards, *options.per_wave, None]):
            marks: list[float] = []

            def mark(line: str, marks: list[float] = marks) -> None:
                marks.append(time.time())

            started = time.time()
            run_job(
                spark, source, recipe, str(Path(folder) / f"out{number}"),
                JobOptions(plan="fused", shards_per_wave=per_wave), mark,
            )  # fmt: skip
            spans.append((per_wave, len(marks), started, marks[-1]))
        slots = num_slots(spark)
        spark.stop()  # so that the log is whole
        report(
            "waves",
            [
                {
                    "shards per wave": per_wave or "default",
                    "waves": waves,
                    "shards per slot and wave": options.shards / waves / slots,
                    "images/s": num_images / (until - since),
                    "slots busy": busy_seconds(log, since, until) / (slots * (until - since)),
                }
                for per_wave, waves, since, until in spans[1:]  # the first starts the workers
            ],
        )


if __name__ == "__main__":
    main()
