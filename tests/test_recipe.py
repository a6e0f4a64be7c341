"""A recipe answers from what it was given; only `ready` looks at files."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import timm
from conftest import shared_file
from safetensors.torch import save_file

from spark_nsfw import AestheticClassifier, ImageClassifier, NsfwClassifier, TimmImageEmbedder
from spark_nsfw.errors import (
    ChecksumError,
    EmbeddingWidthError,
    InputError,
    WeightsUnavailableError,
)
from spark_nsfw.score.describing import code_sha256
from spark_nsfw.score.download import file_sha256
from spark_nsfw.score.recipe import Recipe

DETECTOR_SHA256 = "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a"


class Mean(ImageClassifier):
    """A classifier of one's own, without a file."""

    def __init__(self, pred_column="mean", **arguments):
        super().__init__("mean", pred_column=pred_column, **arguments)

    def load_model(self, device):
        return lambda embeddings: embeddings.mean(dim=1)


@pytest.fixture
def tower_path(tmp_path):
    path = tmp_path / "tower.safetensors"
    save_file(timm.create_model("test_vit2", num_classes=768).state_dict(), path)
    return str(path)


def test_the_embedders_own_classifiers_are_taken_unless_others_are_given(embedder):
    assert Recipe.of(embedder).classifiers == embedder.classifiers
    assert Recipe.of(embedder, []).classifiers == ()
    other = Mean()
    assert Recipe.of(embedder, [other]).classifiers == (other,)


def test_it_knows_its_columns(embedder):
    recipe = Recipe.of(embedder, [NsfwClassifier(), Mean()])
    assert recipe.result_fields == [
        pa.field("image_embedding", pa.list_(pa.float32())),
        pa.field("embedding_norm", pa.float32()),
        pa.field("nsfw_score", pa.float32()),
        pa.field("mean", pa.float32()),
    ]
    assert recipe.result_columns == ["image_embedding", "embedding_norm", "nsfw_score", "mean"]
    assert recipe.score_columns == ["nsfw_score", "mean"]
    scores_only = dataclasses.replace(recipe, keep_embeddings=False)
    assert scores_only.result_columns == ["nsfw_score", "mean"]


def test_the_embeddings_column_is_the_embedders_or_the_classifiers():
    embedder = TimmImageEmbedder("test_vit2", image_embedding_column="clip")
    assert Recipe.of(embedder).embedding_column == "clip"
    assert Recipe(embedder, ()).result_columns == ["clip", "embedding_norm"]
    assert Recipe.of(None, [Mean(embedding_column="old")]).embedding_column == "old"
    with pytest.raises(InputError, match="several columns, new, old"):
        Recipe.of(None, [Mean(embedding_column="old"), Mean("x", embedding_column="new")])


@pytest.mark.parametrize(
    "pred_column", ["nsfw_score", "NSFW_Score", "image_embedding", "embedding_norm"]
)
def test_two_results_in_one_column_are_refused(embedder, pred_column):
    with pytest.raises(InputError, match=f"one column: .*{pred_column}"):
        Recipe.of(embedder, [NsfwClassifier(), Mean(pred_column)])


@pytest.mark.parametrize("classifiers", [None, []])
def test_nothing_to_compute_is_refused(classifiers):
    with pytest.raises(InputError, match="nothing to compute"):
        Recipe.of(None, classifiers)


def test_its_description_is_that_of_embedder_and_classifiers(embedder):
    recipe = Recipe.of(embedder, keep_embeddings=False)
    (classifier,) = embedder.classifiers
    assert recipe.describe() == {
        "embedder": embedder.describe(),
        "classifiers": [classifier.describe()],
        "rows": {"keep_embeddings": False},
    }
    assert "embedder" not in Recipe.of(None, [Mean()]).describe()


