"""Stopped, starved, poisoned: whatever happens to a run, the next one ends with the same rows."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

import kill_driver
import numpy as np
import pyarrow.parquet as pq
import pyspark
import pytest
import test_resume
import torch
from PIL import Image
from pyspark import cloudpickle
from scoring import score_into
from test_job import arguments, run
from test_spark import collected

from examples.photographs import encode, write_photograph_shards, write_shard
from spark_nsfw import AestheticClassifier, ImageClassifier, TimmImageEmbedder
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError, JobError, JobStoppedError, StorageError
from spark_nsfw.files import write_file
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.read.source import Unit
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark import job
from spark_nsfw.spark.job import JobOptions, run_job
from spark_nsfw.spark.units import tasks_of
from spark_nsfw.spark.waves import Crashes, ReadFailures, WaveSizes, reason, write_apart
from spark_nsfw.use.metadata import MetadataFiles


@pytest.fixture
def inputs(tmp_path):
    write_photograph_shards(tmp_path / "in", num_shards=4, samples_per_shard=3)
    return tmp_path / "in"


@pytest.fixture
def undisturbed(spark, inputs, embedder, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(spark, str(inputs), output, embedder, plan="fused")
    rows = collected(spark.read.parquet(str(output)))
    assert len(rows) == 12
    return rows


def rows_of(spark, output):
    return collected(spark.read.parquet(str(output)))


def run_reporting(spark, inputs, output, embedder, report, stop=None, **options):
    options = {"plan": "fused", "shards_per_wave": 1} | options
    return score_into(spark, str(inputs), output, embedder, report=report, stop=stop, **options)


def test_a_stopped_run_goes_on_where_it_was(spark, inputs, undisturbed, embedder, tmp_path):
    stop, lines = threading.Event(), []

    def report(line):
        lines.append(line)
        if line.startswith("wave 2"):
            stop.set()

    output = tmp_path / "out"
    with pytest.raises(JobStoppedError, match="run the same command again to continue"):
        run_reporting(spark, inputs, output, embedder, report, stop)
    assert len(lines) == 2
    again = []
    run_reporting(spark, inputs, output, embedder, again.append)
    assert len(again) == 2
    assert "4 of 4 shards done" in again[-1]
    assert rows_of(spark, output) == undisturbed


def test_a_shard_that_vanishes_is_told_and_scored_once_it_is_back(
    spark, inputs, undisturbed, embedder, tmp_path
):
    write_photograph_shards(tmp_path / "other", num_shards=1, samples_per_shard=2, seed=5)
    lines = []

    def report(line):
        lines.append(line)
        if line.startswith("wave 1:"):
            (inputs / "00002.tar").rename(tmp_path / "00002.tar")
            shutil.copyfile(tmp_path / "other" / "00000.tar", inputs / "00003.tar")

    summary = run_reporting(spark, inputs, tmp_path / "out", embedder, report)
    rows = rows_of(spark, tmp_path / "out")
    kept = {identity: row for identity, row in undisturbed.items() if identity[0] < "00002"}
    assert len(kept) == 6
    assert kept.items() <= rows.items()
    assert {shard for shard, _ in rows} == {"00000", "00001", "00003"}
    assert sorted(key for shard, key in rows if shard == "00003") == ["000000000", "000000001"]
    assert (summary.num_shards, summary.num_samples) == (3, 8)
    (told,) = (line for line in lines if "disappeared before being scored" in line)
    assert told.startswith("1 shard disappeared")
    assert "00002.tar" in told
    (tmp_path / "00002.tar").rename(inputs / "00002.tar")
    run_reporting(spark, inputs, tmp_path / "out", embedder, lines.append)
    kept |= {identity: row for identity, row in undisturbed.items() if identity[0] == "00002"}
    assert kept.items() <= rows_of(spark, tmp_path / "out").items()


def test_a_shard_that_cannot_be_read_now_stops_the_run_and_gets_no_row(
    spark, inputs, undisturbed, embedder, tmp_path, s3
):
    for path in inputs.glob("*.tar"):
        write_file(f"{s3.url}/in/{path.name}", path.read_bytes())
    environment = spark.sparkContext.environment  # of Python workers
    mine = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment.update(mine)
    output = tmp_path / "out"
    try:
        s3.proxy.fail("GET", r"00001\.tar", status=403, times=1000)  # an expired token, say
        with pytest.raises(JobError, match=r"run again to resume: .*StorageError") as refused:
            run_reporting(spark, f"{s3.url}/in", output, embedder, lambda _: None)
        assert "00001.tar cannot be read now" in str(refused.value)
        assert "\n" not in str(refused.value)
        kept = {identity: row for identity, row in undisturbed.items() if identity[0] != "00001"}
        assert rows_of(spark, output) == kept  # the waves after it were written
        s3.proxy.mend()
        run_reporting(spark, f"{s3.url}/in", output, embedder, lambda _: None)
    finally:
        for name in mine:
            del environment[name]
    assert rows_of(spark, output) == undisturbed


@dataclass(frozen=True)
class Forbidding(ShardSource):
    """Some of its shards cannot be read now."""

    forbidden: tuple[str, ...] = ()

    def read(self, unit, schema):
        if unit.name in self.forbidden:
            raise StorageError(f"{unit.place} cannot be read now")
        return super().read(unit, schema)


@pytest.mark.parametrize("algorithm", ["1", "2"])
def test_an_unreadable_shard_keeps_no_other_of_its_wave_unpublished(
    spark, inputs, undisturbed, embedder, tmp_path, monkeypatch, algorithm
):
    """Algorithm 1 publishes at the end of a write, as the stores' own committers do."""
    monkeypatch.setattr(
        "spark_nsfw.spark.output.committer_of", kill_driver.committing_by(algorithm)
    )
    source = Forbidding(ShardInputs.parse(str(inputs)), forbidden=("00002",))
    recipe, options = Recipe.of(embedder), JobOptions("fused", shards_per_wave=4)
    output, lines = str(tmp_path / "out"), []
    cloudpickle.register_pickle_by_value(test_resume)
    try:
        for _ in range(2):
            with pytest.raises(JobError, match=r"again to resume: .*/00002\.tar cannot be read"):
                run_job(spark, source, recipe, output, options, lines.append)
            kept = {i: row for i, row in undisturbed.items() if i[0] != "00002"}
            assert rows_of(spark, output) == kept
    finally:
        cloudpickle.unregister_pickle_by_value(test_resume)
    (told,) = lines
    assert told.startswith("wave 1: 3 of 4 shards done; this run: 9 images scored")
    run_reporting(spark, inputs, output, embedder, lines.append)
    assert rows_of(spark, output) == undisturbed


