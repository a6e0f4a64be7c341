import inspect
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_file
from safetensors.torch import save_file
from torch import nn

from spark_nsfw import (
    AestheticClassifier,
    ImageClassifier,
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_batches,
)
from spark_nsfw.errors import (
    ChecksumError,
    EmbeddingWidthError,
    InputError,
    WeightsError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.score.download import file_sha256
from spark_nsfw.score.laion import DETECTORS, _code_of_text, read_detector
from spark_nsfw.score.nsfw import NsfwDetector
from spark_nsfw.score.tower import Tower

ZIPS = {"vit_l_14": "clip_autokeras_binary_nsfw.zip", "vit_b_32": "clip_autokeras_nsfw_b32.zip"}


def golden(name):
    return np.load(shared_file(f"laion/golden_{name}.npz"))


@pytest.mark.parametrize("precision", ["f16", "f32"])
@pytest.mark.parametrize("name", ZIPS)
def test_laion_variant_gives_tensorflows_scores(name, precision):
    classifier = NsfwClassifier(model_path=str(shared_file(f"laion/{ZIPS[name]}")), variant="laion")
    arrays = golden(name)
    scores = classifier.classify(arrays[f"embedding_{precision}"], device="cpu")
    assert scores.dtype == np.float32
    assert np.abs(scores - arrays[f"score_{precision}"]).max() <= 1e-6


def naive_port(tensors, embeddings):
    """The PyTorch ports' arithmetic, written out in float64."""
    x = embeddings.astype(np.float64)
    x = (x - tensors["norm.mean"]) / np.maximum(np.sqrt(tensors["norm.variance"]), 1e-7)
    for number in range(1, 5):
        x = x @ tensors[f"linear_{number}.weight"].T + tensors[f"linear_{number}.bias"]
        x = np.maximum(x, 0) if number < 4 else 1 / (1 + np.exp(-x))
    return x[:, 0]


def test_torch_variant_is_the_port(detector_path):
    embeddings = golden("vit_l_14")["embedding_f32"]
    expected = naive_port(read_detector(detector_path, DETECTORS[768]).tensors, embeddings)
    scores = NsfwClassifier(model_path=detector_path).classify(embeddings, device="cpu")
    assert np.abs(scores - expected).max() < 1e-5


def test_the_variants_differ_as_much_as_is_known(detector_path):
    arrays = golden("vit_l_14")
    port = NsfwClassifier(model_path=detector_path).classify(arrays["embedding_f16"], "cpu")
    flips = (port > 0.5) != (arrays["score_f16"] > 0.5)
    assert 0.01 < flips.mean() < 0.05


def port_state_dict(style, detector_path):
    tensors = {
        name: torch.tensor(array)
        for name, array in read_detector(detector_path, DETECTORS[768]).tensors.items()
    }
    if style == "nemo_curator":
        return tensors
    names = {"linear_1": "dense", "linear_2": "dense1", "linear_3": "dense2", "linear_4": "dense3"}
    norm = nn.BatchNorm1d(768, eps=0.0).state_dict()
    renamed = {f"norm.{name}": tensor for name, tensor in norm.items()}
    renamed["norm.running_mean"] = tensors.pop("norm.mean")
    renamed["norm.running_var"] = tensors.pop("norm.variance")
    for name, tensor in tensors.items():
        layer, _, kind = name.partition(".")
        if layer in names:
            renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


@pytest.mark.parametrize("style", ["nemo_curator", "dataset2metadata"])
@pytest.mark.parametrize("file_format", ["pth", "safetensors"])
def test_other_projects_files_give_the_same_scores(tmp_path, detector_path, style, file_format):
    path = tmp_path / f"detector.{file_format}"
    tensors = port_state_dict(style, detector_path)
    if file_format == "pth":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    embeddings = golden("vit_l_14")["embedding_f32"]
    expected = NsfwClassifier(model_path=detector_path).classify(embeddings, "cpu")
    scores = NsfwClassifier(model_path=str(path)).classify(embeddings, "cpu")
    assert np.array_equal(scores, expected)


def test_the_detector_follows_the_width_of_the_embeddings(tmp_path, monkeypatch):
    for name in ZIPS.values():
        (tmp_path / name).write_bytes(shared_file(f"laion/{name}").read_bytes())
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    classifier = NsfwClassifier(variant="laion")
    for name in ZIPS:
        arrays = golden(name)
        scores = classifier.classify(arrays["embedding_f32"], device="cpu")
        assert np.abs(scores - arrays["score_f32"]).max() <= 1e-6


@pytest.mark.parametrize("batch_size", [-1, 1, 7, 1000])
def test_batch_size_does_not_change_a_bit(detector_path, batch_size):
    embeddings = golden("vit_l_14")["embedding_f32"]
    expected = NsfwClassifier(model_path=detector_path).classify(embeddings, "cpu")
    classifier = NsfwClassifier(model_path=detector_path, batch_size=batch_size)
    assert np.array_equal(classifier.classify(embeddings, "cpu"), expected)


def test_no_embeddings_give_no_scores(detector_path):
    scores = NsfwClassifier(model_path=detector_path).classify(np.zeros((0, 768)), "cpu")
    assert scores.shape == (0,)


def test_the_pipeline_rounds_to_float16_for_laions_variant_only(detector_path):
    arrays = golden("vit_l_14")
    embeddings = torch.tensor(arrays["embedding_f32"])
    rounded = arrays["embedding_f32"].astype(np.float16)
    for variant, seen in (("laion", rounded), ("torch", arrays["embedding_f32"])):
        classifier = NsfwClassifier(model_path=detector_path, variant=variant)
        piped = classifier.score(embeddings).numpy()
        assert np.array_equal(piped, classifier.classify(seen, "cpu"))


def test_a_wrong_width_is_refused_with_both_widths(detector_path):
    with pytest.raises(EmbeddingWidthError, match=r"768.*512"):
        NsfwClassifier(model_path=detector_path).classify(np.zeros((2, 512)), "cpu")
    with pytest.raises(EmbeddingWidthError, match=r"768 or 512.*width 100"):
        NsfwClassifier().classify(np.zeros((2, 100)), "cpu")
    with pytest.raises(EmbeddingWidthError, match=r"\(768,\)"):
        NsfwClassifier(model_path=detector_path).classify(np.zeros(768), "cpu")


def test_laions_variant_needs_laions_file(tmp_path, detector_path):
    path = tmp_path / "port.pth"
    torch.save(port_state_dict("nemo_curator", detector_path), path)
    with pytest.raises(WeightsMismatchError, match="needs LAION's own zip"):
        NsfwClassifier(model_path=str(path), variant="laion").classify(np.zeros((1, 768)), "cpu")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"\x80\x02not a pickle"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.pth"):
        NsfwClassifier(model_path=str(path)).classify(np.zeros((1, 768)), "cpu")


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/spark_nsfw_was_here",)


def test_no_pickle_is_executed(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"linear_1.weight": Evil()}))
    with pytest.raises(WeightsError):
        NsfwClassifier(model_path=str(path)).classify(np.zeros((1, 768)), "cpu")
    import os

    assert not os.path.exists("/tmp/spark_nsfw_was_here")


