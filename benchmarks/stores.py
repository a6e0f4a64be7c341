"""What an object store costs: ``make bench-stores``.

A real S3 server on this machine (versitygw, from ``scripts/fetch_stores.sh``), behind a proxy that
lets every request wait 30 ms and sends 200 MB/s. Three things are counted: reading one large shard
and scoring it, against the same from a local disk; a wave of many small shards; listing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.plans import embedder
from benchmarks.table import report
from examples.photographs import write_photograph_shards
from spark_nsfw import SampleOptions, Scorer, iter_sample_rows, storage
from spark_nsfw.files import iter_files
from spark_nsfw.hadoop import HadoopSettings

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from faulty_proxy import FaultyProxy
from stores import ACCESS_KEY, SECRET_KEY, versitygw

LATENCY_SECONDS, BYTES_PER_SECOND = 0.03, 200e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detector", default="../shared/laion/clip_autokeras_binary_nsfw.zip")
    parser.add_argument("--images", type=int, default=4000, help="in the large shard")
    parser.add_argument("--shards", type=int, default=100, help="in the wave")
    parser.add_argument("--objects", type=int, default=100_000, help="to be listed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        buckets = directory / "buckets"
        with versitygw(buckets, directory / "log") as url, FaultyProxy(url) as proxy:
            settings = {
                "fs.s3a.endpoint": proxy.url,
                "fs.s3a.endpoint.region": "us-east-1",
                "fs.s3a.path.style.access": "true",
                "fs.s3a.access.key": ACCESS_KEY,
                "fs.s3a.secret.key": SECRET_KEY,
            }
            storage.use_settings(HadoopSettings(settings))
            proxy.fail(times=None, delay_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND)
            for name in ("large", "many", "wave"):
                (buckets / name / "x").mkdir(parents=True)  # a bucket is a directory
            rows = list(_reading(directory, options, proxy))
            rows += _listing(buckets, options.objects, proxy)
            rows += _wave(buckets, options, proxy, settings)
    report("stores", rows)


def _counted(proxy: FaultyProxy, run: Callable[[], object]) -> tuple[float, int]:
    before, began = len(proxy.requests), time.perf_counter()
    run()
    return time.perf_counter() - began, len(proxy.requests) - before


def _reading(
    directory: Path, options: argparse.Namespace, proxy: FaultyProxy
) -> Iterator[dict[str, object]]:
    write_photograph_shards(directory / "in", 1, options.images)
    local = directory / "in" / "00000.tar"
    remote = "s3://large/x/00000.tar"
    shutil.copyfile(local, directory / "buckets" / "large" / "x" / "00000.tar")
    scorer = Scorer(embedder(options.detector, len(os.sched_getaffinity(0))), device="cpu")

    def read(url: str) -> None:
        for _ in iter_sample_rows([(url, "s")], SampleOptions()):
            pass

    def score(url: str) -> None:
        for _ in scorer.score_rows(iter_sample_rows([(url, "s")], SampleOptions())):
            pass

    score(str(local))
    for name, run in (("read a shard", read), ("read and score it", score)):
        seconds: dict[str, list[float]] = {str(local): [], remote: []}
        requests = 0
        for _ in range(options.rounds):
            for url, times in seconds.items():
                taken, requests = _counted(proxy, lambda url=url, run=run: run(url))
                times.append(taken)
        here, there = (sorted(times)[len(times) // 2] for times in seconds.values())
        yield {
            "what": f"{name}, {local.stat().st_size / 1e6:.0f} MB",
            "s": there,
            "from a local disk, s": here,
            "rate / local": here / there,
            "requests": requests,
        }


def _listing(buckets: Path, num_objects: int, proxy: FaultyProxy) -> Iterator[dict[str, object]]:
    directory = buckets / "many" / "x"
    for number in range(num_objects):
        (directory / f"{number:06}.tar").touch()
    count = 0

    def run() -> None:
        nonlocal count
        count = sum(1 for _ in iter_files("s3://many/x"))

    seconds, requests = _counted(proxy, run)
    assert count == num_objects, count
    yield {"what": f"list {num_objects:,} objects", "s": seconds, "requests": requests}


def _wave(
    buckets: Path, options: argparse.Namespace, proxy: FaultyProxy, settings: dict[str, str]
) -> Iterator[dict[str, object]]:
    import pyspark
    from pyspark.sql import SparkSession

    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.read.shards import ShardSource
    from spark_nsfw.score.recipe import Recipe
    from spark_nsfw.spark.job import JobOptions, write_units
    from spark_nsfw.spark.output import ParquetOutput

    os.environ["PYSPARK_PYTHON"] = sys.executable
    more = {
        "spark.jars.packages": "org.apache.hadoop:hadoop-aws:3.4.2,"
        f"org.apache.spark:spark-hadoop-cloud_2.13:{pyspark.__version__}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.python.daemon.module": "spark_nsfw.spark.daemon",
    }
    builder = SparkSession.builder.master("local[2]")
    for name, value in (more | {f"spark.hadoop.{k}": v for k, v in settings.items()}).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    write_photograph_shards(buckets / "wave" / "in", options.shards, 4)
    recipe = Recipe.of(embedder(options.detector, 1), device="cpu").ready()
    job = JobOptions(plan="fused", shards_per_wave=options.shards)

    def run(name: str) -> Callable[[], object]:
        source = ShardSource(ShardInputs.parse("s3a://wave/in"), columns=())
        output = ParquetOutput(spark, f"s3a://wave/{name}")
        return lambda: write_units(spark, source, recipe, output, job)

    run("first")()  # the JVM compiles, workers load models
    seconds, requests = _counted(proxy, run("out"))
    yield {"what": f"a wave of {options.shards} shards", "s": seconds, "requests": requests}


if __name__ == "__main__":
    main()
