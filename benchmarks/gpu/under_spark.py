"""The whole job on a GPU of this machine under Spark: by plan, and by the cores of a task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.setup import Row, Setup

#: Plan, and tasks that share the GPU.
_CASES = [("fused", 2), ("dataframe", 2), ("fused", 1), ("dataframe", 4), ("fused", 4),
          ("fused", 16)]  # fmt: skip


def rates(setup: Setup) -> Iterator[Row]:
    """Images per second of a run whose workers are warm, and the seconds of the run before it.

    Both are whole runs: listing, columns, scoring, Parquet with embeddings, commit, summary.
    """
    from examples.photographs import write_shard

    cores = len(os.sched_getaffinity(0))
    shards, number = (24, 2048) if setup.on_gpu else (4, 64)
    with tempfile.TemporaryDirectory() as directory:
        jpegs = setup.jpegs
        for name, count, images in (("few", cores, 64), ("many", shards, number)):
            folder = Path(directory) / name
            folder.mkdir()
            samples = ((f"{i:06}", [("jpg", jpegs[i % len(jpegs)])]) for i in range(images))
            write_shard(folder / "000.tar", samples)
            for index in range(1, count):
                os.link(folder / "000.tar", folder / f"{index:03}.tar")
        for plan, tasks in _CASES:
            if tasks > cores:
                continue
            arguments = [
                setup.model, setup.embedding_size or 0, setup.device, setup.detectors, directory,
                plan, cores // tasks,
            ]  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.gpu.under_spark", *map(str, arguments)]
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
            if ended.returncode != 0:
                yield {"plan": plan, "tasks": tasks, "failed": ended.stderr[-3000:]}
                continue
            yield {
                "plan": plan,
                "tasks": tasks,
                "cores of a task": cores // tasks,
                "images": shards * number,
                **json.loads(ended.stdout.splitlines()[-1]),
            }


def _process(setup: Setup, directory: str, plan: str, task_cores: int) -> None:
    """Run the job twice in one session, and tell how long it took."""
    began = time.perf_counter()
    os.environ |= {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": f"--conf spark.task.cpus={task_cores} pyspark-shell",
    }
    from spark_nsfw.read.paths import ShardInputs
    from spark_nsfw.read.shards import SampleOptions, ShardSource
    from spark_nsfw.score.laion import DETECTORS
    from spark_nsfw.score.nsfw import NsfwClassifier
    from spark_nsfw.score.recipe import Recipe
    from spark_nsfw.spark.job import JobOptions, run_job
    from spark_nsfw.spark.session import start_session

    session = start_session(scores=True)
    embedder = setup.embedder()
    detector = DETECTORS[embedder.embedding_size]
    classifier = NsfwClassifier(model_path=f"{setup.detectors}/{detector.file_name}")
    recipe = Recipe.of(embedder, [classifier], device=setup.device if not setup.on_gpu else None)
    spark = session()
    told: dict[str, float] = {}
    for name in ("few", "many"):
        source = ShardSource(ShardInputs.parse(f"{directory}/{name}"), SampleOptions())
        output = tempfile.mkdtemp(dir=directory)
        options = JobOptions(plan=plan, progress="json")  # type: ignore[arg-type]
        started = time.perf_counter()
        summary = run_job(spark, source, recipe, output, options)
        seconds = time.perf_counter() - started
        if summary.num_scored != summary.num_samples:
            raise RuntimeError(f"{summary.num_samples - summary.num_scored} images have no score")
        if name == "few":
            told["first run s"] = time.perf_counter() - began
        else:
            told["images/s"] = summary.num_scored / seconds
    print(json.dumps(told), flush=True)
    spark.stop()


if __name__ == "__main__":
    model, width, device, detectors, directory, plan, cores = sys.argv[1:]
    _process(
        Setup(model, int(width) or None, device, None, detectors, 1), directory, plan, int(cores)
    )