def test_rows_that_somebody_deleted_come_back(spark, inputs, undisturbed, embedder, tmp_path):
    output = tmp_path / "out"
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(output / "shard=00001")
    lines = []
    run_reporting(spark, inputs, output, embedder, lines.append)
    assert rows_of(spark, output) == undisturbed
    assert "3 images scored" in lines[0]


def test_nothing_but_the_rows_remembers_what_is_done(
    spark, inputs, undisturbed, embedder, tmp_path
):
    output = tmp_path / "out"
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(output / "_spark_nsfw")
    lines = []
    run_reporting(spark, inputs, output, embedder, lines.append)
    assert lines == ["nothing to do: 4 shards, all scored before"]
    assert rows_of(spark, output) == undisturbed


def test_a_run_that_is_stopped_when_all_is_done_is_done(spark, inputs, embedder, tmp_path):
    stop = threading.Event()

    def report(line):
        if line.startswith("wave 4"):
            stop.set()

    summary = run_reporting(spark, inputs, tmp_path / "out", embedder, report, stop)
    assert summary.num_samples == 12


def test_an_output_that_cannot_be_written(spark, inputs, embedder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"/file/out cannot be written: .*irectory"):
        run_reporting(spark, inputs, tmp_path / "file" / "out", embedder, lambda _: None)


