"""Stored embeddings under classifiers that take CLIP's projections, not what is normalised."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_heads import random_heads, write_heads
from test_job import arguments

from spark_nsfw import ImageClassifier, TimmImageEmbedder
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError
from spark_nsfw.read.embeddings import EmbeddingSource
from spark_nsfw.schema import metadata_schema
from spark_nsfw.score.multi_headed import HEADS, MultiHeadedClassifier
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.scorer import Scorer
from spark_nsfw.score.stored import StoredScorer, refuse_missing_norms
from spark_nsfw.spark.stored import score_embeddings


class Length(ImageClassifier):
    """The projection's length: wrong wherever an embedding is taken for it."""

    takes_projection = True

    def __init__(self):
        super().__init__("length")

    def load_model(self, device):
        return lambda projections: projections.norm(dim=1)


class Sum(ImageClassifier):
    def __init__(self):
        super().__init__("sum")

    def load_model(self, device):
        return lambda embeddings: embeddings.sum(dim=1)


def write_metadata(path, embeddings, **columns):
    columns |= {"image_embedding": pa.array(embeddings, pa.list_(pa.float32()))}
    columns |= {"key": [f"{row:03}" for row in range(len(embeddings))]}
    pq.write_table(pa.table(columns), path)


def scored(directory, *classifiers):
    source = EmbeddingSource.open(str(directory))
    recipe = Recipe(None, classifiers, "cpu", keep_embeddings=False, embedding_size=source.width)
    schema = source.schema()
    rows = (rows for unit in source.units() for rows in source.read(unit, schema))
    batches = StoredScorer(recipe, "cpu").score_rows(rows)
    table = pa.Table.from_batches(batches, metadata_schema(schema, recipe.result_fields))
    return table.to_pandas().set_index("key")


@pytest.mark.parametrize("dtype", [pa.float32(), pa.float64(), pa.float16()], ids=str)
def test_the_projection_is_the_embedding_at_its_stored_length(tmp_path, dtype):
    norms = pa.array(np.array([10, 12.5, 0.25], np.float16)).cast(dtype)
    embeddings = [[0.6, 0.8], [1, 0], [0, -1]]
    write_metadata(tmp_path / "0.parquet", embeddings, embedding_norm=norms)
    found = scored(tmp_path, Length(), Sum())
    assert np.allclose(found["length_score"], [10, 12.5, 0.25])
    assert np.allclose(found["sum_score"], [1.4, 1, -1])
    assert np.allclose(found["embedding_norm"], [10, 12.5, 0.25])


def test_embeddings_that_were_never_normalised_get_their_own_length(tmp_path):
    write_metadata(tmp_path / "0.parquet", [[6, 8.0], [0, -2]], embedding_norm=[10.0, 2])
    assert np.allclose(scored(tmp_path, Length())["length_score"], [10, 2])


def test_a_row_without_a_length_says_so(tmp_path):
    norms = pa.array([10.0, None, 0, float("nan"), float("inf"), -1, 5, 5, 5], pa.float32())
    embeddings = [[0.6, 0.8]] * 6 + [None, [1.0], [float("nan"), 1]]
    write_metadata(tmp_path / "0.parquet", embeddings, embedding_norm=norms)
    found = scored(tmp_path, Length(), Sum())
    assert found["status"].tolist() == ["ok"] + ["embedding_invalid"] * 8
    assert found["length_score"].isna().tolist() == [False] + [True] * 8
    no_length = "no embedding_norm above 0 is stored, which a classifier needs"
    assert found["error_message"].fillna("").tolist() == [
        "",
        *[no_length] * 5,
        "no embedding is stored",
        "the stored embedding has width 1, the first one has 2",
        "the stored embedding is not finite",
    ]
    found = scored(tmp_path, Sum())  # which needs none
    assert found["status"].tolist() == ["ok"] * 6 + ["embedding_invalid"] * 3


def test_a_file_without_the_column_beside_one_with_it_has_no_scores(tmp_path):
    write_metadata(tmp_path / "0.parquet", [[0.6, 0.8]], embedding_norm=[10.0])
    write_metadata(tmp_path / "1.parquet", [[0.6, 0.8]])
    assert scored(tmp_path, Length())["status"].tolist() == ["ok", "embedding_invalid"]


def test_where_no_file_has_the_column_nothing_is_scored(tmp_path):
    write_metadata(tmp_path / "0.parquet", [[0.6, 0.8]])
    with pytest.raises(InputError, match="embedding_norm"):
        scored(tmp_path, Length())
    with pytest.raises(InputError, match=r"Length .*here has no column 'embedding_norm'.*anew"):
        refuse_missing_norms([Sum(), Length()], ["key"], "here")
    refuse_missing_norms([Sum()], ["key"], "here")


