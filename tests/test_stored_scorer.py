"""Rows with stored embeddings get the scores of these embeddings, and keep their order."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from conftest import shared_file

from spark_nsfw import (
    AestheticClassifier,
    ImageClassifier,
    NsfwClassifier,
    Scorer,
    TimmImageEmbedder,
)
from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.schema import metadata_schema
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.stored import StoredScorer

LIST = pa.list_(pa.float32())


@pytest.fixture(scope="module")
def golden():
    return np.load(shared_file("laion/golden_vit_l_14.npz"))


@pytest.fixture(scope="module")
def recipe(detector_path):
    recipe = Recipe.of(None, [NsfwClassifier(model_path=detector_path)], keep_embeddings=False)
    return recipe.ready(device="cpu", embedding_size=768)


@pytest.fixture(scope="module")
def expected(golden, detector_path):
    scores = NsfwClassifier(model_path=detector_path).classify(golden["embedding_f32"], "cpu")
    return scores.tolist()


def rows(num_rows, **columns):
    """A batch as a source gives it: all is well unless the columns say otherwise."""
    columns = {
        "shard": pa.array(["s"] * num_rows),
        "key": pa.array([f"{row:03}" for row in range(num_rows)]),
        "status": pa.array(["ok"] * num_rows),
        "error_message": pa.nulls(num_rows, pa.string()),
    } | columns
    return pa.RecordBatch.from_pydict(columns)


def score(recipe, *pairs):
    return list(StoredScorer(recipe).score_rows(pairs))


@pytest.mark.parametrize("data_type", [LIST, pa.list_(pa.float16())], ids=str)
@pytest.mark.parametrize("name", ["vit_l_14", "vit_b_32"])
def test_laions_variant_gives_tensorflows_scores(name, data_type):
    files = {
        "vit_l_14": "clip_autokeras_binary_nsfw.zip",
        "vit_b_32": "clip_autokeras_nsfw_b32.zip",
    }
    arrays = np.load(shared_file(f"laion/golden_{name}.npz"))
    embeddings = pa.array([*arrays["embedding_f16"]]).cast(data_type)
    path = str(shared_file(f"laion/{files[name]}"))
    recipe = Recipe.of(None, [NsfwClassifier(model_path=path, variant="laion")])
    recipe = recipe.ready(device="cpu", embedding_size=len(embeddings[0]))
    (metadata,) = score(recipe, (rows(len(embeddings)), embeddings))
    assert np.abs(metadata["nsfw_score"].to_numpy() - arrays["score_f16"]).max() <= 1e-6


@pytest.mark.parametrize(
    "data_type",
    [LIST, pa.large_list(pa.float64()), pa.list_(pa.float32(), 768)],
    ids=["list", "large_list", "fixed_size_list"],
)
def test_every_list_type_gives_the_same_bits(recipe, golden, expected, data_type):
    embeddings = pa.array([None, *golden["embedding_f32"]], data_type).slice(1)
    kept = dataclasses.replace(recipe, keep_embeddings=True)
    (metadata,) = score(kept, (rows(len(embeddings)), embeddings))
    assert metadata["nsfw_score"].to_pylist() == expected
    assert metadata["image_embedding"].type == LIST
    assert np.array_equal(metadata["image_embedding"].to_pylist(), golden["embedding_f32"])


def test_what_is_no_embedding_is_a_row_that_says_why(recipe, golden, expected):
    good = golden["embedding_f32"]
    embeddings = pa.array([good[0], None, good[1][:5], good[2] * np.nan, good[3]], LIST)
    message = pa.array([None, "it was well", None, None, "it was warm"])
    kept = dataclasses.replace(recipe, keep_embeddings=True)
    (metadata,) = score(kept, (rows(5, error_message=message), embeddings))
    assert metadata["key"].to_pylist() == ["000", "001", "002", "003", "004"]
    assert metadata["nsfw_score"].to_pylist() == [expected[0], None, None, None, expected[3]]
    assert metadata["status"].to_pylist() == ["ok", *["embedding_invalid"] * 3, "ok"]
    assert metadata["error_message"].to_pylist() == [
        None,
        "no embedding is stored",
        "the stored embedding has width 5, the first one has 768",
        "the stored embedding is not finite",
        "it was warm",
    ]
    kept_ones = [value is not None for value in metadata["image_embedding"].to_pylist()]
    assert kept_ones == [True, False, False, False, True]


def test_rows_that_failed_before_stay_as_they_are(recipe, golden, expected):
    good = golden["embedding_f32"]
    batch = rows(
        3,
        status=pa.array(["image_undecodable", "ok", "image_missing"]),
        error_message=pa.array(["cut in half", None, "no image"]),
    )
    kept = dataclasses.replace(recipe, keep_embeddings=True)
    (metadata,) = score(kept, (batch, pa.array([None, good[1], good[2]], LIST)))
    assert metadata.select(["status", "error_message"]) == batch.select(["status", "error_message"])
    assert metadata["nsfw_score"].to_pylist() == [None, expected[1], None]
    assert [row is None for row in metadata["image_embedding"].to_pylist()] == [True, False, True]


@pytest.mark.parametrize(
    "nothing", [None, pa.nulls(1), pa.nulls(1, LIST), pa.nulls(1, pa.list_(pa.float16(), 768))]
)
def test_a_row_that_stands_for_a_shard_passes_through(recipe, golden, expected, nothing):
    fault = rows(
        1,
        key=pa.array([None], pa.string()),
        status=pa.array(["shard_unreadable"]),
        error_message=pa.array(["no Parquet"]),
    )
    embedding = pa.array([golden["embedding_f32"][0]], LIST)
    kept = dataclasses.replace(recipe, keep_embeddings=True)
    before, metadata, after = score(
        kept, (rows(1), embedding), (fault, nothing), (rows(1), embedding)
    )
    assert metadata.to_pylist() == [
        *({"image_embedding": None, "nsfw_score": None} | row for row in fault.to_pylist())
    ]
    assert before.schema == metadata.schema == after.schema
    assert before == after
    assert before["nsfw_score"].to_pylist() == expected[:1]


def test_an_empty_batch_gives_an_empty_one(recipe):
    (metadata,) = score(recipe, (rows(0), pa.array([], LIST)))
    assert (metadata.num_rows, metadata.column_names[-1]) == (0, "nsfw_score")


def test_the_batch_does_not_change_a_bit(recipe, golden, expected):
    good = golden["embedding_f32"]
    pairs = [(rows(len(part)), pa.array([*part], LIST)) for part in np.split(good, [1, 2, 130])]
    metadata = pa.Table.from_batches(score(recipe, *pairs))
    assert metadata["nsfw_score"].to_pylist() == expected


def test_the_schema_is_the_declared_one(recipe, golden, aesthetic_path):
    """A column under a result's name gives way; the others pass through."""
    classifiers = [*recipe.classifiers, AestheticClassifier(model_path=aesthetic_path)]
    recipe = dataclasses.replace(
        recipe, classifiers=tuple(classifiers), keep_embeddings=True, embedding_column="clip"
    )
    batch = rows(1, url=pa.array(["u"]), nsfw_score=pa.array([7.0], pa.float64()))
    (metadata,) = score(recipe, (batch, pa.array([golden["embedding_f32"][0]], LIST)))
    assert metadata.schema == metadata_schema(batch.schema, recipe.result_fields)
    assert metadata.column_names == [
        "shard", "key", "status", "error_message", "url", "clip", "nsfw_score", "aesthetic_score",
    ]  # fmt: skip
    assert metadata["nsfw_score"][0].as_py() <= 1