def test_a_state_dict_of_something_else_is_refused_with_its_names(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(3, 4).state_dict(), path)
    with pytest.raises(WeightsMismatchError, match=r"bias.*weight"):
        NsfwClassifier(model_path=str(path)).classify(np.zeros((1, 768)), "cpu")


def test_a_trained_batch_norm_is_refused(tmp_path, detector_path):
    tensors = port_state_dict("dataset2metadata", detector_path)
    tensors["norm.weight"] = tensors["norm.weight"] * 2
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(WeightsMismatchError, match=r"norm\.weight"):
        NsfwClassifier(model_path=str(tmp_path / "x.pth")).classify(np.zeros((1, 768)), "cpu")


def test_a_tampered_file_in_the_cache_is_refused(tmp_path, monkeypatch, detector_path):
    content = bytearray(Path(detector_path).read_bytes())
    content[1000] ^= 1
    (tmp_path / ZIPS["vit_l_14"]).write_bytes(content)
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing can be fetched instead
    with pytest.raises(ChecksumError, match=r"sha256 [0-9a-f]{64} found, 905520bb"):
        NsfwClassifier().classify(np.zeros((1, 768)), "cpu")


def test_a_detector_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsUnavailableError, match="put it at"):
        NsfwClassifier().classify(np.zeros((1, 768)), "cpu")


