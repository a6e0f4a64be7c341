"""Processes that are killed, and runs side by side: the rows stay the same."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import kill_driver
import pyspark
import pytest
from kill_driver import Gate
from pyspark import cloudpickle
from scoring import score_into
from test_job import arguments
from test_spark import collected

from examples.photographs import write_photograph_shards
from spark_nsfw.cli import main

SEED = 20
CLUSTER_KILLS = 20

pytestmark = pytest.mark.cluster


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYSPARK_GATEWAY")}
    here = Path(__file__)
    places = [Path(pyspark.__file__).parents[1], here.parents[1], here.parent]
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, places))}


@pytest.fixture(scope="module")
def report(tmp_path_factory, detector_path):
    directory = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).with_name("kill_rounds.py")
    command = [sys.executable, str(script), str(directory), detector_path]
    done = subprocess.run(
        [*command, str(CLUSTER_KILLS), str(SEED)],
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
    assert report["num_rows"] == 96
    assert report["plans_agree"]
    assert len(report["killed"]) == CLUSTER_KILLS
    assert {line.split()[0] for line in report["killed"]} == {"worker", "executor"}
    assert {*report["rounds"]} == {
        f"{plan} {kind}" for plan in ("fused", "dataframe") for kind in ("worker", "executor")
    }
    assert report["unequal"] == []


@pytest.fixture(scope="module")
def four_shards(spark, tmp_path_factory, detector_path):
    """Shards, and the rows of a run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("four")
    write_photograph_shards(directory / "in", num_shards=4, samples_per_shard=3)
    cloudpickle.register_pickle_by_value(kill_driver)
    calm = kill_driver.embedder(detector_path, Gate())
    score_into(spark, str(directory / "in"), directory / "calm", calm, plan="fused")
    yield directory / "in", collected(spark.read.parquet(str(directory / "calm")))
    cloudpickle.unregister_pickle_by_value(kill_driver)


def commits(output, algorithm):
    """Tasks that a run has committed: published at once, or set aside for the driver."""
    if algorithm == "2":
        return len(list(output.glob("shard=0*/part-*.parquet")))
    return len(list(output.glob("_temporary/*/task_*")))


#: Algorithm and number of commits. Only the last task's commit ends a run, so that it is killed
#: as soon as that happens; the others wait for each other.
KILLED_DRIVERS = [
    [f"{algorithm}-{limit}" for algorithm in (1, 2) for limit in range(4)],
    ["1-4"],
    ["2-4"],
]


@pytest.fixture(scope="module")
def killed(four_shards, detector_path, tmp_path_factory):
    """What runs left whose drivers were killed: for each, its output and its commits."""
    directory = tmp_path_factory.mktemp("killed")

    def reached(name):
        algorithm, limit = name.split("-")
        num_started = len(list((directory / name / "tickets").iterdir()))
        num_committed = commits(directory / name / "out", algorithm)
        return num_started == 4 and num_committed == int(limit)

    def run_and_kill(names):
        for name in names:
            (directory / name / "tickets").mkdir(parents=True)
        script = [sys.executable, kill_driver.__file__, str(four_shards[0]), str(directory)]
        process = subprocess.Popen(
            [*script, detector_path, *names],
            env=environment(), stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and not all(map(reached, names)):
                time.sleep(0.005)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_and_kill, KILLED_DRIVERS))
    return {
        name: (directory / name / "out", commits(directory / name / "out", name[0]))
        for names in KILLED_DRIVERS
        for name in names
    }


@pytest.mark.parametrize("algorithm", ["1", "2"])
def test_a_driver_that_is_killed_after_any_commit_changes_no_row(
    spark, four_shards, killed, detector_path, monkeypatch, algorithm
):
    shards, expected = four_shards
    assert [killed[f"{algorithm}-{limit}"][1] for limit in range(4)] == [0, 1, 2, 3]
    monkeypatch.setattr(
        "spark_nsfw.spark.output.committer_of", kill_driver.committing_by(algorithm)
    )
    for limit in range(5):
        calm = kill_driver.embedder(detector_path, Gate())
        output, _ = killed[f"{algorithm}-{limit}"]
        score_into(spark, str(shards), output, calm, plan="fused", report=lambda _: None)
        assert collected(spark.read.parquet(str(output))) == expected, limit


def test_two_commands_side_by_side_both_end_well(spark, four_shards, tmp_path, detector_path):
    shards, _ = four_shards
    given = arguments(shards, tmp_path / "out", detector_path)
    command = [sys.executable, "-m", "spark_nsfw.cli", "score", *given, "--plan=fused"]
    processes = []
    for _ in range(2):
        processes.append(
            subprocess.Popen([*command, "--shards-per-wave=1"], env=environment(),
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        )  # fmt: skip
        time.sleep(1.5)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    alone = arguments(shards, tmp_path / "alone", detector_path)
    assert main(["score", *alone, "--plan=fused"]) == 0
    rows = collected(spark.read.parquet(str(tmp_path / "out")))
    assert len(rows) == 12
    assert rows == collected(spark.read.parquet(str(tmp_path / "alone")))