class Mean(ImageClassifier):
    def load_model(self, device):
        return lambda embeddings: embeddings.mean(dim=1)


def test_a_classifier_of_any_width_scores_the_width_that_is_stored():
    recipe = Recipe.of(None, [Mean("mean")]).ready(device="cpu", embedding_size=2)
    embeddings = pa.array([[1, 3], [1, 2, 3], [5, 5]], LIST)
    (metadata,) = score(recipe, (rows(3), embeddings))
    assert metadata["mean_score"].to_pylist() == [2, None, 5]
    assert metadata["status"].to_pylist() == ["ok", "embedding_invalid", "ok"]


def test_a_recipe_that_it_cannot_score_is_refused(detector_path):
    recipe = Recipe.of(None, [NsfwClassifier(model_path=detector_path)])
    with pytest.raises(InputError, match="embedding_size"):
        StoredScorer(recipe)
    with pytest.raises(InputError, match="is about images"):
        StoredScorer(Recipe.of(TimmImageEmbedder("test_vit2")))
    with pytest.raises(InputError, match="no embedder"):
        Scorer.of(recipe)
    with pytest.raises(EmbeddingWidthError, match="512"):
        StoredScorer(dataclasses.replace(recipe, embedding_size=512))


def test_fresh_and_stored_embeddings_get_the_same_scores(embedder, jpegs):
    recipe = Recipe.of(embedder).ready(device="cpu")
    batch = rows(len(jpegs))
    (fresh,) = Scorer.of(recipe).score_rows([(batch, jpegs)])
    stored = Recipe(None, recipe.classifiers, embedding_size=768)
    (again,) = score(stored, (batch, fresh["image_embedding"]))
    assert again == fresh.drop_columns(["embedding_norm"])
