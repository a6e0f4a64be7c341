"""A session on Spark's local-cluster: executors that are processes, with a simulated GPU each.

``python kill_rounds.py DIRECTORY DETECTOR KILLS SEED`` runs what `test_kills` asks for and prints
JSON; it is a process of its own, since a process has one SparkContext.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyspark
from pyspark import TaskContext
from pyspark.sql import SparkSession
from scoring import score_into

from examples.photographs import write_photograph_shards
from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from spark_nsfw.errors import JobError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.spark.worker import choose_device

#: Imports torch once for all workers of an executor.
DAEMON = "spark_nsfw.spark.daemon"

#: Short queries, each seen once: better to run them than to optimise their bytecode.
QUICK_START = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"

#: Gives every executor another address, as a machine with several GPUs would.
DISCOVERY = """#!/bin/sh
exec 9>>{counter}
flock 9
address=$(wc -l <{counter})
echo taken >>{counter}
printf '{{"name": "gpu", "addresses": ["%s"]}}\\n' "$address"
"""


def start(directory: Path) -> SparkSession:
    script = directory / "discover.sh"
    script.write_text(DISCOVERY.format(counter=directory / "addresses"))
    script.chmod(0o755)
    os.environ["SPARK_HOME"] = str(Path(pyspark.__file__).parent)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    settings = {
        "spark.ui.enabled": "false",
        "spark.python.daemon.module": DAEMON,  # new executors start sooner
        "spark.driver.extraJavaOptions": QUICK_START,
        "spark.executor.extraJavaOptions": QUICK_START,
        "spark.executor.memory": "1g",
        "spark.worker.resource.gpu.amount": "1",
        "spark.worker.resource.gpu.discoveryScript": str(script),
        "spark.executor.resource.gpu.amount": "1",
        "spark.task.resource.gpu.amount": "0.5",
        "spark.task.maxFailures": "8",
    }
    builder = SparkSession.builder.master("local-cluster[2,2,1024]").appName("tests")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    return session


class CountingClassifier(NsfwClassifier):
    """Leaves a file for every model that is loaded for scoring."""

    def load_model(self, device):
        if TaskContext.get() is not None:
            name = f"{os.getppid()}-{os.getpid()}-{time.monotonic_ns()}"
            (self.directory / name).touch()
        return super().load_model(device)


def devices(spark: SparkSession) -> list[tuple[str, int]]:
    """Each task's device and its daemon's process, which is one per executor."""

    def tell(batches):
        time.sleep(0.3)
        for _ in batches:
            yield pa.RecordBatch.from_arrays(
                [pa.array([choose_device()]), pa.array([os.getppid()])], names=["device", "parent"]
            )

    rows = spark.range(8, numPartitions=8).mapInArrow(tell, "device string, parent long").collect()
    return sorted({(row["device"], row["parent"]) for row in rows})


def rows_of(spark: SparkSession, output: Path) -> list[str]:
    """Every row as text, floats to the last bit, sorted."""
    return sorted(spark.read.parquet(str(output)).toJSON().collect())


def victims(kind: str) -> list[psutil.Process]:
    """Python workers, or executors, of this process's cluster."""
    below = psutil.Process().children(recursive=True)
    found = []
    for process in below:
        try:
            command = " ".join(process.cmdline())
            if kind == "executor":
                fits = "CoarseGrainedExecutorBackend" in command
            else:
                parent = " ".join(process.parent().cmdline())
                fits = DAEMON in command and DAEMON in parent
        except (psutil.NoSuchProcess, AttributeError):
            continue
        if fits:
            found.append(process)
    return found


def kill_now_and_then(
    kind: str, most: int, draw: random.Random, done: threading.Event, killed: list[str]
) -> None:
    """SIGKILL one of them at random moments, until the run is done or enough are dead."""
    while len(killed) < most and not done.wait(draw.uniform(0.2, 1.5)):
        alive = victims(kind)
        if alive:
            victim = draw.choice(alive)
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(f"{kind} {victim.pid}")


def main() -> None:
    directory, detector = Path(sys.argv[1]), sys.argv[2]
    num_kills, draw = int(sys.argv[3]), random.Random(int(sys.argv[4]))
    spark = start(directory)
    write_photograph_shards(directory / "in", num_shards=24, samples_per_shard=4)
    inputs = ShardInputs.parse(str(directory / "in"))
    classifier = CountingClassifier(model_path=detector)
    classifier.directory = directory / "loads"
    classifier.directory.mkdir()
    embedder = TimmImageEmbedder("test_vit", embedding_size=768, classifiers=[classifier])

    def run(output: Path, plan: str) -> None:
        score_into(
            spark, inputs, output, embedder, plan=plan, shards_per_wave=8, device="cpu",
            report=lambda _: None,
        )  # fmt: skip

    report = {"devices": devices(spark), "loads": {}, "rounds": [], "killed": [], "unequal": []}
    for plan in ("dataframe", "fused"):
        before = set(classifier.directory.iterdir())
        run(directory / plan, plan)
        new = [path.name.rsplit("-", 1)[0] for path in set(classifier.directory.iterdir()) - before]
        report["loads"][plan] = sorted(new)
    expected = rows_of(spark, directory / "fused")
    report["num_rows"] = len(expected)
    report["plans_agree"] = expected == rows_of(spark, directory / "dataframe")

    for kind in ("worker", "executor"):
        for plan in ("fused", "dataframe"):
            killed: list[str] = []
            while len(killed) < num_kills // 4:
                output = directory / f"round{len(report['rounds'])}"
                done = threading.Event()
                given = kind, num_kills // 4, draw, done, killed
                killer = threading.Thread(target=kill_now_and_then, args=given)
                killer.start()
                try:
                    run(output, plan)
                except JobError:
                    run(output, plan)
                done.set()
                killer.join()
                report["rounds"].append(f"{plan} {kind}")
                if rows_of(spark, output) != expected:
                    report["unequal"].append(report["rounds"][-1])
            report["killed"] += killed
    print("REPORT" + json.dumps(report))
    spark.stop()


if __name__ == "__main__":
    main()
