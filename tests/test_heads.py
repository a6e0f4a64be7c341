"""Heads on CLIP ViT-L/14: Q16, the multi-headed classifier, Stable Diffusion's checker."""

import hashlib
import pickle
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import shared_file
from safetensors.torch import save_file
from scoring import score_into
from torch import nn

from spark_nsfw import TimmImageEmbedder
from spark_nsfw.errors import (
    ChecksumError,
    EmbeddingWidthError,
    InputError,
    WeightsError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.files import write_file
from spark_nsfw.score.concepts import Concept, ConceptClassifier, concept_file
from spark_nsfw.score.download import file_sha256
from spark_nsfw.score.multi_headed import HEADS, MultiHeadedClassifier
from spark_nsfw.score.pickled_array import is_pickle, read_pickled_array
from spark_nsfw.score.q16 import Q16_FILE, Q16Classifier
from spark_nsfw.score.safety_checker import SafetyCheckerClassifier


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(shared_file("heads/golden_heads.npz")))


@pytest.fixture(scope="module")
def embeddings():
    """Random unit vectors near one another, as CLIP's are, and the projections' norms."""
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(400, 768)) + 2 * generator.normal(size=768)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows, generator.uniform(7, 14, 400).astype(np.float32)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path(self.marker).write_text, ("it ran",)


# Q16


def test_q16_gives_the_golden_scores_and_decisions(golden):
    classifier = Q16Classifier(model_path=str(shared_file("heads/q16_vit_l_14_prompts.p")))
    found = classifier.classify(golden["embedding"], device="cpu")
    assert np.abs(found[:, 0] - golden["q16_score"]).max() < 1e-5
    assert np.array_equal(found[:, 1] == 1, golden["q16_unnormalised_inappropriate"])
    differ = (found[:, 0] > 0.5) != (found[:, 1] == 1)
    assert 0.005 < differ.mean() < 0.02


def test_q16s_file_is_the_published_one():
    path = shared_file("heads/q16_vit_l_14_prompts.p")
    assert file_sha256(path) == Q16_FILE.sha256
    described = Q16Classifier(model_path=str(path)).for_embedding_size(768).describe()
    assert described["weights"]["sha256"] == Q16_FILE.sha256
    assert Q16Classifier().describe()["weights"]["sha256"] == Q16_FILE.sha256


@pytest.fixture
def prompts():
    """Two prompts that lie about as near to the embeddings as Q16's."""
    generator = np.random.default_rng(6)
    return (generator.normal(size=(2, 768)) * [[0.8], [0.77]]).astype(np.float16)


def write_prompts(prompts, path, style):
    if style == "safetensors":
        save_file({"prompts": torch.tensor(prompts)}, path)
    elif style == "pth":
        torch.save({"prompts": torch.tensor(prompts)}, path)
    else:
        content = pickle.dumps(prompts, protocol=int(style))
        if style == "3":  # as numpy 1 wrote it
            content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("style", ["3", "4", "safetensors", "pth"])
def test_q16_reads_its_formats(tmp_path, prompts, embeddings, style):
    classifier = Q16Classifier(model_path=write_prompts(prompts, tmp_path / "p", style))
    found = classifier.classify(embeddings[0], "cpu")
    logits = 100 * embeddings[0].astype(np.float64) @ unit(prompts).T
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert np.ptp(expected) > 0.5
    assert np.abs(found[:, 0] - expected).max() < 1e-5
    chosen = (embeddings[0].astype(np.float64) @ prompts.astype(np.float64).T).argmax(axis=1)
    assert np.array_equal(found[:, 1], chosen)


def test_q16s_columns(tmp_path, prompts, embeddings):
    path = write_prompts(prompts, tmp_path / "p", "4")
    classifier = Q16Classifier(model_path=path, decision_column="q16_says_no")
    found = classifier.classify(embeddings[0], "cpu")
    score, decision = classifier.columns(found)
    assert [(f.name, f.type) for f in classifier.result_fields] == [
        ("q16_score", pa.float32()),
        ("q16_says_no", pa.bool_()),
    ]
    assert (score.type, decision.type) == (pa.float32(), pa.bool_())
    assert decision.to_pylist() == (found[:, 1] == 1).tolist()


