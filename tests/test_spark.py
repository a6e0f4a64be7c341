"""The plans, the UDF and the dataset on a real session: the rows are the core's."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyspark.sql import functions as F
from test_scorer import all_shards

from examples.photographs import write_photograph_shards, write_shard
from spark_nsfw import (
    ImageClassifier,
    ImageTextPairDataset,
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_batches,
    nsfw_udf,
    read_webdataset,
    score_samples,
)
from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.note import inspect_output
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.cluster import reader_workers
from spark_nsfw.spark.worker import choose_device, recipe_identity, worker_scorer


@pytest.fixture(scope="module")
def core_rows(shards, detector_path):
    embedder = TimmImageEmbedder("test_vit2", batch_size=8, embedding_size=768)
    scorer = Scorer(embedder, [NsfwClassifier(model_path=detector_path)], "cpu")
    batches = iter_sample_batches(all_shards(shards), SampleOptions())
    return by_identity(pa.Table.from_batches(scorer.score(batches)).to_pylist())


def by_identity(rows):
    """(shard, key) → the row's result columns, floats as they are stored."""
    found = {}
    for row in rows:
        embedding, score = row.get("image_embedding"), row.get("nsfw_score")
        identity = row["shard"], row["key"]
        assert identity not in found
        found[identity] = (
            row["status"],
            row["error_message"],
            None if embedding is None else tuple(np.float32(embedding)),
            None if score is None else np.float32(score),
        )
    return found


def collected(dataframe):
    return by_identity(row.asDict() for row in dataframe.collect())


def test_read_webdataset_gives_every_sample_with_its_bytes(spark, shards):
    rows = read_webdataset(spark, str(shards)).collect()
    found = {(row.shard, row.key): row.image for row in rows if row.image is not None}
    expected = {
        (name, sample.key): bytes(sample.members[extension])
        for path, name in all_shards(shards)
        for sample in iter_samples(path)
        for extension in ("jpg", "png", "webp")
        if sample.status == "ok" and extension in sample.members
    }
    assert found == expected
    assert len(expected) > 35


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("0000[01].tar", {"00000", "00001"}),
        ("{00001..00003}.tar", {"00001", "00002", "00003"}),
        ("odd", {"00000"}),
        ("odd/00000.tar", {"00000"}),
        ("*/*.tar", {"odd/00000"}),
    ],
)
def test_inputs_of_every_form(spark, shards, pattern, expected):
    df = read_webdataset(spark, str(shards / pattern))
    assert {row.shard for row in df.select("shard").distinct().collect()} == expected


def test_several_inputs(spark, shards):
    df = read_webdataset(spark, [shards / "00000.tar", str(shards / "00002.tar")])
    assert {row.shard for row in df.select("shard").distinct().collect()} == {"00000", "00002"}


@pytest.mark.parametrize("path", ["nowhere", "{00000..00009}.tar", "*.gone"])
def test_a_path_without_shards_is_refused(spark, shards, path):
    with pytest.raises(InputError, match="does not exist, or has no shard"):
        read_webdataset(spark, str(shards / path))


def test_names_with_blanks_and_signs(spark, tmp_path):
    for name in ["a b", "50%", "ü", "x=1"]:
        write_photograph_shards(tmp_path / "in put" / name, 1, 1)
    rows = read_webdataset(spark, str(tmp_path / "in put")).select("shard", "status").collect()
    assert {(r.shard, r.status) for r in rows} == {
        (f"{name}/00000", "ok") for name in ["a b", "50%", "ü", "x=1"]
    }


def test_only_workers_that_score_import_torch(spark):
    def tell(batches):
        for _ in batches:
            yield pa.RecordBatch.from_pydict({"torch": ["torch" in sys.modules]})

    with reader_workers(spark):
        read = spark.range(1, numPartitions=1).mapInArrow(tell, "torch boolean")
    score = spark.range(1, numPartitions=1).mapInArrow(tell, "torch boolean")
    assert [rows.collect()[0].torch for rows in (read, score)] == [False, True]


def test_the_dataframe_plan_gives_the_cores_rows(spark, shards, embedder, core_rows):
    assert collected(score_samples(read_webdataset(spark, str(shards)), embedder)) == core_rows


def test_the_dataset_gives_the_cores_rows(spark, shards, embedder, core_rows):
    dataset = ImageTextPairDataset.from_webdataset(str(shards), id_col="key")
    assert collected(embedder(dataset).metadata) == core_rows