#: Every question but `ready`, in a process where opening a file or a socket is an error.
QUESTIONS = """
import sys
import torch
from spark_nsfw import AestheticClassifier, NsfwClassifier, TimmImageEmbedder
from spark_nsfw.score.describing import code_sha256
from spark_nsfw.score.recipe import Recipe

B32 = "vit_base_patch32_clip_quickgelu_224.openai"
TimmImageEmbedder(B32).embedding_size  # imports what timm imports late

def forbid(event, arguments):
    if event.startswith(("open", "socket.", "os.", "shutil.", "subprocess.")):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(forbid)
classifiers = [
    NsfwClassifier(model_path="/nowhere/nsfw.pth"),
    NsfwClassifier(pred_column="b"),
    AestheticClassifier(model_path="s3://bucket/a.pth", pred_column="c"),
    AestheticClassifier(),
]
embedders = [
    TimmImageEmbedder(B32, checkpoint_path="/nowhere/clip.pt"),
    TimmImageEmbedder(B32, checkpoint_path="https://127.0.0.1:9/clip.pt"),
    TimmImageEmbedder(B32, pretrained=True),
    TimmImageEmbedder(B32, pretrained=True, models_dir="/nowhere/models"),
    TimmImageEmbedder(B32),
    None,
]
for embedder in embedders:
    recipe = Recipe.of(embedder, classifiers, device="cuda")
    described = recipe.describe()
    assert described["classifiers"][0]["weights"] == {"source": "/nowhere/nsfw.pth", "sha256": None}
    assert described["classifiers"][1] == {
        "classifier": "NsfwClassifier", "pred_column": "b", "variant": "torch",
    }
    assert described["classifiers"][3]["weights"]["sha256"].startswith("21dd590f")
    if embedder is not None:
        weights = described["embedder"]["weights"]
        assert weights["sha256"] is None
        assert embedder.weights.is_random == weights["source"].startswith("random")
        assert "/nowhere/models" not in weights["source"]
    recipe.identity, recipe.result_fields, recipe.result_columns, recipe.score_columns
    assert not recipe.is_ready
assert not torch.cuda.is_initialized()
"""


def test_questions_touch_neither_disk_nor_network():
    run = subprocess.run(
        [sys.executable, "-c", QUESTIONS], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_getting_ready_leaves_the_recipe_as_it_was(tower_path, detector_path):
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, checkpoint_path=tower_path)
    recipe = Recipe.of(embedder, [NsfwClassifier(model_path=detector_path), Mean()])
    before = recipe.describe(), recipe.identity, recipe.is_ready
    ready = recipe.ready(device="cuda")
    assert (recipe.describe(), recipe.identity, recipe.is_ready) == before
    assert (recipe.device, embedder.precision) == (None, None)
    assert (ready.is_ready, ready.device) == (True, "cuda")
    assert ready.describe() == {
        "embedder": embedder.describe()
        | {
            "precision": "float16",
            "weights": {"source": tower_path, "sha256": file_sha256(tower_path)},
        },
        "classifiers": [
            {
                "classifier": "NsfwClassifier",
                "pred_column": "nsfw_score",
                "variant": "torch",
                "weights": {"source": detector_path, "sha256": DETECTOR_SHA256},
            },
            {
                "classifier": "Mean",
                "embedding_size": None,
                "pred_column": "mean",
                "code_sha256": code_sha256(Mean()),
            },
        ],
        "rows": {"keep_embeddings": True},
    }
    assert json.loads(json.dumps(ready.describe())) == ready.describe()


@pytest.mark.parametrize(
    ("own", "given", "device", "precision"),
    [
        (None, None, None, None),
        (None, "cpu", "cpu", "float32"),
        ("cuda:1", "cuda", "cuda:1", "float16"),
        ("cuda:1", None, "cuda:1", "float16"),
        ("cuda", "cpu", "cpu", "float32"),
    ],
)
def test_the_device_settles_the_precision(own, given, device, precision):
    ready = Recipe.of(TimmImageEmbedder("test_vit2"), device=own).ready(device=given)
    assert (ready.device, ready.embedder.precision) == (device, precision)


