"""Classifiers as users of NVIDIA NeMo Curator wrote them, run as they are."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from pyspark import cloudpickle
from scoring import score_into
from torch import nn

from spark_nsfw import (
    ImageClassifier,
    ImageTextPairDataset,
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_batches,
)


class MLP(nn.Module):
    """NeMo Curator's AestheticClassifier has this network, with more layers."""

    def __init__(self, input_size):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_size, 16), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)


class NemoAestheticClassifier(ImageClassifier):
    """The code of NeMo Curator's own classifier, apart from the name of the network's file."""

    def __init__(
        self,
        embedding_column="image_embedding",
        pred_column="aesthetic_score",
        batch_size=-1,
        model_path=None,
    ):
        super().__init__(
            model_name="aesthetic_classifier",
            embedding_column=embedding_column,
            pred_column=pred_column,
            pred_type=float,
            batch_size=batch_size,
            embedding_size=768,
        )
        self.model_path = model_path

    def load_model(self, device):
        model = MLP(self.embedding_size).to(device)
        weights = torch.load(self.model_path, map_location=torch.device("cpu"))
        model.load_state_dict(weights)
        model.eval()
        return self._configure_forward(model)

    @staticmethod
    def _configure_forward(model):
        original_forward = model.forward

        def custom_forward(*args, **kwargs):
            return original_forward(*args, **kwargs).squeeze()

        model.forward = custom_forward
        return model

    def postprocess(self, series):
        new_series = series.list.leaves
        new_series.index = series.index
        return new_series


class Logits(ImageClassifier):
    """Three logits per image, of which `postprocess` makes a label."""

    def __init__(self, pred_type, pred_column="label"):
        super().__init__(
            model_name="logits",
            embedding_column="image_embedding",
            pred_column=pred_column,
            pred_type=pred_type,
            batch_size=4,
            embedding_size=768,
        )

    def load_model(self, device):
        torch.manual_seed(4)
        return nn.Linear(768, 3, bias=False).eval().requires_grad_(False).to(device)


class Label(Logits):
    def postprocess(self, series):
        return series.apply(lambda logits: int(np.argmax(logits)))


class NameOfLabel(Logits):
    def postprocess(self, series):
        return series.apply(lambda logits: ["cat", "dog", "fish"][int(np.argmax(logits))])


class Second(Logits):
    """As cuDF's users take one number of several, and decide by it."""

    def postprocess(self, series):
        return (series.list.get(1) > 0).astype("int32")


@pytest.fixture(scope="module", autouse=True)
def _classes_of_a_notebook():
    """Spark's workers get the classes below along with the job, as those of a notebook."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def aesthetic(tmp_path):
    torch.manual_seed(2)
    torch.save(MLP(768).state_dict(), tmp_path / "mlp.pth")
    return NemoAestheticClassifier(model_path=str(tmp_path / "mlp.pth"))


@pytest.fixture
def classifiers(aesthetic):
    return [
        aesthetic,
        Label("int32", "label"),
        Label(int, "wide_label"),
        NameOfLabel(str, "name"),
        NameOfLabel("str", "same_name"),
        Second("int32", "is_second"),
    ]


def expected(embeddings, aesthetic):
    """What each column should hold, by other means."""
    embeddings = torch.tensor(embeddings, dtype=torch.float32)
    network = MLP(768)
    network.load_state_dict(torch.load(aesthetic.model_path))
    with torch.inference_mode():
        scores = network.eval()(embeddings)[:, 0].tolist()
        logits = Logits(float).load_model("cpu")(embeddings).numpy()
    labels = logits.argmax(axis=1).tolist()
    names = [["cat", "dog", "fish"][label] for label in labels]
    return pd.DataFrame(
        {
            "aesthetic_score": scores,
            "label": labels,
            "wide_label": labels,
            "name": names,
            "same_name": names,
            "is_second": (logits[:, 1] > 0).astype(int).tolist(),
        }
    )


def assert_equal(found, embeddings, aesthetic):
    wanted = expected(np.stack(embeddings), aesthetic)
    for column in wanted:
        if column == "aesthetic_score":
            assert np.abs(found[column].astype(float) - wanted[column]).max() < 1e-5
        else:
            assert found[column].tolist() == wanted[column].tolist(), column


TYPES = {
    "aesthetic_score": "float",
    "label": "int32",
    "wide_label": "int64",
    "name": "string",
    "same_name": "string",
    "is_second": "int32",
}


def tower(classifiers):
    return TimmImageEmbedder("test_vit2", batch_size=8, embedding_size=768, classifiers=classifiers)


def test_the_scorer_runs_them(shards, classifiers, aesthetic):
    batches = iter_sample_batches([(str(shards / "00000.tar"), "00000")], SampleOptions())
    (metadata,) = Scorer(tower(classifiers), device="cpu").score(batches)
    found = {name: str(metadata.schema.field(name).type) for name in TYPES}
    assert found == TYPES
    rows = metadata.to_pandas()
    assert len(rows) == 11
    assert_equal(rows, rows["image_embedding"], aesthetic)


def test_a_row_without_an_image_has_nulls_of_every_type(shards, classifiers):
    batches = iter_sample_batches([(str(shards / "odd" / "00000.tar"), "odd")], SampleOptions())
    metadata = list(Scorer(tower(classifiers), device="cpu").score(batches))
    rows = [row for batch in metadata for row in batch.to_pylist()]
    failed = [row for row in rows if row["status"] != "ok"]
    assert failed
    assert len(failed) < len(rows)
    assert all(row[name] is None for row in failed for name in TYPES)
    assert all(row[name] is not None for row in rows if row["status"] == "ok" for name in TYPES)


def test_spark_runs_them(spark, shards, tmp_path, classifiers, aesthetic):
    score_into(spark, shards / "00000.tar", tmp_path / "out", tower(classifiers))
    rows = spark.read.parquet(str(tmp_path / "out"))
    types = {name: rows.schema[name].dataType.simpleString() for name in TYPES}
    assert types == TYPES | {"label": "int", "wide_label": "bigint", "is_second": "int"}
    found = rows.where("status = 'ok'").toPandas()
    assert len(found) == 11
    assert_equal(found, found["image_embedding"], aesthetic)


def test_a_dataset_runs_them_on_embeddings_that_are_there(
    spark, shards, tmp_path, classifiers, aesthetic
):
    dataset = ImageTextPairDataset.from_webdataset(str(shards / "00000.tar"), spark=spark)
    dataset = tower([])(dataset)
    for classifier in classifiers:
        dataset = classifier(dataset)
    found = dataset.metadata.where("status = 'ok'").toPandas()
    assert_equal(found, found["image_embedding"], aesthetic)


@pytest.mark.parametrize("num_rows", [1, 2, 129])
def test_one_row_is_scored_as_many_are(monkeypatch, aesthetic, num_rows):
    """A model that squeezes gives a single row no axis at all."""
    monkeypatch.setattr("spark_nsfw.score.classifier._CPU_BLOCK_ROWS", 1)  # as on a GPU
    rows = np.random.default_rng(1).normal(size=(num_rows, 768)).astype(np.float32)
    found = aesthetic.classify(rows, "cpu")
    assert np.abs(found - expected(rows, aesthetic)["aesthetic_score"]).max() < 1e-5


def test_the_built_in_classifier_says_what_nemo_curators_says():
    classifier = NsfwClassifier()
    assert (classifier.model_name, classifier.pred_type, classifier.embedding_size) == (
        "nsfw", float, 768,
    )  # fmt: skip
    assert TimmImageEmbedder("test_vit2", use_index_files=True).use_index_files