def test_a_full_disk_is_an_error_and_no_row_is_lost(spark, inputs, undisturbed, embedder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(JobError, match="No space left on device"):
            run_reporting(spark, inputs, disk / "out", embedder, lambda _: None)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run_reporting(spark, inputs, disk / "out", embedder, lambda _: None)
        assert rows_of(spark, disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Poison(ImageClassifier):
    """Does something to the process that meets a black image."""

    def __init__(self, embedding, act):
        super().__init__("poison", pred_column="poison")
        self.embedding = embedding
        self.act_name = act.__name__  # or a worker takes one poison for another
        self._act = act

    def load_model(self, device):
        def score(embeddings):
            apart = (embeddings - torch.from_numpy(self.embedding)).abs().amax(dim=1)
            if (apart < 1e-6).any():
                self._act()
            return apart

        return score


class Fault(ImageClassifier):
    """Kills every worker as long as there is a certain file."""

    def __init__(self, file):
        super().__init__("fault", pred_column="fault")
        self.file = file

    def load_model(self, device):
        def score(embeddings):
            if self.file.exists():
                os.abort()
            return embeddings[:, 0]

        return score


def segmentation_fault():
    ctypes.string_at(0)


def sleep_for_ever():
    time.sleep(1e6)


def out_of_patience():
    raise ValueError("a mistake in the classifier")


def out_of_memory():
    raise MemoryError("no room for one image")


@pytest.fixture
def poisoned(inputs, embedder):
    """An embedder whose classifier acts on the second image of shard 00002."""
    black = encode(Image.new("RGB", (300, 300)), quality=90)
    fine = encode(Image.effect_noise((300, 300), 50).convert("RGB"), quality=90)
    write_shard(inputs / "00002.tar", [("a", [("jpg", fine)]), ("b", [("jpg", black)])])
    embedding = embedder.embed([black], device="cpu")[0]
    cloudpickle.register_pickle_by_value(test_resume)
    yield lambda act: TimmImageEmbedder(
        "test_vit2", embedding_size=768, classifiers=[*embedder.classifiers, Poison(embedding, act)]
    )
    cloudpickle.unregister_pickle_by_value(test_resume)


@pytest.mark.parametrize(
    ("plan", "act", "said"),
    [
        ("fused", os.abort, "Python worker exited unexpectedly"),
        ("dataframe", os.abort, "Python worker exited unexpectedly"),
        ("fused", out_of_memory, "no room for one image"),
        pytest.param(
            "fused",
            segmentation_fault,
            r"Segmentation fault, in string_at \(.*, line \d+\), segmentation_fault \(",
            marks=pytest.mark.skipif(pyspark.__version__ < "4", reason="Spark 3.5 tells no more"),
        ),
    ],
)
def test_a_shard_that_kills_its_workers_is_set_aside(
    spark, inputs, undisturbed, poisoned, tmp_path, plan, act, said
):
    lines = []
    summary = run_reporting(
        spark, inputs, tmp_path / "out", poisoned(act), lines.append, plan=plan, shards_per_wave=4
    )
    rows = rows_of(spark, tmp_path / "out")
    status, message, *results = rows.pop(("00002", None))
    assert (status, results) == ("shard_crashed", [None, None])
    assert re.search(said, message)
    assert rows == {i: row for i, row in undisturbed.items() if i[0] != "00002"}
    assert summary.num_crashed_shards == 1
    assert any(line.startswith("set aside") and "00002.tar" in line for line in lines)


@pytest.mark.skipif(pyspark.__version__ < "4.1", reason="Spark 4.1 is the first to kill workers")
@pytest.mark.parametrize("plan", ["fused", "dataframe"])
def test_a_shard_whose_decoder_hangs_is_set_aside(
    spark, inputs, undisturbed, poisoned, tmp_path, monkeypatch, plan
):
    monkeypatch.setitem(job._HUNG_SECONDS, "cpu", 20)
    summary = run_reporting(
        spark, inputs, tmp_path / "out", poisoned(sleep_for_ever), lambda _: None,
        plan=plan, shards_per_wave=1,
    )  # fmt: skip
    rows = rows_of(spark, tmp_path / "out")
    status, message, *_ = rows.pop(("00002", None))
    assert status == "shard_crashed"
    assert re.search("exited unexpectedly|idle timeout", message)
    assert rows == {i: row for i, row in undisturbed.items() if i[0] != "00002"}
    assert summary.num_crashed_shards == 1
    assert spark.conf.get(job._HUNG).rstrip("ms") == "0"


def test_a_users_own_limit_counts(spark, inputs, embedder, tmp_path, monkeypatch):
    seen = []
    original = job.Run.write_difference

    def look(self, units):
        seen.append(spark.conf.get(job._HUNG))
        return original(self, units)

    monkeypatch.setattr(job.Run, "write_difference", look)
    run(spark, str(inputs), tmp_path / "first", embedder)
    run(spark, str(inputs), tmp_path / "first", embedder)
    spark.conf.set(job._HUNG, "77")
    try:
        run(spark, str(inputs), tmp_path / "second", embedder)
    finally:
        spark.conf.unset(job._HUNG)
    assert [limit.rstrip("s") for limit in seen] == ["7200", "7200", "77"]


def test_a_mistake_in_the_code_sets_no_shard_aside(spark, inputs, poisoned, tmp_path):
    with pytest.raises(JobError, match="run again to resume: ValueError: a mistake in the class"):
        run_reporting(spark, inputs, tmp_path / "out", poisoned(out_of_patience), lambda _: None)
    assert "shard_crashed" not in {row[0] for row in rows_of(spark, tmp_path / "out").values()}


def units(*names):
    return [Unit(str(name), f"/in/{name}.tar") for name in names]


@pytest.mark.parametrize("published", [[], [0, 1], [5, 6, 7, 8, 10]])
def test_write_apart_finds_every_shard_that_kills_its_worker(published):
    """Also where a write that failed has published some of its units."""
    bad, written, set_aside = {"3", "4", "9"}, [], {}

    def write(part):
        names = [unit.name for unit in part]
        assert not {*names} & {*written}  # no unit is written twice
        if bad & {*names}:
            written.extend(name for name in names if int(name) in published)
            raise RuntimeError("Python worker exited unexpectedly (crashed)")
        written.extend(names)

    def missing(part):
        return [unit for unit in part if unit.name not in written]

    crashes = Crashes(lambda unit, error: set_aside.update({unit.name: error}))
    write_apart(units(*range(11)), write, missing, crashes, ReadFailures())
    assert sorted(written, key=int) == ["0", "1", "2", "5", "6", "7", "8", "10"]
    assert set_aside == dict.fromkeys(bad, "Python worker exited unexpectedly (crashed)")


class Store:
    """Writes parts whole or not at all, and fails those with a shard that it cannot read."""

    def __init__(self, *unreadable):
        self.unreadable = set(map(str, unreadable))
        self.written, self.tries = [], []

    def write(self, part):
        names = [unit.name for unit in part]
        self.tries.append(names)
        bad = [name for name in names if name in self.unreadable]
        if bad:
            raise RuntimeError(f"spark_nsfw.errors.StorageError: {bad[0]} cannot be read now")
        self.written += names

    def write_wave(self, first, last, failures):
        def missing(part):
            return [unit for unit in part if unit.name not in self.written]

        crashes = Crashes(lambda *_: pytest.fail("no worker died"))
        write_apart(units(*range(first, last)), self.write, missing, crashes, failures)


@pytest.mark.parametrize("unreadable", range(16))
def test_an_unreadable_shard_is_found_in_few_tries(unreadable):
    store, failures = Store(unreadable), ReadFailures()
    with pytest.raises(RuntimeError, match=f": {unreadable} cannot be read now"):
        store.write_wave(0, 16, failures)
    assert sorted(map(int, store.written)) == [n for n in range(16) if n != unreadable]
    assert len(store.tries) == 1 + 2 * 4  # both halves, four times
    store.write_wave(16, 32, failures)
    assert len(store.written) == 31


def test_a_shard_in_each_of_two_waves_keeps_no_other_unpublished():
    store, failures = Store(7, 8), ReadFailures()
    for first in (0, 8):
        with pytest.raises(RuntimeError, match="cannot be read now"):
            store.write_wave(first, first + 8, failures)
    assert sorted(map(int, store.written)) == [*range(7), *range(9, 16)]


def test_a_store_that_cannot_be_read_is_tried_a_few_times_only():
    store, failures = Store(*range(1000)), ReadFailures()
    with pytest.raises(RuntimeError, match=": 64 cannot be read now"):
        store.write_wave(0, 128, failures)
    assert [len(part) for part in store.tries] == [128, 64, 64]
    with pytest.raises(RuntimeError, match=": 128 cannot be read now"):
        store.write_wave(128, 256, failures)
    assert [len(part) for part in store.tries] == [128, 64, 64, 128]
    assert store.written == []


def test_one_shard_that_lives_clears_the_cluster_and_convicts_the_others():
    def write(part):
        if {"a", "b", "d", "e"} & {unit.name for unit in part}:
            raise RuntimeError("Python worker exited unexpectedly (crashed)")

    set_aside = []
    crashes = Crashes(lambda unit, _: set_aside.append(unit.name))
    for shard, convicted in [("a", ""), ("b", ""), ("c", "ab"), ("d", "abd"), ("e", "abde")]:
        write_apart(units(shard), write, list, crashes, ReadFailures())
        assert set_aside == list(convicted)


def test_waves_grow_until_they_take_five_minutes():
    sizes = WaveSizes(num_slots=2)
    assert sizes.next == 64
    sizes.took(64, 1)
    assert sizes.next == 512  # eight times, at most
    sizes.took(512, 600)
    assert sizes.next == 256
    sizes.took(256, 100_000)
    assert sizes.next == 16  # eight for each slot, at least
    sizes.took(16, 0)
    assert sizes.next == 128
    fixed = WaveSizes(num_slots=2, fixed=3)
    fixed.took(3, 1)
    assert fixed.next == 3


@pytest.mark.parametrize("shards_per_wave", [1, 6])
def test_a_cluster_that_kills_every_worker_sets_no_shard_aside(
    spark, inputs, embedder, tmp_path, shards_per_wave
):
    write_photograph_shards(inputs, num_shards=6, samples_per_shard=2)

    fault = tmp_path / "fault"
    fault.touch()
    classifiers = [*embedder.classifiers, Fault(fault)]
    faulty = TimmImageEmbedder("test_vit2", embedding_size=768, classifiers=classifiers)
    output, options = tmp_path / "out", {"shards_per_wave": shards_per_wave}
    cloudpickle.register_pickle_by_value(test_resume)
    try:
        with pytest.raises(
            JobError, match=r"first 4 shards alone: .*spark.executor.memoryOverhead"
        ):
            run_reporting(spark, inputs, output, faulty, lambda _: None, **options)
        assert rows_of(spark, output) == {}
        fault.unlink()
        run_reporting(spark, inputs, output, faulty, lambda _: None, **options)
    finally:
        cloudpickle.unregister_pickle_by_value(test_resume)
    assert {status for status, *_ in rows_of(spark, output).values()} == {"ok"}
    assert len(rows_of(spark, output)) == 12


def test_a_few_shards_that_are_all_there_is_are_set_aside(spark, inputs, poisoned, tmp_path):
    lines = []
    summary = run_reporting(
        spark, inputs / "00002.tar", tmp_path / "out", poisoned(os.abort), lines.append
    )
    assert (summary.num_crashed_shards, summary.num_samples) == (1, 0)


def test_the_reason_is_one_line_of_a_stack_trace():
    text = (
        "An error occurred while calling o1.parquet.\n: org.apache.spark.SparkException: Job\n"
        "\tat org.apache.spark.x\nCaused by: java.io.IOException: No space left on device\n\t... 9"
    )
    assert reason(Exception(text)) == "No space left on device"
    assert reason(Exception("plain")) == "plain"


def test_watching_scores_shards_as_they_arrive(spark, inputs, undisturbed, embedder, tmp_path):
    later = [inputs / f"0000{number}.tar" for number in range(4)]
    for path in later:
        path.rename(tmp_path / path.name)
    stop, lines, summaries = threading.Event(), [], []

    def watch():
        summaries.append(
            run_reporting(
                spark,
                inputs,
                tmp_path / "out",
                embedder,
                lines.append,
                stop,
                watch=True,
                settle_seconds=2,
                shards_per_wave=4,
            )
        )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        time.sleep(1)  # an empty directory is waited for
        for path in later[:2]:
            shutil.copyfile(tmp_path / path.name, path)
        wait_for(lambda: any("2 of 2 shards done" in line for line in lines))
        with open(later[2], "wb") as file:  # an upload that takes its time
            content = (tmp_path / later[2].name).read_bytes()
            for start in range(0, len(content), len(content) // 6):
                file.write(content[start : start + len(content) // 6])
                file.flush()
                time.sleep(1)
        shutil.copyfile(tmp_path / later[3].name, later[3])
        wait_for(lambda: any("4 of 4 shards done" in line for line in lines))
    finally:
        stop.set()
        thread.join()
    assert summaries[0].num_samples == 12
    assert rows_of(spark, tmp_path / "out") == undisturbed


def test_watching_begins_with_what_somebody_deleted(spark, inputs, undisturbed, embedder, tmp_path):
    output, stop, lines = tmp_path / "out", threading.Event(), []
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(output / "shard=00001")

    def report(line):
        lines.append(line)
        stop.set()

    timer = threading.Timer(60, stop.set)  # no line would come, if nothing was done
    timer.start()
    run_reporting(spark, inputs, output, embedder, report, stop, watch=True, settle_seconds=0)
    timer.cancel()
    assert "3 images scored" in lines[0]
    assert rows_of(spark, output) == undisturbed


def test_a_watch_that_is_stopped_with_shards_left_says_so(spark, inputs, embedder, tmp_path):
    stop, lines = threading.Event(), []

    def report(line):
        lines.append(line)
        if line.startswith("wave 1"):
            for number in (5, 6):
                shutil.copyfile(inputs / "00001.tar", inputs / f"0000{number}.tar")
        if line.startswith("wave 5"):
            stop.set()

    with pytest.raises(JobStoppedError, match="stopped after 5 shards"):
        run_reporting(
            spark, inputs, tmp_path / "out", embedder, report, stop, watch=True, settle_seconds=0
        )
    assert len(lines) == 5


def test_waiting_for_the_first_shard_ends_when_stopped_or_when_it_is_in_vain(
    spark, inputs, embedder, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    listed, list_units = [], ShardInputs.list_units
    monkeypatch.setattr(
        ShardInputs, "list_units", lambda given: listed.append(given) or list_units(given)
    )
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(2, stop.set).start()
    with pytest.raises(JobStoppedError, match="stopped while waiting for the first shard"):
        run_reporting(
            spark, tmp_path / "empty", tmp_path / "out", embedder, print, stop, watch=True
        )
    assert len(listed) == 1
    assert time.monotonic() - began < 4  # and not a whole pause between two looks
    write_photograph_shards(tmp_path / "other", num_shards=1, samples_per_shard=2)
    both = ShardInputs.parse([str(inputs), str(tmp_path / "other")])
    stop = threading.Event()
    timer = threading.Timer(30, stop.set)
    timer.start()
    with pytest.raises(InputError, match="would both be shard '00000'"):
        score_into(spark, both, tmp_path / "out", embedder, watch=True, stop=stop)
    timer.cancel()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def score(inputs, output, detector_path, *more):
    return main(["score", *arguments(inputs, output, detector_path), "--plan=fused", *more])


def test_progress_and_summary_for_machines(spark, shards, tmp_path, detector_path, capsys):
    given = ["--shards-per-wave=2", "--progress=json"]
    assert score(shards, tmp_path / "out", detector_path, *given) == 0
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["wave"] for record in records] == [1, 2, 3]
    assert records[-1]["num_shards_done"] == records[-1]["num_shards"] == 5
    summary = json.loads((tmp_path / "out" / "_spark_nsfw" / "summary.json").read_text())
    assert summary["num_by_status"]["ok"] == sum(r["wave_rows_by_status"]["ok"] for r in records)
    assert summary["num_by_status"]["ok"] == records[-1]["num_images"] > 30
    assert summary["num_samples"] - summary["num_by_status"]["ok"] == records[-1]["num_failed"] == 7


@pytest.mark.parametrize(("limit", "status"), [("6", 0), ("5", 3), ("50%", 0), ("1%", 3)])
def test_failed_samples_above_the_limit_are_exit_status_3(
    spark, shards, tmp_path_factory, detector_path, capsys, limit, status
):
    output = tmp_path_factory.getbasetemp() / "limited"  # the first case scores, the rest look
    whole = shards / "{00000.tar,00001.tar,odd}"
    assert score(whole, output, detector_path, f"--max-failed={limit}") == status
    assert ("more than --max-failed" in capsys.readouterr().err) == (status == 3)


def test_a_damaged_shard_counts_as_a_failure(spark, shards, tmp_path, detector_path, capsys):
    cut = shards / "0000[23].tar"  # one sample is cut off, and so its shard
    assert score(cut, tmp_path / "out", detector_path, "--max-failed=2") == 0
    assert score(cut, tmp_path / "out", detector_path, "--max-failed=1") == 3
    assert "samples and 1 shard failed" in capsys.readouterr().err


def test_nothing_scored_is_exit_status_3(spark, tmp_path, detector_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.tar").write_bytes(b"no tar" * 1000)
    assert score(tmp_path / "in", tmp_path / "out", detector_path) == 3
    assert "not one sample could be scored" in capsys.readouterr().err


def test_overwrite_asks_and_starts_anew(spark, inputs, tmp_path, detector_path, capsys):
    output = tmp_path / "out"
    assert score(inputs, output, detector_path) == 0
    assert score(inputs, output, detector_path, "--decode=exact") == 1
    assert "--overwrite to start anew" in capsys.readouterr().err
    assert score(inputs, output, detector_path, "--decode=exact", "--overwrite") == 2
    assert "nobody to ask; say --yes" in capsys.readouterr().err
    assert score(inputs, output, detector_path, "--decode=exact", "--overwrite", "--yes") == 0
    note = json.loads(spark.read.parquet(str(output)).schema["nsfw_score"].metadata["spark_nsfw"])
    assert "decode=exact" in note["embedder"]["preprocessing"]
    assert spark.read.parquet(str(output)).count() == 12


def test_overwrite_finds_a_relative_output(inputs, tmp_path, detector_path, spark, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Spark's JVM does not stand
    assert score(inputs, "out", detector_path) == 0
    assert score(inputs, "out", detector_path, "--decode=exact", "--overwrite", "--yes") == 0
    assert spark.read.parquet(str(tmp_path / "out")).count() == 12


def test_mounted_outputs_are_named_as_spark_names_them(monkeypatch):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    assert MetadataFiles.at("/dbfs/metadata/out/").url == "dbfs:/metadata/out"


def test_an_output_is_known_without_success_files(spark, inputs, tmp_path, detector_path, capsys):
    output, option = tmp_path / "out", "mapreduce.fileoutputcommitter.marksuccessfuljobs"
    spark.conf.set(option, "false")
    try:
        assert score(inputs, output, detector_path) == 0
        assert not list(output.rglob("_SUCCESS"))
        assert score(inputs, output, detector_path, "--decode=exact") == 1
        assert "was made with different settings" in capsys.readouterr().err
        assert score(inputs, output, detector_path, "--decode=exact", "--overwrite", "--yes") == 0
    finally:
        spark.conf.unset(option)


def test_changes_are_mixed_only_when_told(spark, inputs, embedder, tmp_path):
    output = tmp_path / "out"
    run(spark, str(inputs / "0000[01].tar"), output, embedder)
    embedder.decode = "exact"
    with pytest.raises(JobError, match="--allow-changes to mix both"):
        run(spark, str(inputs), output, embedder)
    summary, _ = run(spark, str(inputs), output, embedder, allow_changes=True)
    assert (summary.num_samples, summary.num_new_images) == (12, 6)
    with pytest.raises(JobError, match="keep_embeddings was true, is now false"):
        run(spark, str(inputs), output, embedder, allow_changes=True, keep_embeddings=False)


def test_another_dataset_into_the_same_output_is_refused(
    spark, inputs, embedder, tmp_path, tmp_path_factory
):
    output, other = tmp_path_factory.mktemp("metadata") / "out", tmp_path / "other"
    run(spark, str(inputs / "0000[01].tar"), output, embedder)
    rows = rows_of(spark, output)
    write_photograph_shards(other, num_shards=1, samples_per_shard=2, seed=5)  # it has a 00000
    for changed in (str(other), str(tmp_path)):
        for allow_changes in (False, True):
            with pytest.raises(
                JobError, match=r"inputs\.roots.* was .*/in/.*, is now .*"
            ) as refused:
                run(spark, changed, output, embedder, allow_changes=allow_changes)
            assert "Give another output, or --overwrite to start anew" in str(refused.value)
            assert "--allow-changes" not in str(refused.value)
    assert rows_of(spark, output) == rows
    run(spark, f"file:{inputs}/", output, embedder)  # the same root by another name
    assert len(rows_of(spark, output)) == 12


def test_an_output_from_before_inputs_were_noted_goes_on(spark, inputs, embedder, tmp_path):
    output = tmp_path / "out"
    run(spark, str(inputs / "00000.tar"), output, embedder)
    (schema,) = (output / "shard=__schema__").glob("*.parquet")
    table = pq.read_table(schema, partitioning=None)
    key = b"org.apache.spark.sql.parquet.row.metadata"
    spark_schema = json.loads(table.schema.metadata[key])
    for field in spark_schema["fields"]:
        if "spark_nsfw" in field["metadata"]:
            note = json.loads(field["metadata"]["spark_nsfw"])
            del note["inputs"]
            field["metadata"]["spark_nsfw"] = json.dumps(note)
    changed = table.schema.metadata | {key: json.dumps(spark_schema)}
    pq.write_table(table.replace_schema_metadata(changed), schema)
    run(spark, str(inputs), output, embedder)
    assert len(rows_of(spark, output)) == 12


@pytest.mark.parametrize("allow_changes", [False, True])
def test_result_columns_are_never_mixed(
    spark, inputs, embedder, aesthetic_path, tmp_path, allow_changes
):
    output = tmp_path / "out"
    run(spark, str(inputs / "00000.tar"), output, embedder)
    aesthetic = AestheticClassifier(model_path=aesthetic_path)
    more = TimmImageEmbedder(
        "test_vit2", embedding_size=768, classifiers=[*embedder.classifiers, aesthetic]
    )
    named = (
        r"has the result columns embedding_norm \(float\), image_embedding \(array<float>\), "
        r"nsfw_score \(float\); this run would write aesthetic_score \(float\), embedding_norm"
    )
    with pytest.raises(JobError, match=named):
        run(spark, str(inputs), output, more, allow_changes=allow_changes)
    assert len(rows_of(spark, output)) == 3


def test_a_missing_number_of_shards_is_refused(spark, inputs, embedder, tmp_path):
    with pytest.raises(InputError, match=r"--shards-per-wave \(shards_per_wave\) is at least 1"):
        run(spark, str(inputs), tmp_path / "out", embedder, shards_per_wave=0)


def test_scores_are_numbers(undisturbed):
    assert all(np.isfinite(row[3]) for row in undisturbed.values())


def test_small_shards_share_a_task_and_large_ones_do_not():
    def units(num_bytes, count):
        return [Unit(str(n), f"/{n}.tar", num_bytes=num_bytes) for n in range(count)]

    assert tasks_of(units(1 << 20, 100), 2, 16) == 2
    assert tasks_of(units(1 << 30, 100), 2, 16) == 16
    assert tasks_of(units(128 << 20, 4), 2, 16) == 4
    assert tasks_of(units(128 << 20, 1), 2, 1) == 2
    assert tasks_of(units(0, 100), 2, 16) == 16  # nobody knows their size
