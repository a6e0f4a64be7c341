"""Stopped, starved, poisoned: whatever happens to a run, the next one ends with the same rows."""

import json
import os
import shutil
import subprocess
import threading
import time
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
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
from spark_nsfw.errors import InputError, JobError, JobStoppedError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.spark.waves import Crashes, reason, write_apart


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
    with pytest.raises(JobStoppedError, match="the same command goes on from there"):
        run_reporting(spark, inputs, output, embedder, report, stop)
    assert len(lines) == 2
    again = []
    run_reporting(spark, inputs, output, embedder, again.append)
    assert len(again) == 2
    assert "4 of 4 shards done" in again[-1]
    assert rows_of(spark, output) == undisturbed


def test_a_shard_that_vanishes_has_a_row_and_one_that_is_replaced_its_new_rows(
    spark, inputs, undisturbed, embedder, tmp_path
):
    write_photograph_shards(tmp_path / "other", num_shards=1, samples_per_shard=2, seed=5)

    def report(line):
        if line.startswith("wave 1:"):
            (inputs / "00002.tar").unlink()
            shutil.copyfile(tmp_path / "other" / "00000.tar", inputs / "00003.tar")

    summary = run_reporting(spark, inputs, tmp_path / "out", embedder, report)
    rows = rows_of(spark, tmp_path / "out")
    kept = {identity: row for identity, row in undisturbed.items() if identity[0] < "00002"}
    assert len(kept) == 6
    assert kept.items() <= rows.items()
    status, message, *_ = rows["00002", None]
    assert (status, "00002.tar" in message) == ("shard_unreadable", True)
    assert sorted(key for shard, key in rows if shard == "00003") == ["000000000", "000000001"]
    assert (summary.num_shards, summary.num_samples) == (4, 8)


def test_rows_that_somebody_deleted_come_back(spark, inputs, undisturbed, embedder, tmp_path):
    output = tmp_path / "out"
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(output / "shard=00001")
    lines = []
    run_reporting(spark, inputs, output, embedder, lines.append)
    assert rows_of(spark, output) == undisturbed
    assert "3 images scored" in lines[0]


@pytest.mark.parametrize("deleted", [True, False])
def test_a_checkpoint_that_is_gone_or_damaged(
    spark, inputs, undisturbed, embedder, tmp_path, deleted
):
    output = tmp_path / "out"
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    checkpoint = output / "_spark_nsfw" / "checkpoint"
    if not deleted:
        for directory in ("offsets", "commits"):
            for file in (checkpoint / directory).iterdir():
                file.write_text("damaged") if file.name.isdigit() else file.unlink()
        with pytest.raises(JobError, match=f"delete {checkpoint} and run again"):
            run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(checkpoint)
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    assert rows_of(spark, output) == undisturbed


def test_a_run_that_is_stopped_after_its_checkpoint_was_deleted(
    spark, inputs, undisturbed, embedder, tmp_path
):
    output = tmp_path / "out"
    run_reporting(spark, inputs, output, embedder, lambda _: None)
    shutil.rmtree(output / "_spark_nsfw")
    for _ in range(2):  # the second run has a checkpoint, which does not know of all shards
        stop, lines = threading.Event(), []

        def report(line, stop=stop, lines=lines):
            lines.append(line)
            stop.set()

        with pytest.raises(JobStoppedError, match="stopped after 1 shards in this run"):
            run_reporting(spark, inputs, output, embedder, report, stop)
        assert len(lines) == 1
        assert not (output / "_spark_nsfw" / "summary.json").exists()
    again = []
    run_reporting(spark, inputs, output, embedder, again.append)
    assert len(again) == 2
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
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
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
        super().__init__("poison")
        self.embedding = embedding
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
        super().__init__("fault")
        self.file = file

    def load_model(self, device):
        def score(embeddings):
            if self.file.exists():
                os.abort()
            return embeddings[:, 0]

        return score


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
    assert said in message
    assert rows == {i: row for i, row in undisturbed.items() if i[0] != "00002"}
    assert summary.num_crashed_shards == 1
    assert any(line.startswith("set aside") and "00002.tar" in line for line in lines)


def test_a_mistake_in_the_code_sets_no_shard_aside(spark, inputs, poisoned, tmp_path):
    with pytest.raises(JobError, match="run again to resume: ValueError: a mistake in the class"):
        run_reporting(spark, inputs, tmp_path / "out", poisoned(out_of_patience), lambda _: None)
    assert "shard_crashed" not in {row[0] for row in rows_of(spark, tmp_path / "out").values()}


