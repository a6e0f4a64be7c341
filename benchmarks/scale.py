"""Cost per shard, and of planning: ``python -m benchmarks.scale [--shards 100 1000 10000]``.

The job runs over shards of two small images each; planning lists 100,000 shards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import report
from examples.photographs import encode, photographs, write_shard
from spark_nsfw import TimmImageEmbedder
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.spark.job import JobOptions, run_job
from spark_nsfw.spark.reader import list_shards
from spark_nsfw.spark.session import active_or_local_session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--planned", type=int, default=100_000)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(["", str(Path(__file__).parents[1])])
    spark = active_or_local_session()
    embedder = TimmImageEmbedder("test_vit2", embedding_size=64)
    small = [encode(p, quality=80) for p, _ in zip(photographs(32, 40), range(2), strict=False)]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.tar"
        write_shard(shard, [("a", [("jpg", small[0])]), ("b", [("jpg", small[1])])])
        for number, count in enumerate([options.shards[0], *options.shards]):
            directory = Path(folder) / "in"
            directory.mkdir()
            for index in range(count):
                shutil.copyfile(shard, directory / f"{index:06}.tar")
            output = Path(folder) / "out"
            started = time.perf_counter()
            summary = run_job(
                spark, ShardInputs.parse(str(directory)), str(output), embedder,
                options=JobOptions(plan="fused", shards_per_wave=1000), report=lambda _: None,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            assert summary.num_samples == 2 * count
            if number:  # the first run starts the workers and is not counted
                rows.append(
                    {"step": "score", "shards": count, "seconds": seconds,
                     "ms per shard": 1000 * seconds / count}
                )  # fmt: skip
            shutil.rmtree(directory)
            shutil.rmtree(output)
        directory = Path(folder) / "many"
        for index in range(options.planned):
            below = directory / f"{index // 1000:03}"
            if index % 1000 == 0:
                below.mkdir(parents=True)
                shutil.copyfile(shard, below / "original")  # a file has 65,000 links at most
            os.link(below / "original", below / f"{index:06}.tar")
        started = time.perf_counter()
        assert len(list_shards(spark, ShardInputs.parse(str(directory)))) == options.planned
        seconds = time.perf_counter() - started
        rows.append(
            {"step": "plan", "shards": options.planned, "seconds": seconds,
             "ms per shard": 1000 * seconds / options.planned}
        )  # fmt: skip
    report("scale", rows)


if __name__ == "__main__":
    sys.exit(main())
