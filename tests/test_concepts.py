"""Prompts → a file of concepts → columns, against open_clip's own zero-shot classifier."""

import json
import math

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from spark_nsfw.cli import main
from spark_nsfw.errors import (
    EmbeddingWidthError,
    InputError,
    WeightsError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.score.concepts import Concept, ConceptClassifier, concept_file
from spark_nsfw.score.download import file_sha256
from spark_nsfw.score.prompts import build_concepts, parse_prompts

#: A CLIP whose text tower runs in a moment.
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
    },
}  # fmt: skip

YAML = """
weapon:
  prompts: [a photo of a weapon, a drawing of a weapon, a weapon]
  against: everyday
blood: [a photo of blood, a drawing of blood, a blood]
everyday:
  - a photo of an everyday object
  - a drawing of an everyday object
  - "yes, an everyday object"
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """open_clip's model, and the file that holds its weights."""
    directory = tmp_path_factory.mktemp("clip")
    (directory / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(directory / "tiny.json")
    torch.manual_seed(11)
    model = open_clip.create_model("tiny").eval()
    torch.save(model.state_dict(), directory / "tiny.pt")
    return model, str(directory / "tiny.pt")


@pytest.fixture
def built(tmp_path, tiny):
    """The command's arguments, and the file that it writes."""
    (tmp_path / "prompts.yaml").write_text(YAML)
    output = tmp_path / "concepts.safetensors"
    arguments = ["concepts", "build", str(tmp_path / "prompts.yaml"), str(output)]
    assert main([*arguments, "--model", "tiny", "--checkpoint", tiny[1]]) == 0
    return output


@pytest.fixture(scope="module")
def embeddings():
    rows = torch.randn(300, 32, generator=torch.Generator().manual_seed(12))
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def test_the_vectors_are_open_clips_zero_shot_classifier(tiny, built):
    tokenizer = open_clip.get_tokenizer("tiny")
    expected = open_clip.build_zero_shot_classifier(
        tiny[0], tokenizer, ["weapon", "blood"],
        ["a photo of a {}", "a drawing of a {}", "a {}"],
    )  # fmt: skip
    texts = ["a photo of blood", "a drawing of blood", "a blood"]
    with torch.no_grad():
        blood = tiny[0].encode_text(tokenizer(texts), normalize=True).mean(dim=0)
    found = load_file(built)["concepts"]
    assert found.shape == (3, 32)
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-6)
    assert (found[0] - expected[:, 0]).abs().max() < 1e-5
    assert (found[1] - blood / blood.norm()).abs().max() < 1e-5


def test_the_columns_are_cosines_and_open_clips_softmax(built, embeddings):
    classifier = ConceptClassifier(model_path=str(built))
    found = classifier.classify(embeddings, "cpu")
    vectors = load_file(built)["concepts"].double().numpy()
    cosines = embeddings.astype(np.float64) @ vectors.T
    two = torch.tensor(100 * cosines[:, [0, 2]]).softmax(dim=1)[:, 0].numpy()
    assert np.abs(found[:, :3] - cosines).max() < 1e-6
    assert np.abs(found[:, 3] - two).max() < 1e-5
    columns = ["weapon_similarity", "blood_similarity", "everyday_similarity", "weapon_score"]
    assert [(f.name, f.type) for f in classifier.result_fields] == [
        (column, pa.float32()) for column in columns
    ]
    assert [len(column) for column in classifier.columns(found)] == [300] * 4
    prefixed = ConceptClassifier(model_path=str(built), prefix="my_").result_columns
    assert prefixed == [f"my_{column}" for column in columns]


def test_the_file_tells_what_its_concepts_are(built, tiny):
    described = ConceptClassifier(model_path=str(built)).for_embedding_size(32).describe()
    assert described["concepts"]["weapon"] == {
        "prompts": ["a photo of a weapon", "a drawing of a weapon", "a weapon"],
        "against": "everyday",
    }
    assert described["text_tower"] == {
        "model": "tiny",
        "weights": {"source": tiny[1], "sha256": file_sha256(tiny[1])},
    }
    assert described["weights"] == {"source": str(built), "sha256": file_sha256(built)}
    json.dumps(described)


