"""The job: exactly the core's rows, resumed, refused, summed up."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scoring import score_into
from test_spark import by_identity, collected, core_rows  # noqa: F401  # a fixture

from examples.photographs import write_photograph_shards, write_shard
from spark_nsfw import NsfwClassifier, SampleOptions, TimmImageEmbedder
from spark_nsfw.errors import InputError, JobError
from spark_nsfw.spark.output import ParquetOutput

PLANS = ["dataframe", "fused"]


def run(spark, inputs, output, embedder, **options):
    lines = []
    summary = score_into(spark, inputs, output, embedder, report=lines.append, **options)
    return summary, lines


@pytest.fixture(scope="module", params=PLANS)
def finished(request, spark, shards, detector_path, tmp_path_factory):
    """An output that a run in three waves has written."""
    output = tmp_path_factory.mktemp(request.param) / "out"
    embedder = TimmImageEmbedder(
        "test_vit2",
        batch_size=8,
        embedding_size=768,
        classifiers=[NsfwClassifier(model_path=detector_path)],
    )
    summary, lines = run(
        spark, str(shards), output, embedder, plan=request.param, shards_per_wave=2
    )
    return output, embedder, summary, lines


def test_the_rows_are_the_cores(spark, finished, core_rows):  # noqa: F811
    output, *_ = finished
    assert collected(spark.read.parquet(str(output))) == core_rows


@pytest.mark.parametrize("plan", PLANS)
def test_names_of_own_columns_may_have_signs(spark, embedder, jpegs, tmp_path, plan):
    values = {"a.b": 1, "a": {"b": 2}, "c`d": 3, "`e`.f": 4}
    members = [("jpg", jpegs[0]), ("json", json.dumps(values).encode())]
    write_shard(tmp_path / "in" / "00000.tar", [("x", members)])
    run(spark, str(tmp_path / "in"), tmp_path / "out", embedder, plan=plan)
    (row,) = spark.read.parquet(str(tmp_path / "out")).collect()
    assert {name: row[name] for name in values} == values | {"a": '{"b": 2}'}
    assert (row["status"], row["extra_json"]) == ("ok", None)
    assert row["nsfw_score"] is not None


def test_pandas_reads_the_same_rows(finished, core_rows):  # noqa: F811
    frame = pd.read_parquet(finished[0]).astype({"shard": str})
    frame = frame.astype(object).where(frame.notna(), None)
    rows = frame.to_dict("records")
    assert by_identity(rows) == core_rows


def test_shard_names_stay_strings_in_every_reader(spark, finished):
    output = finished[0]
    expected = {"00000", "00001", "00002", "00003", "odd/00000"}
    assert {r.shard for r in spark.read.parquet(str(output)).select("shard").collect()} == expected
    assert set(pd.read_parquet(output)["shard"]) == expected
    query = f"select distinct shard from read_parquet('{output}/*/*.parquet', hive_partitioning=1)"
    assert {name for (name,) in duckdb.sql(query).fetchall()} == expected


def test_rows_stay_in_the_order_of_the_tar(finished, shards):
    from spark_nsfw.read.tar import iter_samples

    for name in ("00000", "odd/00000"):
        (file,) = (finished[0] / f"shard={name.replace('/', '%2F')}").glob("*.parquet")
        keys = pq.ParquetFile(file).read(["key"])["key"].to_pylist()
        assert keys == [s.key for s in iter_samples(str(shards / f"{name}.tar"))]


def test_files_are_zstd_and_say_what_made_them(spark, finished):
    output, embedder, *_ = finished
    files = [f for f in output.glob("shard=*/*.parquet") if "__schema__" not in str(f)]
    assert len(files) == 5
    for file in files:
        meta = pq.ParquetFile(file).metadata
        assert meta.row_group(0).column(0).compression == "ZSTD"
        spark_schema = json.loads(meta.metadata[b"org.apache.spark.sql.parquet.row.metadata"])
        (field,) = (f for f in spark_schema["fields"] if f["name"] == "nsfw_score")
        note = json.loads(field["metadata"]["spark_nsfw"])
        assert note["embedder"] == embedder.describe() | {"precision": "float32"}
        assert note["classifiers"][0]["weights"]["sha256"].startswith("905520bb")
    metadata = spark.read.parquet(str(output)).schema["nsfw_score"].metadata
    assert json.loads(metadata["spark_nsfw"]) == note


def test_the_summary_says_what_a_person_wants_to_know(finished, core_rows):  # noqa: F811
    output, _, summary, lines = finished
    statuses = [status for status, *_ in core_rows.values()]
    assert summary.num_by_status == {s: statuses.count(s) for s in set(statuses)}
    assert (summary.num_shards, summary.num_samples) == (5, len(core_rows) - 1)
    scores = np.array([row[3] for row in core_rows.values() if row[3] is not None])
    distribution = summary.scores["nsfw_score"]
    assert distribution.share_above_half == (scores > 0.5).mean()
    assert distribution.quantiles[0.5] == np.sort(scores)[(len(scores) - 1) // 2]
    text = str(summary)
    for part in [
        f"{len(core_rows) - 1} samples in 5 shards", "shard_truncated", "above 0.5", "images/s",
        str(output), "test_vit2: random (seed 0)", "sha256 905520bb",
        "the tower's weights are random: these scores mean nothing",
    ]:  # fmt: skip
        assert part in text
    assert len(lines) == 3
    assert "5 of 5 shards done; this run: " in lines[-1]


def files_of(output: Path):
    return {p: p.stat().st_mtime_ns for p in output.rglob("*.parquet")}


def test_a_finished_run_started_again_writes_nothing(spark, finished, shards):
    output, embedder, before, _ = finished
    files = files_of(output)
    summary, lines = run(spark, str(shards), output, embedder, plan="fused", shards_per_wave=1)
    assert files_of(output) == files
    assert lines == ["nothing to do: 5 shards, all scored before"]
    assert summary.num_new_images == 0
    assert summary.num_by_status == before.num_by_status


def test_new_shards_are_scored_alone(spark, tmp_path, embedder):
    write_photograph_shards(tmp_path / "in", num_shards=2, samples_per_shard=3)
    output = tmp_path / "out"
    run(spark, str(tmp_path / "in"), output, embedder)
    files = files_of(output)
    write_photograph_shards(tmp_path / "more", num_shards=1, samples_per_shard=3)
    (tmp_path / "more" / "00000.tar").rename(tmp_path / "in" / "00009.tar")
    os.utime(tmp_path / "in" / "00009.tar", (0, 0))  # however old it says it is
    summary, _ = run(spark, str(tmp_path / "in"), output, embedder)
    assert (summary.num_new_images, summary.num_samples, summary.num_shards) == (3, 9, 3)
    assert files.items() <= files_of(output).items()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "bfloat16"}, 'embedder.precision was "float32", is now "bfloat16"'),
        ({"model_name": "test_vit"}, 'embedder.model_name was "test_vit2", is now "test_vit"'),
    ],
)
def test_other_models_are_refused_with_both_sides_named(
    spark, finished, shards, detector_path, change, named
):
    settings = {"model_name": "test_vit2", "batch_size": 8, "embedding_size": 768} | change
    other = TimmImageEmbedder(**settings, classifiers=[NsfwClassifier(model_path=detector_path)])
    with pytest.raises(JobError, match=named):
        run(spark, str(shards), finished[0], other)


def test_other_columns_are_refused(spark, finished, shards):
    output, embedder, *_ = finished
    with pytest.raises(JobError, match="keep_embeddings was true, is now false"):
        run(spark, str(shards), output, embedder, keep_embeddings=False)
    with pytest.raises(JobError, match="captions was false, is now true"):
        run(spark, str(shards), output, embedder, samples=replace(SampleOptions(), captions=True))


def test_columns_of_the_dataset_and_captions_are_kept(spark, tmp_path, shards, embedder):
    run(
        spark, str(shards / "0000[0-2].tar"), tmp_path / "out", embedder, columns=["width"],
        keep_embeddings=False, samples=SampleOptions(captions=True),
    )  # fmt: skip
    frame = pd.read_parquet(tmp_path / "out")
    assert frame.columns.tolist() == [
        "key", "caption", "width", "image_offset", "image_num_bytes",
        "status", "error_message", "nsfw_score", "shard",
    ]  # fmt: skip
    assert frame["width"].between(400, 600).all()
    assert len(frame) == 33


def test_tasks_move_their_own_files(spark, tmp_path):
    rows = spark.createDataFrame([("00000", "a")], "shard string, key string")
    option = "mapreduce.fileoutputcommitter.algorithm.version"
    spark.conf.set(option, "3")  # there is none such: what the write sets itself has to be in force
    try:
        ParquetOutput(spark, str(tmp_path / "out")).append(rows)
    finally:
        spark.conf.unset(option)
    assert spark.read.parquet(str(tmp_path / "out")).count() == 1


@pytest.mark.parametrize("bad", [{"plan": "magic"}, {"shards_per_wave": 0}])
def test_options_that_cannot_work_are_refused(spark, shards, tmp_path, embedder, bad):
    with pytest.raises(InputError):
        run(spark, str(shards), tmp_path / "out", embedder, **bad)


def arguments(inputs, output, detector_path):
    return [
        str(inputs), str(output), "--model", "test_vit2", "--embedding-size", "768",
        "--no-pretrained", "--nsfw-checkpoint", detector_path, "--batch-size", "8",
    ]  # fmt: skip


@pytest.mark.cluster
def test_spark_submit_and_the_command_line_give_the_same_rows(
    spark,
    shards,
    tmp_path,
    detector_path,
    core_rows,  # noqa: F811
):
    import pyspark

    submit = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master", "local[2]"]
    job = Path(__file__).parents[1] / "jobs" / "score_nsfw.py"
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable}
    environment.pop("PYSPARK_GATEWAY_PORT", None)
    environment.pop("PYSPARK_GATEWAY_SECRET", None)
    done = subprocess.run(
        [*submit, str(job), *arguments(shards, tmp_path / "out", detector_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{len(core_rows) - 1} samples in 5 shards" in done.stdout
    assert "scores mean nothing" in done.stdout
    assert collected(spark.read.parquet(str(tmp_path / "out"))) == core_rows


NUM_SLOTS = """
import sys
from pyspark.sql import SparkSession
from spark_nsfw.spark.cluster import num_slots
from spark_nsfw.spark.worker import device_kind

