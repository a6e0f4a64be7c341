"""A cluster of processes, some of which are killed: the rows stay the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_job import arguments
from test_spark import collected

from examples.photographs import write_photograph_shards
from spark_nsfw.cli import main

SEED = 20
CLUSTER_ROUNDS = 14
DRIVER_KILLS = 6


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYSPARK_GATEWAY")}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def report(tmp_path_factory, detector_path):
    directory = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).with_name("kill_rounds.py")
    command = [sys.executable, str(script), str(directory), detector_path]
    done = subprocess.run(
        [*command, str(CLUSTER_ROUNDS), str(SEED)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    assert lines, done.stderr[-5000:]
    return json.loads(lines[0].removeprefix("REPORT"))


def test_every_task_has_its_own_executors_gpu(report):
    devices = dict(reversed(pair) for pair in report["devices"])
    assert len(devices) == len(report["devices"]) == 2  # one device per executor …
    assert len(set(devices.values())) == 2  # … and no two share one
    assert all(device.startswith("cuda:") for device in devices.values())


def test_a_slot_loads_one_model_and_no_more(report):
    for plan, loads in report["loads"].items():
        assert len(loads) == len(set(loads)), plan  # no process loads twice
        assert len(loads) <= 4, plan  # two executors of two slots
    assert report["loads"]["dataframe"]


def test_killed_workers_and_executors_change_no_row(report):
    assert report["num_rows"] == 48
    assert report["plans_agree"]
    kills = [line for round_ in report["rounds"] for line in round_ if "after" in line]
    assert len(kills) >= CLUSTER_ROUNDS - 4  # a run can be faster than its killer
    assert {line.split()[0] for line in kills} == {"worker", "executor"}
    assert report["unequal"] == []


def test_a_killed_driver_changes_no_row(spark, tmp_path, detector_path):
    write_photograph_shards(tmp_path / "in", num_shards=10, samples_per_shard=4)
    given = arguments(tmp_path / "in", tmp_path / "out", detector_path)
    given += ["--plan=fused", "--shards-per-wave=1"]
    command = [sys.executable, "-m", "spark_nsfw.cli", "score", *given]
    draw = random.Random(SEED)
    waves, kills = tmp_path / "out" / "_spark_nsfw" / "checkpoint" / "offsets", 0
    for _ in range(DRIVER_KILLS):
        begun = len(list(waves.glob("[0-9]*"))) if waves.exists() else 0
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and not (
            waves.exists() and len(list(waves.glob("[0-9]*"))) > begun
        ):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        if process.poll() is None:
            kills += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills >= DRIVER_KILLS - 2
    assert main(["score", *given]) == 0
    undisturbed = arguments(tmp_path / "in", tmp_path / "undisturbed", detector_path)
    assert main(["score", *undisturbed, "--plan=fused"]) == 0
    rows = collected(spark.read.parquet(str(tmp_path / "out")))
    assert len(rows) == 40
    assert rows == collected(spark.read.parquet(str(tmp_path / "undisturbed")))