def test_a_missing_file_is_refused():
    with pytest.raises(WeightsUnavailableError, match=r"/nowhere/x\.pth"):
        NsfwClassifier(model_path="/nowhere/x.pth").classify(np.zeros((1, 768)), "cpu")


@pytest.mark.parametrize("bad", [{"variant": "tf"}, {"batch_size": 0}, {"batch_size": -2}])
def test_arguments_that_cannot_work_are_refused(bad):
    with pytest.raises(InputError):
        NsfwClassifier(**bad)


def vocabulary_codes(values):
    """What ``%f`` prints of float32 values, as integers: twice the millionths, plus the sign bit.

    Exact: a float32 times 10^6 needs 38 bits of mantissa, so float64 holds the product,
    and rounding it half to even is what printf does. ``-0.000000`` and ``0.000000``
    stay apart, as they do in print.
    """
    millionths = np.rint(values.astype(np.float64) * 1e6)
    return millionths.astype(np.int64) * 2 + np.signbit(values)


def test_vocabulary_codes_are_what_printf_prints():
    generator = np.random.default_rng(0)
    scales = generator.choice([1e-7, 1e-4, 1e-2, 1.0, 30.0], 100_000)
    values = (generator.normal(size=100_000) * scales).astype(np.float32)
    values[:4] = [0.0, -0.0, -3e-7, 5e-7]
    values[50_000:] = values[50_000:].astype(np.float16)
    expected = [_code_of_text(b"%f" % value) for value in values]
    assert np.array_equal(vocabulary_codes(values), expected)


def test_network_and_reader_agree_on_codes():
    vocabulary = np.unique(vocabulary_codes(np.linspace(-1, 1, 999, dtype=np.float32)))
    network = NsfwDetector((2, 3, 1), {0: len(vocabulary)})
    network.load_state_dict(network.state_dict() | {"vocabulary_0": torch.tensor(vocabulary)})
    values = torch.tensor([-1.0, 1.0, -0.0, 0.0, 0.1234567, torch.nan, torch.inf])
    codes = vocabulary_codes(values[:5].numpy())
    expected = [
        float(np.flatnonzero(vocabulary == code)[0] + 1) if code in vocabulary else 0.0
        for code in codes
    ]
    assert network._look_up(0, values).tolist() == [*expected, 0.0, 0.0]


def test_aesthetic_scores_are_the_published_networks(aesthetic_path):
    tensors = {k: v.double().numpy() for k, v in torch.load(aesthetic_path).items()}
    embeddings = golden("vit_l_14")["embedding_f32"]
    x = embeddings.astype(np.float64)
    for position in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{position}.weight"].T + tensors[f"layers.{position}.bias"]
    scores = AestheticClassifier(model_path=aesthetic_path).classify(embeddings, device="cpu")
    assert scores.dtype == np.float32
    assert np.ptp(x) > 1
    assert np.abs(scores - x[:, 0]).max() < 1e-5


def test_another_network_is_no_aesthetic_classifier(tmp_path, aesthetic_path):
    tensors = torch.load(aesthetic_path)
    tensors["layers.6.weight"] = tensors["layers.6.weight"][:8]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(WeightsMismatchError, match=r"layers\.6\.weight has shape \(8, 64\)"):
        AestheticClassifier(model_path=str(tmp_path / "x.pth")).for_embedding_size(768)


