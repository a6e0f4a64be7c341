"""Embeddings from every layout are scored as the arrays that they are."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shared_file
from test_job import arguments

from spark_nsfw import NsfwClassifier
from spark_nsfw.cli import main
from spark_nsfw.errors import EmbeddingWidthError, InputError, NothingToReadError
from spark_nsfw.read.embeddings import EmbeddingSource
from spark_nsfw.schema import metadata_schema
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.stored import StoredScorer, embedding_matrix, score_column


@pytest.fixture(scope="module")
def golden():
    return np.load(shared_file("laion/golden_vit_l_14.npz"))["embedding_f32"]


@pytest.fixture(scope="module")
def classifier(detector_path):
    return NsfwClassifier(model_path=detector_path).for_embedding_size(768)


@pytest.fixture(scope="module")
def expected(golden, classifier):
    return classifier.classify(golden, "cpu").tolist()


def rows_of(directory, classifier, keep_embeddings=False, **options):
    source = EmbeddingSource.open(str(directory), **options)
    recipe = Recipe(
        None, (classifier,), "cpu", keep_embeddings, source.embedding_column, source.width
    )
    schema = source.schema()
    rows = (rows for unit in source.units() for rows in source.read(unit, schema))
    batches = StoredScorer(recipe, "cpu").score_rows(rows)
    return pa.Table.from_batches(batches, metadata_schema(schema, recipe.result_fields))


def write_sidecar(path, embeddings, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"key": [f"{path.stem}{i:04}" for i in range(len(embeddings))]} | columns
    table = pa.table(columns | {"image_embedding": pa.array([*embeddings], pa.list_(pa.float32()))})
    pq.write_table(table, path)


def write_clip_retrieval(directory, number, embeddings, **columns):
    for name in ("img_emb", "metadata"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    np.save(directory / "img_emb" / f"img_emb_{number}.npy", embeddings)
    columns = {"image_path": [f"{number}-{i}" for i in range(len(embeddings))]} | columns
    pd.DataFrame(columns).to_parquet(directory / "metadata" / f"metadata_{number}.parquet")


@pytest.mark.parametrize(
    "data_type",
    [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()),
     pa.list_(pa.float32(), 4)],
    ids=str,
)  # fmt: skip
def test_rows_that_are_no_embeddings_are_told_from_those_that_are(data_type):
    rows = [[1, 2, 3, 4], None, [5, 6, 7, 8], [np.nan, 0, 0, 0], [0, np.inf, 0, 0]]
    if not pa.types.is_fixed_size_list(data_type):
        rows += [[1, 2, 3], [], [1, 2, 3, None]]
    column = pa.array([None, *rows], data_type).slice(1)  # a slice starts inside its buffers
    matrix, usable = embedding_matrix(column, 4)
    assert matrix.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert np.flatnonzero(usable).tolist() == [0, 2]
    assert len(usable) == len(rows)


def test_float32_embeddings_are_not_copied():
    column = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    matrix, _ = embedding_matrix(column, 2)
    assert matrix.data_ptr() == column.flatten().buffers()[1].address


def test_sidecars_of_nemo_curator(tmp_path, golden, classifier, expected):
    for number in range(3):
        part = slice(number * 100, number * 100 + 100)
        write_sidecar(
            tmp_path / f"{number:05}.parquet",
            golden[part],
            url=["u"] * 100,
            status=["success"] * 100,
        )
    table = rows_of(tmp_path, classifier)
    assert table.column_names == [
        "shard", "key", "url", "source_status", "status", "error_message", "nsfw_score",
    ]  # fmt: skip
    assert table["nsfw_score"].to_pylist() == expected
    assert table["shard"].to_pylist()[99:101] == ["00000", "00001"]
    assert table["key"].to_pylist()[99:101] == ["000000099", "000010000"]
    assert set(table["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_clip_retrieval(tmp_path, golden, classifier, dtype):
    for number in range(2):
        part = golden[number * 150 : number * 150 + 150].astype(dtype)
        write_clip_retrieval(tmp_path, number, part, caption=["c"] * 150)
    table = rows_of(tmp_path, classifier, keep_embeddings=True)
    stored = golden.astype(dtype).astype(np.float32)
    assert table["nsfw_score"].to_pylist() == classifier.classify(stored, "cpu").tolist()
    assert np.array_equal(np.array(table["image_embedding"].to_pylist(), np.float32), stored)
    assert table["key"].to_pylist()[149:151] == ["0-149", "1-0"]
    assert table["shard"].to_pylist()[149:151] == ["img_emb_0", "img_emb_1"]


def test_what_is_no_embedding_is_a_row_that_says_why(tmp_path, golden, classifier, expected):
    embeddings = [golden[0], None, golden[1][:5], golden[2] * np.nan, golden[3]]
    write_sidecar(tmp_path / "00000.parquet", embeddings)
    table = rows_of(tmp_path, classifier)
    assert table["nsfw_score"].to_pylist() == [expected[0], None, None, None, expected[3]]
    assert table["status"].to_pylist() == ["ok", *["embedding_invalid"] * 3, "ok"]
    assert table["error_message"].to_pylist() == [
        None,
        "no embedding is stored",
        "the stored embedding has width 5, the first one has 768",
        "the stored embedding is not finite",
        None,
    ]


def test_a_file_that_cannot_be_read_is_a_row(tmp_path, golden, classifier):
    write_sidecar(tmp_path / "00000.parquet", golden[:3])
    (tmp_path / "00001.parquet").write_bytes(b"PAR1 no")
    *rows, last = rows_of(tmp_path, classifier).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert (last["shard"], last["key"], last["status"]) == ("00001", None, "shard_unreadable")
    assert "00001.parquet" in last["error_message"]


def test_a_file_without_the_column_is_a_row(tmp_path, golden, classifier):
    write_sidecar(tmp_path / "00000.parquet", golden[:3])
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "00001.parquet")
    *_, last = rows_of(tmp_path, classifier).to_pylist()
    assert (last["shard"], last["status"]) == ("00001", "shard_unreadable")
    assert last["error_message"].endswith("00001.parquet: it has no column image_embedding")


def test_an_npy_that_is_shorter_or_longer_than_its_rows_is_a_row(tmp_path, golden, classifier):
    write_clip_retrieval(tmp_path, 0, golden[:5])
    write_clip_retrieval(tmp_path, 1, golden[:5])
    np.save(tmp_path / "img_emb" / "img_emb_1.npy", golden[:4])
    table = rows_of(tmp_path, classifier)
    assert table["status"].to_pylist() == ["ok"] * 5 + ["shard_unreadable"]
    assert "img_emb_1.npy has 4 embeddings" in table["error_message"][5].as_py()
    path = tmp_path / "img_emb" / "img_emb_0.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert rows_of(tmp_path, classifier)["error_message"][0].as_py().endswith("is cut off")


def test_the_classifier_says_which_width_is_right_not_the_first_row(golden, classifier, expected):
    rows = [[], [1.0], [1.0], golden[0], None]
    scores, usable = score_column(pa.array(rows, pa.list_(pa.float32())), None, [classifier], "cpu")
    assert scores[0].to_pylist() == [None, None, None, expected[0], None]
    assert usable.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("rows", [[[1.0]], [[]], [[], [1.0]], [None], []])
def test_a_batch_with_no_more_than_one_misfit_has_no_scores(rows, detector_path):
    column = pa.array(rows, pa.list_(pa.float32()))
    for classifier in (NsfwClassifier(model_path=detector_path), NsfwClassifier()):
        (scores,), usable = score_column(column, None, [classifier], "cpu")
        assert scores.to_pylist() == [None] * len(rows)
        assert not usable.any()


def test_embeddings_that_are_all_of_another_width_are_refused(golden, classifier):
    column = pa.array([*golden[:3, :100]], pa.list_(pa.float32()))
    with pytest.raises(EmbeddingWidthError, match="768"):
        score_column(column, None, [classifier], "cpu")


def test_nanoseconds_do_not_cost_the_file(tmp_path, golden, classifier, expected):
    times = pa.array([1, 1_700_000_000_123_456_789], pa.timestamp("ns"))
    write_sidecar(tmp_path / "0.parquet", golden[:2], seen=times, several=[[times[0]], [times[1]]])
    table = rows_of(tmp_path, classifier)
    assert table["nsfw_score"].to_pylist() == expected[:2]
    assert [str(value) for value in table["seen"]] == [
        "1970-01-01 00:00:00", "2023-11-14 22:13:20.123456",
    ]  # fmt: skip
    assert str(table["several"][1][0]) == "2023-11-14 22:13:20.123456"


def test_integers_that_another_file_has_as_floats_do_not_cost_the_file(
    tmp_path, golden, classifier
):
    write_sidecar(tmp_path / "0.parquet", golden[:1], size=[2**60 + 1])
    write_sidecar(tmp_path / "1.parquet", golden[:1], size=[2.5])
    table = rows_of(tmp_path, classifier)
    assert table["size"].to_pylist() == [float(2**60), 2.5]


def test_types_that_have_none_in_common_are_refused_with_both_files(tmp_path, golden):
    write_sidecar(tmp_path / "0.parquet", golden[:1], n=[1])
    write_sidecar(tmp_path / "1.parquet", golden[:1], n=[1], w=[5])
    write_sidecar(tmp_path / "2.parquet", golden[:1], n=[1], w=["wide"])
    message = r"column 'w' is int64 in .*/1\.parquet and string in .*/2\.parquet"
    with pytest.raises(InputError, match=message):
        EmbeddingSource.open(str(tmp_path))


def test_a_partitions_own_directory_or_file_is_named_by_the_partition(tmp_path, golden, classifier):
    directory = tmp_path / "out" / "shard=a%2F00042"
    write_sidecar(directory / "part-0.parquet", golden[:1])
    for place in (tmp_path, tmp_path / "out", directory, directory / "part-0.parquet"):
        assert rows_of(place, classifier)["shard"].to_pylist() == ["a/00042"]


def units_of(source):
    schema = source.schema()
    return {
        unit.name: [key for rows, _ in source.read(unit, schema) for key in rows["key"].to_pylist()]
        for unit in source.units()
    }


def test_the_files_of_a_partition_are_one_unit(tmp_path, golden):
    write_sidecar(tmp_path / "shard=__schema__" / "part-0.parquet", [], url=pa.array([], "string"))
    for name in "ab":
        write_sidecar(tmp_path / "shard=x%2Fy" / f"{name}.parquet", golden[:2])
    source = EmbeddingSource.open(str(tmp_path))
    assert units_of(source) == {"x/y": ["a0000", "a0001", "b0000", "b0001"]}
    assert source.schema().names == ["shard", "key", "url", "status", "error_message"]
    (unit,) = source.units()
    assert unit.place == str(tmp_path / "shard=x%2Fy")
    one = EmbeddingSource.open(f"{unit.place}/b.parquet")
    assert units_of(one) == {"x/y": ["b0000", "b0001"]}


@pytest.mark.parametrize("name", ["x.parquet", "x.npy", "img_emb"])
def test_a_partition_may_be_named_as_a_file_is(tmp_path, golden, name):
    write_sidecar(tmp_path / f"shard={name}" / "a.parquet", golden[:1])
    assert units_of(EmbeddingSource.open(str(tmp_path))) == {name: ["a0000"]}


def test_two_places_of_one_shard_are_refused_with_both(tmp_path, golden):
    write_sidecar(tmp_path / "shard=x%2Fy" / "a.parquet", golden[:1])
    write_sidecar(tmp_path / "x" / "y.parquet", golden[:1])
    with pytest.raises(InputError, match=r"shard=x%2Fy and .*/x/y\.parquet would both be shard"):
        EmbeddingSource.open(str(tmp_path)).units()


def test_an_output_without_rows_is_nothing_to_read(tmp_path, golden):
    write_sidecar(tmp_path / "shard=x" / "a.parquet", golden[:1])
    write_sidecar(tmp_path / "shard=__schema__" / "a.parquet", [])
    source = EmbeddingSource.open(str(tmp_path))
    (tmp_path / "shard=x" / "a.parquet").unlink()
    with pytest.raises(NothingToReadError):
        source.units()


def test_a_unit_that_is_gone_is_no_row(tmp_path, golden):
    write_sidecar(tmp_path / "a.parquet", golden[:1])
    write_sidecar(tmp_path / "out" / "shard=b" / "b.parquet", golden[:1])
    for place in (tmp_path / "a.parquet", tmp_path / "out"):
        source = EmbeddingSource.open(str(place))
        (unit,) = source.units()
        (place if place.is_file() else place / "shard=b" / "b.parquet").unlink()
        with pytest.raises(FileNotFoundError):
            next(source.read(unit, source.schema()))


def test_the_columns_that_an_earlier_run_settled_are_kept(tmp_path, golden):
    write_sidecar(tmp_path / "a.parquet", golden[:1], n=[1], new=["x"])
    source = EmbeddingSource.open(str(tmp_path))
    schema = source.schema([pa.field("gone", pa.string()), pa.field("n", pa.int64())])
    ((rows, embeddings),) = source.read(source.units()[0], schema)
    assert rows.to_pylist() == [
        {"shard": "a", "key": "a0000", "gone": None, "n": 1, "status": "ok", "error_message": None}
    ]
    assert embeddings.to_pylist() == golden[:1].tolist()


def test_a_status_that_is_null_is_ok(tmp_path, golden):
    columns = {"status": ["ok", None], "error_message": pa.array([None, None], pa.string())}
    write_sidecar(tmp_path / "shard=a" / "a.parquet", golden[:2], **columns)
    source = EmbeddingSource.open(str(tmp_path))
    ((rows, _),) = source.read(source.units()[0], source.schema())
    assert rows["status"].to_pylist() == ["ok", "ok"]


@pytest.mark.parametrize(
    ("output", "covered"),
    [("in", True), ("in/out", True), (".", True), ("in2", False), ("link", True)],
)
def test_which_outputs_would_be_in_the_way(tmp_path, golden, output, covered):
    write_sidecar(tmp_path / "in" / "a.parquet", golden[:1])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    source = EmbeddingSource.open(str(tmp_path / "in"))
    assert source.covers(f"{tmp_path}/{output}/") is covered
    assert source.covers(f"file://{tmp_path}/{output}") is covered


def test_a_path_is_made_absolute_for_workers_that_stand_elsewhere(tmp_path, golden, monkeypatch):
    write_sidecar(tmp_path / "in" / "a.parquet", golden[:1])
    monkeypatch.chdir(tmp_path)
    source = EmbeddingSource.open("in")
    assert source.describe()["inputs"] == {"kind": "embeddings", "root": str(tmp_path / "in")}


def test_a_partition_without_our_columns_is_scored_all_the_same(
    tmp_path, golden, classifier, expected
):
    for number, columns in enumerate(({"status": ["ok"], "error_message": ["so"]}, {})):
        path = tmp_path / f"shard={number}" / "part-0.parquet"
        write_sidecar(path, golden[number : number + 1], **columns)
    table = rows_of(tmp_path, classifier)
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert table["error_message"].to_pylist() == ["so", None]
    assert table["nsfw_score"].to_pylist() == expected[:2]


def test_columns_that_some_files_lack_or_type_otherwise_are_merged(tmp_path, golden, classifier):
    write_sidecar(tmp_path / "0.parquet", golden[:1], width=[5], note=["x"])
    write_sidecar(tmp_path / "1.parquet", golden[:1], width=[2.5])
    table = rows_of(tmp_path, classifier)
    assert table.select(["width", "note"]).to_pylist() == [
        {"width": 5.0, "note": "x"},
        {"width": 2.5, "note": None},
    ]


def test_what_cannot_work_is_refused_with_what_there_is(tmp_path, golden, classifier):
    with pytest.raises(InputError, match="no Parquet files"):
        EmbeddingSource.open(str(tmp_path))
    write_sidecar(tmp_path / "a" / "0.parquet", golden[:1])
    with pytest.raises(InputError, match="no column 'emb'; there are key, image_embedding"):
        EmbeddingSource.open(str(tmp_path / "a"), "emb")
    with pytest.raises(InputError, match="no column 'uid'"):
        EmbeddingSource.open(str(tmp_path / "a"), id_col="uid")
    write_clip_retrieval(tmp_path / "b", 0, golden[:1])
    (tmp_path / "b" / "metadata" / "metadata_0.parquet").unlink()
    with pytest.raises(InputError, match=r"has no metadata/metadata_0\.parquet"):
        EmbeddingSource.open(str(tmp_path / "b"))
    write_sidecar(tmp_path / "c" / "0.parquet", [None])
    with pytest.raises(InputError, match="holds no embedding"):
        EmbeddingSource.open(str(tmp_path / "c"))


def test_the_command_scores_our_own_metadata_to_the_same_bits(
    spark, shards, tmp_path, detector_path, capsys
):
    assert main(["score", *arguments(shards, tmp_path / "metadata", detector_path)]) == 0
    before = spark.read.parquet(str(tmp_path / "metadata"))
    command = ["classify", str(tmp_path / "metadata"), str(tmp_path / "out")]
    command += ["--nsfw-checkpoint", detector_path]
    capsys.readouterr()
    assert main(command) == 0
    assert "scores mean nothing" in capsys.readouterr().out  # of the random tower, still
    after = spark.read.parquet(str(tmp_path / "out"))
    assert set(after.columns) == set(before.columns) - {"image_embedding"}
    columns = sorted(after.columns)
    expected = before.select(columns).collect()
    assert sorted(map(str, after.select(columns).collect())) == sorted(map(str, expected))
    assert len({row.status for row in expected}) > 3
    note = json.loads(after.schema["nsfw_score"].metadata["spark_nsfw"])
    assert note["embedder"]["model_name"] == "test_vit2"

    assert main(command) == 0  # started again, it writes the same rows
    assert spark.read.parquet(str(tmp_path / "out")).count() == len(expected)
    assert main([*command, "--nsfw-variant=laion"]) == 1
    assert 'classifiers.0.variant was "torch", is now "laion"' in capsys.readouterr().err
    assert main(["classify", command[1], command[1] + "/below"]) == 2


def test_the_command_scores_sidecars_with_several_classifiers(
    spark, golden, tmp_path, detector_path, expected, aesthetic_path, capsys
):
    for number in range(2):
        write_sidecar(tmp_path / "in" / f"{number:05}.parquet", golden[number * 150 :][:150])
    command = ["classify", str(tmp_path / "in"), str(tmp_path / "out"), "--embeddings"]
    command += ["--nsfw-checkpoint", detector_path, "--aesthetic-checkpoint", aesthetic_path]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "300 samples in 2 shards: 300 scored, 0 failed" in out
    assert "mean nothing" not in out
    frame = pd.read_parquet(tmp_path / "out").sort_values("key")
    assert frame["nsfw_score"].tolist() == expected
    assert frame["aesthetic_score"].between(-100, 100).all()
    assert np.array_equal(np.stack(frame["image_embedding"]), golden)
    assert set(frame["shard"].astype(str)) == {"00000", "00001"}


def test_embeddings_of_another_width_are_refused_before_the_job(
    spark, golden, tmp_path, detector_path, capsys
):
    write_sidecar(tmp_path / "in" / "0.parquet", golden[:, :512])
    command = ["classify", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*command, "--nsfw-checkpoint", detector_path]) == 1
    assert "768" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_width_decides_the_detector(tmp_path, golden, classifier):
    write_sidecar(tmp_path / "0.parquet", golden[:2, :100])
    with pytest.raises(EmbeddingWidthError):
        rows_of(tmp_path, classifier)
