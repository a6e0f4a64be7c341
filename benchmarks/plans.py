"""The same shards, the same small tower, three ways taking turns: ``python -m benchmarks.plans``.

(a) the core's scorer in one process, without Spark; (b) the fused plan; (c) the DataFrame plan;
(d) and (e) the fused plan on the same images in Parquet files and in folders of files.
Every way has the same cores. Starting processes and loading models is not timed. Spark's results
go to its ``noop`` sink. ``benchmarks.peers`` compares with other systems.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import report
from examples.photographs import write_photograph_shards
from spark_nsfw import (
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_rows,
    read_webdataset,
    score_samples,
)
from spark_nsfw.read.inputs import open_source
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.plans import metadata_rows

BATCH_SIZE = 64
#: Rounds that do not count: processes start, models load, the JVM compiles.
WARM_UPS = 2
#: The smallest that timm has: on a GPU the tower takes nothing of the cores.
TOWER = "test_vit"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detector", default="../shared/laion/clip_autokeras_binary_nsfw.zip")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images", type=int, default=260, help="per shard")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    num_images = options.shards * options.images

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_photograph_shards(directory / "tar", options.shards, options.images)
        copy_images(directory)
        ways = {
            "a: core": core(directory / "tar", options.detector, cores),
            **spark_ways(directory, options.detector, cores),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UPS):
            for name, way in ways.items():
                assert way() == num_images, name
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
                print(f"{name}: {num_images / seconds[name][-1]:.1f} images/s", flush=True)
    rates = {name: num_images / float(np.median(times)) for name, times in seconds.items()}
    report(
        "plans",
        [
            {
                "way": name,
                "images/s": rate,
                "slowest": num_images / max(seconds[name]),
                "fastest": num_images / min(seconds[name]),
                "of (a)": rate / rates["a: core"],
            }
            for name, rate in rates.items()
        ],
    )


def copy_images(directory: Path) -> None:
    """The images of the shards in Parquet files and folders, one for each shard."""
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    (directory / "parquet").mkdir()
    for path in (directory / "tar").glob("*.tar"):
        with tarfile.open(path) as archive:
            members = [m for m in archive if m.name.endswith(".jpg")]
            images = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
        pq.write_table(
            pa.table({"key": [*images], "image": [*images.values()]}),
            directory / "parquet" / f"{path.stem}.parquet",
            row_group_size=100,
        )
        folder = directory / "files" / path.stem
        folder.mkdir(parents=True)
        for name, image in images.items():
            (folder / name).write_bytes(image)


def embedder(detector: str, threads: int) -> TimmImageEmbedder:
    return TimmImageEmbedder(
        TOWER,
        embedding_size=768,
        batch_size=BATCH_SIZE,
        num_threads_per_worker=threads,
        classifiers=[NsfwClassifier(model_path=detector)],
    )


def core(directory: Path, detector: str, cores: int) -> Callable[[], int]:
    scorer = Scorer(embedder(detector, cores), device="cpu")
    shards = [(str(path), path.stem) for path in sorted(directory.glob("*.tar"))]

    def run() -> int:
        torch.set_num_threads(cores)
        batches = iter_sample_rows(shards, SampleOptions())
        return sum(batch.num_rows for batch in scorer.score_rows(batches))

    return run


def spark_ways(directory: Path, detector: str, cores: int) -> dict[str, Callable[[], int]]:
    from pyspark.sql import DataFrame, SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join(["", str(Path(__file__).parents[1])])
    spark = (
        SparkSession.builder.master(f"local[{cores}]")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "256")
        .config("spark.python.daemon.module", "spark_nsfw.spark.daemon")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("OFF")
    source = ShardSource(ShardInputs.parse(str(directory / "tar")), columns=())
    units = source.units()
    others = {
        "d: fused plan, Parquet": open_source(directory / "parquet"),
        "e: fused plan, files": open_source(directory / "files"),
    }
    ours = embedder(detector, 1)
    recipe = Recipe.of(ours, device="cpu").ready()

    def through(build: Callable[[], DataFrame]) -> Callable[[], int]:
        frame = build()

        def run() -> int:
            frame.write.format("noop").mode("overwrite").save()
            return options_images(directory)

        assert frame.count() == options_images(directory)
        return run

    return {
        "b: fused plan": through(
            lambda: metadata_rows(spark, units, source, recipe, source.schema())
        ),
        "c: DataFrame plan": through(
            lambda: score_samples(
                read_webdataset(spark, str(directory / "tar"), columns=[]), ours, device="cpu"
            )
        ),
        **{
            name: through(
                lambda s=s: metadata_rows(spark, s.units(), s, recipe, s.schema())  # type: ignore[misc]
            )
            for name, s in others.items()
        },
    }


def options_images(directory: Path) -> int:
    import tarfile

    count = 0
    for path in (directory / "tar").glob("*.tar"):
        with tarfile.open(path) as archive:
            count += sum(name.endswith(".jpg") for name in archive.getnames())
    return count


if __name__ == "__main__":
    main()