def test_the_command_says_what_it_made(tmp_path, tiny, capsys):
    (tmp_path / "p.yaml").write_text(YAML)
    output = str(tmp_path / "c.safetensors")
    arguments = [str(tmp_path / "p.yaml"), output, "--model", "tiny", "--checkpoint", tiny[1]]
    assert main(["concepts", "build", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "weapon: 3 prompts against everyday", "blood: 3 prompts", "everyday: 3 prompts",
    ]  # fmt: skip
    assert printed.err == ""


def test_the_same_prompts_give_the_same_file(tmp_path, built, tiny):
    again = tmp_path / "again.safetensors"
    build_concepts(str(tmp_path / "prompts.yaml"), str(again), "tiny", checkpoint_path=tiny[1])
    assert again.read_bytes() == built.read_bytes()


def test_a_checkpoint_with_openais_own_entries_or_of_several_gpus(tmp_path, tiny, built):
    tensors = {f"module.{name}": tensor for name, tensor in tiny[0].state_dict().items()}
    tensors |= {"module.context_length": torch.tensor(77), "module.vocab_size": torch.tensor(9)}
    torch.save({"state_dict": tensors}, tmp_path / "ddp.pt")
    output = tmp_path / "again.safetensors"
    build_concepts(
        str(tmp_path / "prompts.yaml"),
        str(output),
        "tiny",
        checkpoint_path=str(tmp_path / "ddp.pt"),
    )
    assert torch.equal(load_file(output)["concepts"], load_file(built)["concepts"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [b", "is not YAML"),
        ("", "has no concepts"),
        ("- a\n- b", "has no concepts"),
        ("a: []", "'a' has no prompts"),
        ("a: text", "'a' is not understood"),
        ("a: {prompts: text}", "prompts are a list of texts, not 'text'"),
        ("a: [yes]", "in quotes"),
        ("a: ['']", "list of texts"),
        ("a: {prompts: [x], versus: b}", "'a' is not understood"),
        ("a: {prompts: [x], against: b}", "against 'b', which is not there; there are a"),
        ("a: {prompts: [x], against: [b]}", "names one concept"),
        ("a: {prompts: [x], against: a}", "against itself"),
        ("1: [x]", "1 is not a name"),
        ("a b: [x]", "'a b': a name is of letters"),
        ("a: [x]\na: [y]", "has 'a' twice"),
        ("a: [x]\nA: [y]", "would have one column"),
        ("? [a]\n: [x]", "is not YAML"),
    ],
)
def test_prompts_that_cannot_work_say_why(text, complaint):
    with pytest.raises(InputError, match=complaint) as raised:
        parse_prompts(text, "p.yaml")
    assert str(raised.value).startswith("p.yaml")


def test_yaml_gives_plain_concepts():
    assert parse_prompts(YAML, "p.yaml")[::2] == [
        Concept("weapon", ("a photo of a weapon", "a drawing of a weapon", "a weapon"), "everyday"),
        Concept(
            "everyday",
            (
                "a photo of an everyday object",
                "a drawing of an everyday object",
                "yes, an everyday object",
            ),
        ),
    ]


def test_yaml_makes_no_objects(tmp_path):
    text = f"a: !!python/object/apply:os.mkdir ['{tmp_path}/ran']"
    with pytest.raises(InputError, match="is not YAML"):
        parse_prompts(text, "p.yaml")
    assert not (tmp_path / "ran").exists()


def test_arguments_that_cannot_work_are_one_line(tmp_path, tiny, capsys):
    (tmp_path / "p.yaml").write_text(YAML)
    prompts, output = str(tmp_path / "p.yaml"), str(tmp_path / "c.safetensors")
    for arguments, status, complaint in [
        ([str(tmp_path / "none.yaml"), output], 2, "none.yaml"),
        ([prompts, output, "--model", "none"], 2, "no weights 'openai' for 'none'"),
        ([prompts, output, "--pretrained", "none"], 2, "openai"),
        ([prompts, output, "--model", "none", "--checkpoint", tiny[1]], 2, "no model 'none'"),
        ([prompts, output, "--model", "ViT-L-14"], 2, "ViT-L-14-quickgelu"),
        (
            [prompts, output, "--model", "coca_ViT-L-14", "--checkpoint", tiny[1]],
            2,
            "is not CLIP's",
        ),
        ([prompts, output, "--checkpoint", "/nowhere/clip.pt"], 1, "/nowhere/clip.pt"),
    ]:
        assert main(["concepts", "build", *arguments]) == status
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert not (tmp_path / "c.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text(YAML)
    save_file({"text_projection": torch.ones(64, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"other\.safetensors.*missing"):
        build_concepts(
            str(tmp_path / "p.yaml"), str(tmp_path / "c"), "tiny",
            checkpoint_path=str(tmp_path / "other.safetensors"),
        )  # fmt: skip


def test_embeddings_of_another_width_are_refused(built):
    with pytest.raises(EmbeddingWidthError, match="32, these have width 768"):
        ConceptClassifier(model_path=str(built)).for_embedding_size(768)


def test_a_file_that_is_none_of_concepts_is_refused(tmp_path):
    with pytest.raises(WeightsUnavailableError, match="spark-nsfw concepts build"):
        ConceptClassifier()
    with pytest.raises(WeightsUnavailableError, match=r"/nowhere/concepts\.safetensors"):
        ConceptClassifier(models_dir="/nowhere/")
    vectors = torch.eye(2)
    save_file({"concepts": vectors}, tmp_path / "bad")
    with pytest.raises(WeightsError, match=r"bad was not written by `spark-nsfw concepts build`"):
        ConceptClassifier(model_path=str(tmp_path / "bad"))
    concepts = [Concept("a", ("x",)), Concept("b", ("y",), "a")]
    for some, rows in ((concepts[:1], vectors), (concepts[1:], vectors[:1]), ([], vectors[:0])):
        (tmp_path / "bad").write_bytes(concept_file(some, rows, {}))
        with pytest.raises(WeightsError, match=r"bad"):
            ConceptClassifier(model_path=str(tmp_path / "bad"))
    (tmp_path / "bad").write_bytes(concept_file(concepts, vectors * math.nan, {}))
    with pytest.raises(WeightsError, match=r"bad does not hold \(2, 2\) finite numbers"):
        ConceptClassifier(model_path=str(tmp_path / "bad")).for_embedding_size(2)
    (tmp_path / "bad").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"bad is not a safetensors file"):
        ConceptClassifier(model_path=str(tmp_path / "bad"))


def test_a_file_that_was_built_anew_meanwhile_is_refused(tmp_path):
    path = tmp_path / "concepts.safetensors"
    concepts = [Concept("a", ("x",)), Concept("b", ("y",))]
    path.write_bytes(concept_file(concepts, torch.eye(2), {}))
    classifier = ConceptClassifier(model_path=str(path))
    path.write_bytes(concept_file(concepts[::-1], torch.eye(2), {}))
    with pytest.raises(WeightsError, match="other concepts or prompts than at first"):
        classifier.for_embedding_size(2)