def test_only_the_published_aesthetic_file_is_taken_for_it(tmp_path, monkeypatch, aesthetic_path):
    shutil.copyfile(aesthetic_path, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing can be fetched instead
    for classifier in (AestheticClassifier(), AestheticClassifier(models_dir=str(tmp_path))):
        with pytest.raises(ChecksumError, match="21dd590f"):
            classifier.classify(np.zeros((1, 768)), "cpu")


def test_a_file_that_changes_after_it_was_settled_is_refused(tmp_path, aesthetic_path):
    path = shutil.copyfile(aesthetic_path, str(tmp_path / "aesthetic.pth"))
    classifier = AestheticClassifier(model_path=path).for_embedding_size(768)
    torch.save(nn.Linear(3, 4).state_dict(), path)
    worker = pickle.loads(pickle.dumps(classifier))
    with pytest.raises(ChecksumError):
        worker.classify(np.zeros((1, 768)), "cpu")


def test_several_classifiers_cost_one_pass_of_the_tower(
    shards, detector_path, aesthetic_path, monkeypatch
):
    forward, num_images = Tower.with_norms, []

    def counting(tower, pixels):
        num_images.append(len(pixels))
        return forward(tower, pixels)

    monkeypatch.setattr(Tower, "with_norms", counting)
    classifiers = [
        NsfwClassifier(model_path=detector_path),
        AestheticClassifier(model_path=aesthetic_path),
    ]
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, classifiers=classifiers)
    batches = iter_sample_batches([(str(shards / "00000.tar"), "00000")], SampleOptions())
    (metadata,) = Scorer(embedder, device="cpu").score(batches)
    assert sum(num_images) == 11
    embeddings = np.array(metadata["image_embedding"].to_pylist())
    for classifier in classifiers:
        expected = classifier.classify(embeddings, "cpu")
        assert metadata[classifier.pred_column].to_pylist() == expected.tolist()


def documented_classifier():
    """The class in the docstring of `ImageClassifier`, as it stands there."""
    example = inspect.getdoc(ImageClassifier).partition("::\n")[2].partition("\nIts arguments")[0]
    names = {"ImageClassifier": ImageClassifier, "nn": nn}
    exec(inspect.cleandoc(example), names)
    assert example.strip().count("\n") < 10
    return names["WatermarkClassifier"]


def test_the_documented_classifier_of_ones_own_works(tmp_path, detector_path):
    model = nn.Sequential(nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
    save_file(model.state_dict(), tmp_path / "watermark.safetensors")
    classifier = documented_classifier()(str(tmp_path / "watermark.safetensors"))
    embeddings = golden("vit_l_14")["embedding_f32"]
    with torch.inference_mode():
        expected = model(torch.tensor(embeddings))[:, 0].numpy()
    assert np.abs(classifier.classify(embeddings, "cpu") - expected).max() < 1e-6
    described = classifier.for_embedding_size(768).describe()
    assert described["weights"]["sha256"] == file_sha256(tmp_path / "watermark.safetensors")
    assert (described["classifier"], described["pred_column"]) == (
        "WatermarkClassifier",
        "watermark_score",
    )


def test_a_classifier_without_a_file():
    class BrightnessClassifier(ImageClassifier):
        def __init__(self):
            super().__init__("brightness", embedding_size=4)

        def load_model(self, device):
            model = nn.Linear(4, 1, bias=False)
            nn.init.constant_(model.weight, 0.25)
            return model.to(device)

    scores = BrightnessClassifier().classify([[1, 2, 3, 4], [0, 0, 0, 8]], device="cpu")
    assert scores.tolist() == [2.5, 2.0]
    with pytest.raises(EmbeddingWidthError, match="width 4, these have width 5"):
        BrightnessClassifier().classify(np.zeros((1, 5)))