def test_embed_then_classify_gives_the_same_rows_as_both_in_one(
    spark, shards, embedder, detector_path, core_rows
):
    plain = TimmImageEmbedder("test_vit2", batch_size=8, embedding_size=768)
    dataset = ImageTextPairDataset.from_webdataset(path=str(shards), id_col="key")
    two_steps = NsfwClassifier(model_path=detector_path)(plain(dataset))
    assert collected(two_steps.metadata) == core_rows


def test_stored_embeddings_are_classified_without_reading_an_image(
    spark, shards, embedder, detector_path, core_rows, tmp_path
):
    for path, name in all_shards(shards):
        if name in ("00000", "00001"):
            (tmp_path / f"{name}.tar").write_bytes(Path(path).read_bytes())
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    TimmImageEmbedder("test_vit2", batch_size=8, embedding_size=768)(dataset).save_metadata()
    stored = ImageTextPairDataset.from_webdataset(str(tmp_path))
    assert "image_embedding" in stored.metadata.columns
    for variant in ("torch", "laion"):
        classifier = NsfwClassifier(model_path=detector_path, variant=variant)
        scores = {(r.shard, r.key): r.nsfw_score for r in classifier(stored).metadata.collect()}
        embedder.classifiers = (classifier,)
        fresh = ImageTextPairDataset.from_webdataset(str(tmp_path))
        expected = {(r.shard, r.key): r.nsfw_score for r in embedder(fresh).metadata.collect()}
        assert scores == expected
        assert len(scores) == 22
    stored.metadata = stored.metadata.where("shard = '00001'")
    fewer = {(r.shard, r.key): r.nsfw_score for r in classifier(stored).metadata.collect()}
    assert fewer == {which: score for which, score in expected.items() if which[0] == "00001"}
    with pytest.raises(InputError, match="embed the dataset first"):
        embedder(stored)


def test_classifying_without_embeddings_says_what_to_do(spark, shards, detector_path):
    dataset = ImageTextPairDataset.from_webdataset(str(shards))
    with pytest.raises(InputError, match="embed it first"):
        NsfwClassifier(model_path=detector_path)(dataset).metadata  # noqa: B018


def test_the_udf_scores_any_column_of_images(spark, embedder, jpegs, detector_path):
    images = [*jpegs[:3], None, b"no image"]
    df = spark.createDataFrame(
        [(str(i), image) for i, image in enumerate(images)], "id string, pic binary"
    )
    rows = df.select("id", nsfw_udf(embedder)("pic").alias("r")).orderBy("id").collect()
    expected = embedder.embed(jpegs[:3], device="cpu")
    scores = NsfwClassifier(model_path=detector_path).classify(expected, "cpu")
    assert [row.r.status for row in rows] == ["ok"] * 3 + ["image_missing", "image_undecodable"]
    assert np.array_equal(np.float32([r.r.image_embedding for r in rows[:3]]), expected)
    assert [np.float32(row.r.nsfw_score) for row in rows[:3]] == list(scores)
    assert [(r.r.image_embedding, r.r.nsfw_score) for r in rows[3:]] == [(None, None)] * 2


def test_a_missing_score_is_null_not_nan(spark, embedder):
    df = spark.createDataFrame([(b"no image",)], "image binary")
    scored = score_samples(df, embedder)
    assert (
        scored.where(F.col("nsfw_score").isNull() & F.col("image_embedding").isNull()).count() == 1
    )
    assert scored.columns == [
        "status", "error_message", "image_embedding", "embedding_norm", "nsfw_score",
    ]  # fmt: skip


def test_what_does_not_fit_is_refused_on_the_driver(spark, detector_path):
    narrow = TimmImageEmbedder("test_vit2", embedding_size=32)
    with pytest.raises(EmbeddingWidthError):
        nsfw_udf(narrow, [NsfwClassifier(model_path=detector_path)])