def test_random_weights_are_ready_without_a_sha256():
    recipe = Recipe.of(TimmImageEmbedder("test_vit2"))
    assert not recipe.is_ready
    ready = recipe.ready(device="cpu")
    assert ready.is_ready
    assert ready.ready().describe() == ready.describe()
    assert ready.embedder.weights.is_random


def test_classifiers_are_sized_by_the_embedder_or_by_what_is_stored(
    weights_cache, monkeypatch, tower_path
):
    shared_file("laion/clip_autokeras_nsfw_b32.zip")
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(weights_cache))
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768)
    ready = Recipe.of(embedder, [NsfwClassifier()]).ready()
    assert ready.classifiers[0].weights.sha256 == DETECTOR_SHA256
    stored = Recipe.of(None, [NsfwClassifier()])
    with pytest.raises(InputError, match="embedding_size"):
        stored.ready()
    sized = stored.ready(embedding_size=512)
    assert (sized.embedding_size, sized.classifiers[0].embedding_size) == (512, 512)
    assert sized.ready(device="cpu").describe() == sized.describe()  # knows its width by now
    assert sized.identity != stored.identity
    with pytest.raises(EmbeddingWidthError, match="width 100"):
        stored.ready(embedding_size=100)
    with pytest.raises(EmbeddingWidthError, match="768, not 512"):
        Recipe.of(embedder).ready(embedding_size=512)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.of(TimmImageEmbedder("test_vit2", checkpoint_path="/nowhere/x.pt")),
        Recipe.of(TimmImageEmbedder("test_vit2"), [Mean(model_path="/nowhere/x.pt")]),
    ],
    ids=["embedder", "classifier"],
)
def test_weights_that_are_not_there_are_refused_when_it_gets_ready(recipe):
    with pytest.raises(WeightsUnavailableError, match=r"/nowhere/x\.pt"):
        recipe.ready()


def test_two_copies_of_one_file_are_one_identity(tmp_path, tower_path, detector_path):
    def ready(tower, detector, **settings):
        embedder = TimmImageEmbedder(
            "test_vit2", embedding_size=768, checkpoint_path=str(tower), **settings
        )
        return Recipe.of(embedder, [NsfwClassifier(model_path=str(detector))]).ready(device="cpu")

    copies = [shutil.copyfile(path, tmp_path / f"copy{number}")
              for number, path in enumerate((tower_path, detector_path))]  # fmt: skip
    here = ready(tower_path, detector_path)
    assert ready(*copies).identity == here.identity
    assert ready(tower_path, detector_path, batch_size=3).identity != here.identity
    assert ready(tower_path, detector_path, decode="exact").identity != here.identity
    assert dataclasses.replace(here, keep_embeddings=False).identity != here.identity
    content = bytearray(copies[0].read_bytes())
    content[-1] ^= 1
    copies[0].write_bytes(content)
    assert ready(*copies).identity != here.identity


def test_a_worker_checks_its_files_against_those_of_the_driver(
    tower_path, tmp_path, aesthetic_path, jpegs
):
    path = shutil.copyfile(aesthetic_path, tmp_path / "aesthetic.pth")
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, checkpoint_path=tower_path)
    ready = Recipe.of(embedder, [AestheticClassifier(model_path=str(path))]).ready(device="cpu")
    ready.classifiers[0].classify([[0.0] * 768], "cpu")  # loaded here, not in what travels
    ready.embedder.embed(jpegs[:1], device="cpu")
    pickled = pickle.dumps(ready)
    assert len(pickled) < 5000
    for file in (path, Path(tower_path)):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    worker = pickle.loads(pickled)
    assert worker.is_ready
    with pytest.raises(ChecksumError, match=r"aesthetic\.pth"):
        worker.classifiers[0].classify([[0.0] * 768], "cpu")
    with pytest.raises(ChecksumError, match=r"tower\.safetensors"):
        worker.embedder.embed(jpegs[:1], device="cpu")


def test_it_cannot_be_changed(embedder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.of(embedder).device = "cpu"