builder = SparkSession.builder.master("local-cluster[2,2,1024]")
for setting in sys.argv[1:]:
    builder = builder.config(*setting.split("=", 1))
spark = builder.getOrCreate()
device_kind(spark, "cpu")
print("slots:", num_slots(spark))
"""


@pytest.mark.cluster
@pytest.mark.parametrize(("gpus_per_task", "slots"), [("0.5", 4), ("1", 2)])
def test_slots_are_as_many_as_cores_or_gpus_allow(tmp_path, gpus_per_task, slots):
    import pyspark

    script = tmp_path / "gpus.sh"
    script.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0"]}'\n""")
    script.chmod(0o755)
    settings = [
        "spark.ui.enabled=false",
        "spark.executor.memory=1g",
        "spark.scheduler.minRegisteredResourcesRatio=1",
        "spark.worker.resource.gpu.amount=1",
        f"spark.worker.resource.gpu.discoveryScript={script}",
        "spark.executor.resource.gpu.amount=1",
        f"spark.task.resource.gpu.amount={gpus_per_task}",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYSPARK_GATEWAY")} | {
        "SPARK_HOME": str(Path(pyspark.__file__).parent),
        "PYSPARK_PYTHON": sys.executable,
        # the Spark that this test runs on, which may not be the environment's own
        "PYTHONPATH": os.pathsep.join(
            [str(Path(pyspark.__file__).parents[1]), str(Path(__file__).parents[1])]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", NUM_SLOTS, *settings],
        env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert f"slots: {slots}\n" in done.stdout