def test_embeddings_of_any_length_get_the_score_of_their_direction(tmp_path, prompts, embeddings):
    classifier = Q16Classifier(model_path=write_prompts(prompts, tmp_path / "p", "4"))
    found = classifier.classify(embeddings[0] * embeddings[1][:, None], "cpu")
    assert np.abs(found - classifier.classify(embeddings[0], "cpu")).max() < 1e-5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_a_pickled_array_is_read_as_pickle_reads_it(tmp_path, dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)
    (tmp_path / "a.p").write_bytes(pickle.dumps(array, protocol=4))
    found = read_pickled_array(tmp_path / "a.p")
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype


def test_no_pickle_is_executed(tmp_path, prompts):
    array = np.array([None], object)
    array[0] = Evil(str(tmp_path / "ran"))
    whole = pickle.dumps(prompts, protocol=4)
    evils = [Evil(str(tmp_path / "ran")), [prompts, Evil(str(tmp_path / "ran"))], array]
    contents = [pickle.dumps(evil, protocol=4) for evil in evils]
    contents += [whole[:-200], whole[:60], b"\x80\x04N.", b"\x80", pickle.dumps(np.arange(4))]
    for content in contents:
        (tmp_path / "bad.p").write_bytes(content)
        with pytest.raises(WeightsError, match=r"bad\.p"):
            Q16Classifier(model_path=str(tmp_path / "bad.p")).for_embedding_size(768)
    assert not (tmp_path / "ran").exists()


def test_prompts_of_another_shape_are_refused(tmp_path, prompts):
    with pytest.raises(WeightsMismatchError, match=r"p holds \(2, 512\)"):
        path = write_prompts(prompts[:, :512], tmp_path / "p", "4")
        Q16Classifier(model_path=path).for_embedding_size(768)
    save_file({"a": torch.ones(2, 768), "b": torch.ones(1)}, tmp_path / "two")
    with pytest.raises(WeightsMismatchError, match="2 tensors"):
        Q16Classifier(model_path=str(tmp_path / "two")).for_embedding_size(768)
    with pytest.raises(EmbeddingWidthError, match="768"):
        Q16Classifier(model_path=path).for_embedding_size(512)


# The multi-headed classifier


def test_the_heads_give_the_golden_scores(golden):
    shared_file("heads/mhsc_sexual.pt")
    classifier = MultiHeadedClassifier(model_path=str(shared_file("heads")))
    projections = golden["embedding"] * golden["embedding_norm"][:, None]
    found = classifier.classify(projections, device="cpu")
    expected = np.stack([golden[f"mhsc_{head}"] for head in HEADS], axis=1)
    assert np.abs(found - expected).max() < 1e-5
    piped = classifier.score(
        torch.tensor(golden["embedding"]), torch.tensor(golden["embedding_norm"])
    )
    assert np.abs(piped.numpy() - expected).max() < 1e-5


def random_heads():
    """Its networks with random weights, as its authors define them."""
    torch.manual_seed(8)
    networks = {}
    for head in HEADS:
        networks[head] = nn.Sequential(
            nn.Linear(768, 384), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(384), nn.Linear(384, 1)
        )
        networks[head].train()(torch.randn(64, 768))  # moves the running mean and variance
        networks[head].eval()
    return networks


@pytest.fixture
def heads():
    return random_heads()


def write_heads(heads, directory, pattern="{}.pt"):
    directory.mkdir(exist_ok=True)
    for head, network in heads.items():
        torch.save(network.state_dict(), directory / pattern.format(head))
    return directory


@pytest.mark.parametrize("style", ["{}.pt", "mhsc_{}.pt", "safetensors"])
def test_the_heads_are_the_authors_networks(tmp_path, heads, embeddings, style):
    path = tmp_path / "heads"
    if style == "safetensors":
        tensors = {f"{h}.{k}": v for h, n in heads.items() for k, v in n.state_dict().items()}
        save_file(tensors, path)
    else:
        write_heads(heads, path, style)
    projections = embeddings[0] * embeddings[1][:, None]
    with torch.inference_mode():
        rows = torch.tensor(projections, dtype=torch.float64)
        expected = torch.cat([torch.sigmoid(n.double()(rows)) for n in heads.values()], dim=1)
    classifier = MultiHeadedClassifier(model_path=str(path))
    found = classifier.classify(projections, "cpu")
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert [column.type for column in classifier.columns(found)] == [pa.float32()] * 5
    assert classifier.result_columns == [f"mhsc_{head}_score" for head in HEADS]