def test_the_datasets_columns_pass_through(spark, shards):
    df = read_webdataset(spark, str(shards / "0000[0-2].tar"), captions=True)
    ours = ["image_offset", "image_num_bytes", "status", "error_message", "image"]
    assert df.columns == ["shard", "key", "caption", "width", "height", "extra_json", *ours]
    row = df.where("key = '000010003'").collect()[0]
    described = {
        sample.key: json.loads(sample.members["json"])
        for sample in iter_samples(str(shards / "00001.tar"))
    }
    assert (row.width, row.height) == (
        described[row.key]["width"],
        described[row.key]["height"],
    )
    assert row.caption == "a photograph"
    few = read_webdataset(spark, str(shards / "00000.tar"), columns=["height"])
    assert few.columns == ["shard", "key", "height", *ours]
    none = read_webdataset(spark, str(shards / "00000.tar"), columns=[])
    assert none.columns == ["shard", "key", *ours]
    with pytest.raises(InputError, match="no column depth"):
        read_webdataset(spark, str(shards / "00000.tar"), columns=["depth"])


def test_timestamps_and_nested_sidecar_columns_reach_spark(spark, tmp_path):
    write_shard(tmp_path / "s.tar", [("0", [("jpg", b"x")])])
    about = {
        "key": ["0"],
        "seen": [pd.Timestamp("2024-02-03 04:05:06")],
        "seen_utc": [pd.Timestamp("2024-02-03 04:05:06", tz="UTC")],
        "tags": [["a", "b"]],
        "size": [{"w": 1, "h": 2}],
    }
    pd.DataFrame(about).to_parquet(tmp_path / "s.parquet")
    row = read_webdataset(spark, str(tmp_path)).collect()[0]
    assert str(row.seen) == "2024-02-03 04:05:06"
    assert (row.tags, row["size"].asDict()) == (["a", "b"], {"w": 1, "h": 2})
    assert row.seen_utc is not None


class LoadCounting(ImageClassifier):
    """Notes every process that loads a model; workers cannot import this module."""

    def __init__(self, directory):
        super().__init__("loads", pred_column="loads")
        self.directory = directory

    def load_model(self, device):
        import uuid

        name = f"{os.getpid()}-{uuid.uuid4()}"
        with open(os.path.join(self.directory, name), "w"):
            pass
        return lambda embeddings: embeddings.sum(dim=1)


@pytest.mark.parametrize("plan", ["dataframe", "fused"])
def test_each_slot_loads_one_model_and_keeps_it(spark, tmp_path, monkeypatch, plan):
    """Two slots, many tasks, three actions: two loads. Readers never become scorers."""
    import test_spark
    from pyspark import cloudpickle

    cloudpickle.register_pickle_by_value(test_spark)
    write_photograph_shards(tmp_path / "shards", num_shards=8, samples_per_shard=4)
    loads = tmp_path / "loads"
    loads.mkdir()
    embedder = TimmImageEmbedder(
        "test_vit2", embedding_size=16, batch_size=4, classifiers=[LoadCounting(str(loads))]
    )
    monkeypatch.setattr("spark_nsfw.spark.units._TASK_BYTES", 1)  # a task for every shard
    try:
        if plan == "fused":
            dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "shards"), spark=spark)
            scored = embedder(dataset).metadata
        else:
            scored = score_samples(read_webdataset(spark, str(tmp_path / "shards")), embedder)
        assert scored.rdd.getNumPartitions() == 8
        for _ in range(3):
            assert len(scored.collect()) == 32
    finally:
        cloudpickle.unregister_pickle_by_value(test_spark)
    processes = [path.name.split("-")[0] for path in loads.iterdir()]
    assert len(processes) == len(set(processes))
    assert 1 <= len(processes) <= 2


def test_the_device_is_the_one_asked_for_else_the_one_that_is_there(monkeypatch):
    assert choose_device("cuda:3") == "cuda:3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device() == "cuda:0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    class Task:
        def resources(self):
            return {"gpu": type("Gpu", (), {"addresses": ["1"]})}

    monkeypatch.setattr("pyspark.TaskContext.get", lambda: Task())
    assert choose_device() == choose_device("cuda") == "cuda:1"
    for visible, expected in {"0,1,2": 1, "4,1": 1, "1,0": 0, "GPU-7": 0, "7": 0, "": 1}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose_device() == f"cuda:{expected}", visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device() == "cpu"
    assert choose_device("cuda") == "cuda:0"  # where the driver found GPUs, none is no choice