def test_write_apart_finds_every_shard_that_kills_its_worker():
    def write(part):
        if {3, 4, 9} & set(part):
            raise RuntimeError("Python worker exited unexpectedly (crashed)")
        return list(part)

    shards = list(range(11))
    counts = write_apart(shards, write, Crashes(lambda shard, error: [f"{shard} {error}"]))
    said = "Python worker exited unexpectedly (crashed)"
    assert list(chain(*counts)) == [0, 1, 2, f"3 {said}", f"4 {said}", 5, 6, 7, 8, f"9 {said}", 10]


def test_one_shard_that_lives_clears_the_cluster_and_convicts_the_others():
    def write(part):
        if {"a", "b", "d", "e"} & set(part):
            raise RuntimeError("Python worker exited unexpectedly (crashed)")
        return list(part)

    set_aside = []
    crashes = Crashes(lambda shard, _: set_aside.append(shard) or [shard])
    for shard, convicted in [("a", ""), ("b", ""), ("c", "ab"), ("d", "abd"), ("e", "abde")]:
        write_apart([shard], write, crashes)
        assert set_aside == list(convicted)


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
    spark, inputs, embedder, tmp_path
):
    (tmp_path / "empty").mkdir()
    stop = threading.Event()
    threading.Timer(2, stop.set).start()
    with pytest.raises(JobStoppedError, match="stopped before there was a shard"):
        run_reporting(
            spark, tmp_path / "empty", tmp_path / "out", embedder, print, stop, watch=True
        )
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


def test_overwrite_names_mounted_outputs_as_spark_does(spark, monkeypatch):
    asked = []

    def filesystem(_, url):
        asked.append(url)
        return SimpleNamespace(exists=lambda _: False), url

    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    monkeypatch.setattr("spark_nsfw.spark.job.hadoop_filesystem", filesystem)
    delete_output(spark, "/dbfs/metadata/out")
    assert asked == ["dbfs:/metadata/out"]


def test_an_output_is_known_without_success_files(spark, inputs, tmp_path, detector_path, capsys):
    output, option = tmp_path / "out", "mapreduce.fileoutputcommitter.marksuccessfuljobs"
    spark.conf.set(option, "false")
    try:
        assert score(inputs, output, detector_path) == 0
        assert not list(output.rglob("_SUCCESS"))
        assert score(inputs, output, detector_path, "--decode=exact") == 1
        assert "was made in another way" in capsys.readouterr().err
        assert score(inputs, output, detector_path, "--decode=exact", "--overwrite", "--yes") == 0
    finally:
        spark.conf.unset(option)


def test_what_a_killed_driver_was_writing_is_deleted(
    spark, inputs, undisturbed, embedder, tmp_path
):
    output = tmp_path / "out"
    run(spark, str(inputs / "0000[01].tar"), output, embedder)
    staging = output / ".spark-staging-0f2a" / "shard=00002"
    shutil.copytree(output / "shard=00001", staging)
    run(spark, str(inputs), output, embedder)
    assert sum(pq.read_metadata(file).num_rows for file in output.rglob("*.parquet")) == 12
    assert not staging.parent.exists()
    assert rows_of(spark, output) == undisturbed


def test_overwrite_deletes_nothing_but_an_output(spark, inputs, tmp_path, detector_path):
    (tmp_path / "precious").mkdir()
    assert score(inputs, tmp_path / "precious", detector_path, "--overwrite", "--yes") == 2
    assert (tmp_path / "precious").is_dir()


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


def test_another_dataset_into_the_same_output_is_refused(spark, inputs, embedder, tmp_path):
    output, other = tmp_path / "out", tmp_path / "other"
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
    schema.with_name(f".{schema.name}.crc").unlink()
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
    named = r'result_columns was \["image_embedding", "nsfw_score"\], is now \["aesthetic_score"'
    with pytest.raises(JobError, match=named):
        run(spark, str(inputs), output, more, allow_changes=allow_changes)
    assert len(rows_of(spark, output)) == 3


def test_a_missing_number_of_shards_is_refused(spark, inputs, embedder, tmp_path):
    with pytest.raises(InputError, match="shards_per_wave is at least 1"):
        run(spark, str(inputs), tmp_path / "out", embedder, shards_per_wave=0)


def test_scores_are_numbers(undisturbed):
    assert all(np.isfinite(row[3]) for row in undisturbed.values())