@pytest.fixture(scope="module")
def heads_path(tmp_path_factory):
    return str(write_heads(random_heads(), tmp_path_factory.mktemp("mhsc") / "heads"))


@pytest.fixture
def heads(heads_path):
    return MultiHeadedClassifier(model_path=heads_path)


@pytest.mark.parametrize("normalize", [True, False])
def test_fresh_and_stored_embeddings_get_the_same_scores(tmp_path, jpegs, heads, normalize):
    embedder = TimmImageEmbedder(
        "test_vit2", embedding_size=768, normalize_embeddings=normalize,
        classifiers=[heads],
    )  # fmt: skip
    keys = [f"{row:03}" for row in range(len(jpegs))]
    batch = pa.RecordBatch.from_pydict(
        {
            "shard": ["s"] * len(jpegs),
            "key": keys,
            "status": ["ok"] * len(jpegs),
            "error_message": pa.nulls(len(jpegs), pa.string()),
            "image": pa.array(jpegs, pa.binary()),
        }
    )
    (fresh,) = Scorer(embedder, device="cpu").score([batch])
    embeddings = np.array(fresh["image_embedding"].to_pylist())
    norms = fresh["embedding_norm"].to_numpy()
    lengths = np.linalg.norm(embeddings, axis=1)
    assert np.allclose(lengths, 1 if normalize else norms, rtol=1e-5)
    projections = embeddings / lengths[:, None] * norms[:, None]
    own = heads.classify(projections, "cpu")
    columns = [f"mhsc_{head}_score" for head in HEADS]
    frame = fresh.select(columns).to_pandas()
    assert np.abs(frame.to_numpy() - own).max() < 1e-5
    write_metadata(tmp_path / "0.parquet", embeddings.tolist(), embedding_norm=norms)
    again = scored(tmp_path, heads)
    assert np.array_equal(again[columns].to_numpy(), frame.to_numpy())


def test_the_command_scores_our_own_metadata(spark, shards, tmp_path, heads_path, detector_path):
    """The heads beside the tower, and on what it stored, to the same bits."""
    shard, detector = str(shards / "00000.tar"), f"--detector=multi_headed={heads_path}"
    inputs = arguments(shard, tmp_path / "metadata", detector_path)
    assert main(["score", *inputs, "--detector=laion", detector]) == 0
    assert main(["classify", str(tmp_path / "metadata"), str(tmp_path / "out"), detector]) == 0
    columns = ["key", *(f"mhsc_{head}_score" for head in HEADS)]
    before, after = (
        pd.read_parquet(tmp_path / name)[columns].dropna().sort_values("key").reset_index(drop=True)
        for name in ("metadata", "out")
    )
    assert len(before) == 11
    assert before.equals(after)


def test_the_command_refuses_before_spark_starts(tmp_path, heads_path, monkeypatch, capsys):
    monkeypatch.setattr("spark_nsfw.spark.session.active_or_local_session", lambda: 1 / 0)
    embeddings = np.full((3, 768), 768**-0.5).tolist()
    write_metadata(tmp_path / "0.parquet", embeddings)
    command = ["classify", str(tmp_path / "0.parquet"), str(tmp_path / "out"), "--detector"]
    assert main([*command, f"multi_headed={heads_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"MultiHeadedClassifier .*0\.parquet has no column 'embedding_norm'", error)
    assert "spark-nsfw score" in error
    assert main([*command, "concepts"]) == 1
    assert "--detector concepts=FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_spark_rows_get_all_columns(spark, heads, heads_path):
    embeddings = np.random.default_rng(3).normal(size=(5, 768)).astype(np.float32)
    norms = np.linalg.norm(embeddings, axis=1)
    rows = [
        ((embedding / norm).tolist(), float(norm))
        for embedding, norm in zip(embeddings, norms, strict=True)
    ]
    frame = spark.createDataFrame(
        [*rows, (rows[0][0], None)], "image_embedding array<float>, embedding_norm float"
    )
    found = score_embeddings(frame, [heads], device="cpu").toPandas()
    columns = [f"mhsc_{head}_score" for head in HEADS]
    expected = heads.classify(embeddings, "cpu")
    assert np.abs(found[columns].to_numpy()[:5] - expected).max() < 1e-5
    assert found[columns].iloc[5].isna().all()
    with pytest.raises(InputError, match=r"MultiHeadedClassifier.*the dataset has no column"):
        score_embeddings(frame.drop("embedding_norm"), [heads])
    one = MultiHeadedClassifier(pred_columns=["a", "b", "c", "d", "e"], model_path=heads_path)
    two = MultiHeadedClassifier(pred_columns=["e", "f", "g", "h", "i"], model_path=heads_path)
    with pytest.raises(InputError, match="two results"):
        score_embeddings(frame, [one, two])