@pytest.mark.parametrize(
    ("address", "visible", "expected", "visible_then"),
    [
        ("GPU-b", "GPU-a,GPU-b", "cuda:1", "GPU-a,GPU-b"),
        ("GPU-b", None, "cuda:0", "GPU-b"),
        ("MIG-5", None, "cuda:0", "MIG-5"),
        ("MIG-5", "0,1", "cuda:0", "MIG-5"),
        ("MIG-5", "MIG-4,MIG-5", "cuda:0", "MIG-5"),  # a process has one part of a GPU
        ("GPU-b", "GPU-a", "cuda:0", "GPU-b"),
        ("1", "GPU-bb,GPU-cc,", "cuda:0", "GPU-bb,GPU-cc,"),
        ("1", "GPU-cc,GPU-bb", "cuda:1", "GPU-cc,GPU-bb"),  # nvidia-smi says GPU-bb
        ("1", "GPU-b,GPU-a", "cuda:0", "GPU-b,GPU-a"),  # CUDA takes beginnings of UUIDs
    ],
)
def test_a_gpu_may_be_named_by_its_uuid(
    monkeypatch, tmp_path, address, visible, expected, visible_then
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$1" = --id=1 ] && echo GPU-bb\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    task = SimpleNamespace(resources=lambda: {"gpu": SimpleNamespace(addresses=[address])})
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: task)
    assert choose_device() == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible_then


def test_a_worker_stays_with_the_gpu_that_it_has_opened(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-4")
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    addresses = ["MIG-4"]
    task = SimpleNamespace(resources=lambda: {"gpu": SimpleNamespace(addresses=addresses)})
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: task)
    assert choose_device() == "cuda:0"
    addresses[:] = ["MIG-5"]
    with pytest.raises(InputError, match="GPU MIG-5, and its worker has opened MIG-4 before"):
        choose_device()


@pytest.mark.parametrize("script", ["echo GPU-x", "exit 9", None])
def test_a_gpu_that_nobody_knows_is_an_error(monkeypatch, tmp_path, script):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    task = SimpleNamespace(resources=lambda: {"gpu": SimpleNamespace(addresses=["0"])})
    monkeypatch.setattr("pyspark.TaskContext.get", lambda: task)
    with pytest.raises(InputError, match="GPU 0, and CUDA_VISIBLE_DEVICES has GPU-a,GPU-b"):
        choose_device()


class Weighted(ImageClassifier):
    def __init__(self, weights, factor=1):
        super().__init__("x", pred_column="x")
        self.weights_of_it = weights
        self.factor = factor


def test_two_classifiers_are_known_as_two(monkeypatch):
    long = np.zeros(2000)
    other = long.copy()
    other[1000] = 1
    weights = [long, other, torch.tensor(long), torch.tensor(other), [1, 2], {"a": 1}, {1, 2}, None]

    def identity(classifier):
        return recipe_identity(Recipe(None, (classifier,)))

    identities = [identity(Weighted(w)) for w in weights]
    assert len(set(identities)) == len(weights)
    assert identities == [identity(Weighted(w)) for w in weights]
    with pytest.raises(InputError, match=r"weights_of_it cannot be told.*_weights_of_it"):
        identity(Weighted(lambda: 1))

    def redefined(factor):
        class Edited(ImageClassifier):
            def load_model(self, device):
                return lambda embeddings: embeddings.sum(dim=1) * factor

        Edited.__qualname__ = "Edited"
        return Edited("x")

    assert identity(redefined(1)) != identity(redefined(2))


def test_a_worker_keeps_few_models(embedder, monkeypatch):
    kept = {}
    monkeypatch.setattr("spark_nsfw.spark.worker._scorers", kept)
    recipe = Recipe.of(embedder, [], device="cpu").ready()
    scorers = [worker_scorer(recipe, name) for name in "abca"]
    assert len(set(map(id, scorers))) == 4  # the first "a" had to go
    assert worker_scorer(recipe, "a") is scorers[3]
    assert len(kept) == 2


def test_save_metadata_writes_parquet_by_shard(spark, shards, embedder, core_rows, tmp_path):
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(shards)))
    dataset.save_metadata(str(tmp_path / "out"))
    assert collected(spark.read.parquet(str(tmp_path / "out"))) == core_rows
    frame = pd.read_parquet(tmp_path / "out")
    assert by_identity(frame.replace({np.nan: None}).to_dict("records")).keys() == core_rows.keys()


def test_save_metadata_with_columns(spark, shards, embedder, tmp_path):
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(shards)))
    dataset.save_metadata(str(tmp_path / "out"), columns=["key", "nsfw_score"])
    assert spark.read.parquet(str(tmp_path / "out")).columns == ["key", "nsfw_score", "shard"]
    with pytest.raises(InputError, match="no column wrong"):
        dataset.save_metadata(str(tmp_path / "out"), columns=["wrong"])


