"""Cost per shard, and of listing: ``python -m benchmarks.scale [--shards 100 1000 10000]``.

Lists 100,000 shards and an output of 100,000 partitions, then runs the job over shards of two
small images each, in waves of the default sizes. Memory is the driver process's peak so far.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import report
from examples.photographs import encode, photographs, write_shard
from spark_nsfw import TimmImageEmbedder
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.job import JobOptions, run_job
from spark_nsfw.spark.session import active_or_local_session
from spark_nsfw.use.metadata import MetadataFiles

#: ext4 takes 65,000 links to a file, and is slow with millions of names in a directory.
_LINKS_PER_FILE = 1000


def peak_mib() -> float:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(step: str, count: int, action: Callable[[], int]) -> dict[str, object]:
    """A row of the table; the action returns the number of shards that it saw."""
    started = time.perf_counter()
    seen = action()
    seconds = time.perf_counter() - started
    assert seen == count, f"{step}: {seen} of {count}"
    return {
        "step": step,
        "shards": count,
        "seconds": seconds,
        "ms per shard": 1000 * seconds / count,
        "driver's peak MiB": peak_mib(),
    }


def link_many(original: Path, names: list[Path]) -> None:
    """The same file under many names."""
    for index, name in enumerate(names):
        name.parent.mkdir(parents=True, exist_ok=True)
        if index % _LINKS_PER_FILE == 0:
            original = Path(shutil.copyfile(original, name))
        else:
            os.link(original, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--listed", type=int, default=100_000)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(["", str(Path(__file__).parents[1])])
    rows: list[dict[str, object]] = [{"step": "start", "driver's peak MiB": peak_mib()}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard = folder / "shard.tar"
        shard.write_bytes(b"listed, not read")
        many, parts, count = folder / "many", folder / "parts", options.listed
        link_many(shard, [many / f"{i // 1000:03}" / f"{i:06}.tar" for i in range(count)])
        source = ShardSource(ShardInputs.parse(str(many)))
        rows.append(timed("list shards", count, lambda: len(source.units())))
        link_many(shard, [parts / f"shard={i:06}" / "part-0.parquet" for i in range(count)])
        rows.append(timed("list output", count, lambda: len(MetadataFiles(str(parts)).done())))
        shutil.rmtree(many)
        shutil.rmtree(parts)

        small = [encode(p, quality=80) for p, _ in zip(photographs(32, 40), "ab", strict=False)]
        write_shard(shard, [("a", [("jpg", small[0])]), ("b", [("jpg", small[1])])])
        recipe = Recipe.of(TimmImageEmbedder("test_vit2", embedding_size=64), device="cpu")
        spark = active_or_local_session()
        for number, count in enumerate([options.shards[0], *options.shards]):
            directory, output = folder / "in", folder / "out"
            link_many(shard, [directory / f"{i:06}.tar" for i in range(count)])

            def score(directory: Path = directory, output: Path = output) -> int:
                source = ShardSource(ShardInputs.parse(str(directory)))
                job = JobOptions(plan="fused")
                summary = run_job(spark, source, recipe, str(output), job, lambda _: None)
                return summary.num_samples // 2

            row = timed("score", count, score)
            if number:  # the first run starts the workers and is not counted
                rows.append(row)
            shutil.rmtree(directory)
            shutil.rmtree(output)
    report("scale", rows)


if __name__ == "__main__":
    sys.exit(main())