def test_the_sha256_of_five_files_is_what_a_shell_computes(tmp_path, heads):
    directory = write_heads(heads, tmp_path / "heads")
    names = " ".join(f"{head}.pt" for head in HEADS)
    command = f"cd '{directory}' && sha256sum {names} | sha256sum"
    printed = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    settled = MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    weights = settled.describe()["weights"]
    assert weights == {"source": str(directory), "sha256": printed.stdout.split()[0]}


def test_a_head_that_changes_after_it_was_settled_is_refused(tmp_path, heads, embeddings):
    directory = write_heads(heads, tmp_path / "heads")
    classifier = MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    worker = pickle.loads(pickle.dumps(classifier))
    torch.save(heads["sexual"].state_dict(), directory / "hateful.pt")
    with pytest.raises(ChecksumError, match="five files"):
        worker.classify(embeddings[0] * 10, "cpu")


def test_heads_in_a_store(s3, tmp_path, heads, embeddings, monkeypatch):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "cache"))
    directory = write_heads(heads, tmp_path / "heads")
    for path in directory.iterdir():
        write_file(f"{s3.url}/heads/{path.name}", path.read_bytes())
    here = MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    there = MultiHeadedClassifier(model_path=f"{s3.url}/heads/").for_embedding_size(768)
    assert there.weights.sha256 == here.weights.sha256
    rows = embeddings[0] * 10
    assert np.array_equal(there.classify(rows, "cpu"), here.classify(rows, "cpu"))