def test_save_metadata_without_a_path_writes_sidecars_that_the_next_run_reads(
    spark, embedder, tmp_path
):
    write_photograph_shards(tmp_path, num_shards=2, samples_per_shard=3)
    ids = [f"00001000{i}" for i in range(3)]
    pd.DataFrame({"key": ids, "url": ["a", "b", "c"]}).to_parquet(tmp_path / "00001.parquet")
    embedder(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.parquet", "00000.tar", "00001.parquet", "00001.tar", "_spark_nsfw_replaced",
    ]  # fmt: skip
    replaced = pd.read_parquet(tmp_path / "_spark_nsfw_replaced" / "00001.parquet")
    assert replaced["url"].tolist() == ["a", "b", "c"]  # we did not write it
    sidecar = pd.read_parquet(tmp_path / "00001.parquet")
    assert sidecar["key"].tolist() == ids
    assert sidecar["nsfw_score"].notna().all()
    again = ImageTextPairDataset.from_webdataset(str(tmp_path))
    columns = again.metadata.columns
    assert len(columns) == len(set(columns))
    assert "source_status" not in columns
    rows = embedder(again).metadata.collect()
    assert [row.nsfw_score for row in rows if row.key in ids] == sidecar["nsfw_score"].tolist()


def test_sidecars_have_every_row_of_metadata_that_was_shuffled_or_split(spark, embedder, tmp_path):
    write_photograph_shards(tmp_path, num_shards=2, samples_per_shard=7)
    (tmp_path / "_spark_nsfw_sidecars" / "shard=gone").mkdir(parents=True)  # of a run that died
    (tmp_path / "_spark_nsfw_sidecars" / "shard=gone" / "part-0.parquet").write_bytes(b"x")
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    before = spark.conf.get("spark.sql.files.maxRecordsPerFile")
    spark.conf.set("spark.sql.files.maxRecordsPerFile", 2)
    try:
        dataset.save_metadata()
        in_order = pd.read_parquet(tmp_path / "00000.parquet")
        rows = [(f"0000{s}000{i}", f"{s}{i}") for s in range(2) for i in range(7)]
        labels = spark.createDataFrame(rows, "key string, label string").repartition(5)
        joined = dataset.metadata.repartition(5).join(labels.hint("shuffle_merge"), "key")
        dataset.metadata = joined.repartitionByRange(5, "label").sortWithinPartitions("label")
        dataset.save_metadata()
    finally:
        spark.conf.set("spark.sql.files.maxRecordsPerFile", before)
    assert in_order["key"].tolist() == [f"00000000{i}" for i in range(7)]
    for shard in range(2):
        sidecar = pd.read_parquet(tmp_path / f"0000{shard}.parquet")
        assert sidecar["label"].tolist() == [f"{shard}{i}" for i in range(7)]
        assert sidecar["nsfw_score"].notna().all()
    (note,) = inspect_output(str(tmp_path / "00000.parquet"))
    assert json.loads(note)["embedder"]["model_name"] == "test_vit2"
    assert len(list(tmp_path.iterdir())) == 4


def test_sidecars_of_several_inputs_lie_beside_their_shards(spark, embedder, tmp_path):
    for name in ("a", "b/deep"):
        write_photograph_shards(tmp_path / name, num_shards=1, samples_per_shard=2)
    (tmp_path / "b" / "deep" / "00000.tar").rename(tmp_path / "b" / "deep" / "00001.tar")
    inputs = [str(tmp_path / "b" / "deep" / "*.tar"), str(tmp_path / "a")]
    embedder(ImageTextPairDataset.from_webdataset(inputs)).save_metadata()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "a/00000.parquet", "a/00000.tar", "b/deep/00001.parquet", "b/deep/00001.tar",
    ]  # fmt: skip


def test_rows_of_a_shard_that_is_not_there_save_nothing(spark, embedder, tmp_path):
    write_photograph_shards(tmp_path, num_shards=1, samples_per_shard=2)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    other = dataset.metadata.withColumn("shard", F.lit("other"))
    dataset.metadata = dataset.metadata.unionByName(other)
    with pytest.raises(InputError, match="1 shard that the dataset does not have, such as 'oth"):
        dataset.save_metadata()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