def test_heads_that_cannot_be_had_say_which(tmp_path, heads):
    with pytest.raises(WeightsUnavailableError, match="needs model_path"):
        MultiHeadedClassifier().for_embedding_size(768)
    directory = write_heads(heads, tmp_path / "heads")
    (directory / "hateful.pt").unlink()
    with pytest.raises(WeightsUnavailableError, match=r"neither hateful\.pt nor mhsc_hateful"):
        MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    (directory / "hateful.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    with pytest.raises(WeightsError, match=r"hateful\.pt"):
        MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    assert not (tmp_path / "ran").exists()
    torch.save(nn.Linear(3, 4).state_dict(), directory / "hateful.pt")
    with pytest.raises(WeightsMismatchError, match=r"missing hateful\.0\.weight"):
        MultiHeadedClassifier(model_path=str(directory)).for_embedding_size(768)
    with pytest.raises(WeightsUnavailableError, match="http"):
        MultiHeadedClassifier(model_path="https://example.org/heads").for_embedding_size(768)
    with pytest.raises(InputError, match="pred_columns"):
        MultiHeadedClassifier(pred_columns=["a", "b"])


def test_unit_embeddings_are_not_taken_for_projections(tmp_path, heads, embeddings):
    classifier = MultiHeadedClassifier(model_path=str(write_heads(heads, tmp_path / "heads")))
    with pytest.raises(InputError, match="unit length"):
        classifier.classify(embeddings[0], "cpu")
    with pytest.raises(InputError, match="embedding_norm"):
        classifier.score(torch.tensor(embeddings[0]))
    assert classifier.classify(np.zeros((0, 768)), "cpu").shape == (0, 5)


# Stable Diffusion's safety checker


@pytest.fixture(scope="module")
def checker(embeddings):
    """Its tensors, at random but so that some rows are near to some concepts."""
    generator = np.random.default_rng(9)
    rows, _ = embeddings
    concepts = rows[:17] * 12 + generator.normal(size=(17, 768)) * 0.3
    special = rows[17:20] * 12 + generator.normal(size=(3, 768)) * 0.3
    near = [
        np.quantile(rows @ unit(c).T, q, axis=0) for c, q in ((concepts, 0.985), (special, 0.9))
    ]
    return {
        "concept_embeds": torch.tensor(concepts, dtype=torch.float32),
        "concept_embeds_weights": torch.tensor(near[0], dtype=torch.float32),
        "special_care_embeds": torch.tensor(special, dtype=torch.float32),
        "special_care_embeds_weights": torch.tensor(near[1], dtype=torch.float32),
    }


def write_checker(tensors, path, half=False):
    """A file like theirs, with a tower that is in the way."""
    others = {
        "logit_scale": torch.ones(()),
        "vision_model.vision_model.embeddings.position_ids": torch.arange(257)[None],
        "vision_model.vision_model.embeddings.class_embedding": torch.ones(1024),
        "vision_model.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4096, 1024),
        "visual_projection.weight": torch.ones(768, 1024),
    }
    tensors = {name: t.half() if half else t for name, t in tensors.items()}
    save_file(tensors | others, path, {"format": "pt"})
    return str(path)


def diffusers_rule(tensors, embeddings, rounded=True):
    """StableDiffusionSafetyChecker.forward, image by image."""
    concepts, special = (unit(tensors[f"{n}_embeds"].numpy()) for n in ("concept", "special_care"))
    found = []
    for row in unit(embeddings):
        adjustment = 0.0
        for direction, threshold in zip(
            special, tensors["special_care_embeds_weights"], strict=True
        ):
            score = row @ direction - float(threshold) + adjustment
            if (round(score, 3) if rounded else score) > 0:
                adjustment = 0.01
        scores = []
        for direction, threshold in zip(concepts, tensors["concept_embeds_weights"], strict=True):
            scores.append(row @ direction - float(threshold) + adjustment)
        best = int(np.argmax(scores))
        found.append((round(scores[best], 3) if rounded else scores[best], best, adjustment))
    return np.array(found)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_the_checker_is_diffusers_rule(tmp_path, checker, embeddings, rounded, half):
    path = write_checker(checker, tmp_path / "model.safetensors", half)
    stored = {name: t.half().float() if half else t for name, t in checker.items()}
    expected = diffusers_rule(stored, embeddings[0], rounded)
    assert 0.02 < (expected[:, 0] > 0).mean() < 0.98
    assert len(set(expected[:, 2])) == 2
    classifier = SafetyCheckerClassifier(model_path=path, rounded=rounded)
    found = classifier.classify(embeddings[0], "cpu")
    assert np.abs(found[:, 0] - expected[:, 0]).max() < 1e-5
    assert np.array_equal(found[:, 1], expected[:, 1])
    score, concept = classifier.columns(found)
    assert (score.type, concept.type) == (pa.float32(), pa.int32())
    assert classifier.result_columns == ["safety_checker_score", "safety_checker_concept"]


def test_the_checkers_sha256_is_that_of_its_concepts(tmp_path, checker, embeddings):
    path = write_checker(checker, tmp_path / "model.safetensors")
    classifier = SafetyCheckerClassifier(model_path=path).for_embedding_size(768)
    expected = hashlib.sha256(b"".join(t.numpy().tobytes() for t in checker.values())).hexdigest()
    assert classifier.describe()["weights"] == {"source": path, "sha256": expected}
    worker = pickle.loads(pickle.dumps(classifier))
    Path(path).unlink()  # workers need no file of theirs
    assert worker.classify(embeddings[0], "cpu").shape == (400, 2)


class Ranges(BaseHTTPRequestHandler):
    """Serves one file, by ranges if it is told to."""

    def do_GET(self):
        content, wanted = self.server.content, self.headers.get("Range")
        status = 200
        if wanted and self.server.knows_ranges:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
        if self.path != "/model.safetensors":
            content, status = b"", 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.server.num_sent += len(content)
        with suppress(ConnectionError):  # who did not want it all hangs up
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, checker):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.content = Path(write_checker(checker, tmp_path / "served")).read_bytes()
    server.knows_ranges, server.num_sent = True, 0
    server.url = f"http://127.0.0.1:{server.server_port}/model.safetensors"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_the_concepts_are_fetched_over_http(web, tmp_path, embeddings):
    found = SafetyCheckerClassifier(model_path=web.url).classify(embeddings[0], "cpu")
    assert 20 * 769 * 4 < web.num_sent < 20 * 769 * 4 + 2000 < len(web.content) / 100
    here = SafetyCheckerClassifier(model_path=str(tmp_path / "served"))
    assert np.array_equal(found, here.classify(embeddings[0], "cpu"))


def test_only_the_concepts_are_fetched_from_a_store(web, s3, embeddings):
    url = f"{s3.url}/model.safetensors"
    write_file(url, web.content)
    s3.proxy.requests.clear()
    found = SafetyCheckerClassifier(model_path=url).classify(embeddings[0], "cpu")
    there = SafetyCheckerClassifier(model_path=web.url).classify(embeddings[0], "cpu")
    assert np.array_equal(found, there)
    ranges = [r.removeprefix("bytes=") for r in s3.proxy.ranges(r"model\.safetensors")]
    asked = [tuple(map(int, r.split("-"))) for r in ranges]
    assert sum(last + 1 - first for first, last in asked) < len(web.content) / 10


def test_a_checker_that_cannot_be_had_says_why(web):
    with pytest.raises(WeightsUnavailableError, match=r"none\.safetensors.*404"):
        url = web.url.replace("model", "none")
        SafetyCheckerClassifier(model_path=url).for_embedding_size(768)
    web.knows_ranges = False
    with pytest.raises(WeightsUnavailableError, match="no ranges"):
        SafetyCheckerClassifier(model_path=web.url).for_embedding_size(768)
    with pytest.raises(WeightsUnavailableError, match=r"/nowhere/m\.safetensors"):
        SafetyCheckerClassifier(model_path="/nowhere/m.safetensors").for_embedding_size(768)


def test_a_file_that_is_no_checker_is_refused(tmp_path, checker):
    path = Path(write_checker(checker, tmp_path / "model.safetensors"))
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    bad = {
        "empty": b"",
        "pickle": pickle.dumps(Evil(str(tmp_path / "ran"))) + b"x" * 100,
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "cut in the header": content[:100],
        "cut in the tensors": content[: header_bytes + 500],
        "list": (2).to_bytes(8, "little") + b"[]",
        "number": (8).to_bytes(8, "little") + b'{"a": 1}',
    }
    for name, damaged in bad.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(WeightsError, match=name):
            SafetyCheckerClassifier(model_path=str(tmp_path / name)).for_embedding_size(768)
    assert not (tmp_path / "ran").exists()
    for name in checker:
        others = {key: tensor for key, tensor in checker.items() if key != name}
        with pytest.raises(WeightsError, match=f"has no {name}"):
            SafetyCheckerClassifier(
                model_path=write_checker(others, tmp_path / "without")
            ).for_embedding_size(768)
    narrow = checker | {"concept_embeds": checker["concept_embeds"][:, :512].contiguous()}
    with pytest.raises(WeightsMismatchError, match=r"\(17, 512\)"):
        SafetyCheckerClassifier(
            model_path=write_checker(narrow, tmp_path / "narrow")
        ).for_embedding_size(768)


# All of them


def test_spark_runs_all_heads_in_one_pass(spark, shards, tmp_path, prompts, heads, checker):
    vectors = nn.functional.normalize(torch.randn(2, 768), dim=1)
    concepts = [Concept("weapon", ("a weapon",), "everyday"), Concept("everyday", ("a thing",))]
    (tmp_path / "concepts").write_bytes(concept_file(concepts, vectors, {"model": "none"}))
    classifiers = [
        Q16Classifier(model_path=write_prompts(prompts, tmp_path / "prompts.p", "4")),
        MultiHeadedClassifier(model_path=str(write_heads(heads, tmp_path / "heads"))),
        SafetyCheckerClassifier(model_path=write_checker(checker, tmp_path / "checker")),
        ConceptClassifier(model_path=str(tmp_path / "concepts")),
    ]
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, classifiers=classifiers)
    summary = score_into(spark, shards / "00000.tar", tmp_path / "out", embedder)
    assert set(summary.scores) >= {"q16_score", "mhsc_hateful_score", "weapon_similarity"}
    rows = spark.read.parquet(str(tmp_path / "out")).where("status = 'ok'")
    types = {field.name: field.dataType.simpleString() for field in rows.schema}
    assert types["is_q16_inappropriate"] == "boolean"
    assert types["safety_checker_concept"] == "int"
    frame = rows.toPandas()
    assert len(frame) == 11
    embeddings = np.stack(frame["image_embedding"]).astype(np.float32)
    for classifier in classifiers:
        inputs = embeddings
        if classifier.takes_projection:
            inputs = embeddings * frame["embedding_norm"].to_numpy()[:, None]
        expected = classifier.classify(inputs, "cpu")
        found = frame[classifier.result_columns].astype(np.float32).to_numpy()
        assert np.abs(found - expected).max() < 1e-5, type(classifier)


def test_a_safetensors_file_is_told_from_a_pickle_by_more_than_one_byte(tmp_path, prompts):
    """Its first byte is the lowest of its header's length: a name of some length makes it 0x80."""
    for length in range(1, 200):
        path = tmp_path / "prompts.safetensors"
        save_file({"p" * length: torch.tensor(prompts)}, path)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert not is_pickle(path)
    assert Q16Classifier(model_path=str(path)).load_weights()["prompts"].shape == (2, 768)
