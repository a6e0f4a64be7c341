import json
import shutil
import subprocess
import sys
import uuid

import pandas as pd
import pytest
import timm
import torch
from conftest import shared_file
from safetensors.torch import save_file
from test_job import arguments
from test_ownership import listing, write_files

from spark_nsfw import AestheticClassifier, Q16Classifier
from spark_nsfw.cli import _parser, main
from spark_nsfw.note import package_version
from spark_nsfw.score.download import PublishedFile, file_sha256


def test_score_prints_the_summary(spark, shards, tmp_path, detector_path, aesthetic_path, capsys):
    status = main(["score", *arguments(shards / "00000.tar", tmp_path / "out", detector_path),
                   "--plan=fused", "--captions", "--columns=", "--no-embeddings",
                   "--aesthetic-checkpoint", aesthetic_path])  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    assert "11 samples in 1 shard: 11 scored, 0 failed" in out
    assert f"AestheticClassifier: {aesthetic_path} sha256 {file_sha256(aesthetic_path)}" in out
    metadata = spark.read.parquet(str(tmp_path / "out"))
    assert metadata.columns == [
        "key", "caption", "image_offset", "image_num_bytes",
        "status", "error_message", "nsfw_score", "aesthetic_score", "shard",
    ]  # fmt: skip
    assert metadata.where("aesthetic_score is not null and nsfw_score is not null").count() == 11


def test_bad_input_is_exit_status_2_and_one_line(spark, tmp_path, detector_path, capsys):
    assert main(["score", *arguments(tmp_path / "none", tmp_path / "out", detector_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no shard (*.tar)" in error


def test_weights_that_cannot_be_had_are_exit_status_1(spark, shards, tmp_path, capsys):
    bad = arguments(shards, tmp_path / "out", "/nowhere/detector.zip")
    assert main(["score", *bad]) == 1
    assert "/nowhere/detector.zip" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--plan=magic", "--precision=float8", "--nope"])
def test_unknown_arguments_are_exit_status_2(argument):
    with pytest.raises(SystemExit) as exit_:
        main(["score", "in", "out", argument])
    assert exit_.value.code == 2


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = capsys.readouterr().out
    for option in ["--clip-checkpoint", "--nsfw-checkpoint", "--no-pretrained", "--batch-size",
                   "--num-threads", "--precision", "--device", "--columns", "--no-embeddings",
                   "--shards-per-wave"]:  # fmt: skip
        assert option in text


VERBS = [
    "score", "classify", "report", "export", "models", "models fetch", "concepts",
    "concepts build", "inspect",
]  # fmt: skip


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_neither_torch_nor_spark(verb):
    script = f"""
import sys
from spark_nsfw.cli import _parser, main
try:
    main({[*verb.split(), "--help"]!r})
except SystemExit as exit_:
    assert exit_.code == 0
heavy = {{"torch", "timm", "pyspark", "pandas", "matplotlib", "PIL"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: spark-nsfw {verb}".strip())


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "spark_nsfw.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for verb in ["score", "classify", "report", "export", "models", "concepts", "inspect"]:
        assert f"\n    {verb}" in shown


@pytest.fixture
def staged(tmp_path, monkeypatch, weights_cache):
    """A directory that `models fetch` made from a hub whose cache has one small tower."""
    repository = timm.get_pretrained_cfg("test_vit2").hf_hub_id
    cached = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    torch.manual_seed(11)
    network = timm.create_model("test_vit2", num_classes=768)
    save_file(network.state_dict(), cached / "snapshots" / "0" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(weights_cache))
    assert main(["models", "fetch", str(tmp_path / "models"), "--model", "test_vit2"]) == 0
    return tmp_path / "models"


def test_models_fetch_stages_what_sha256sum_can_check(staged, capsys):
    assert sorted(path.name for path in staged.iterdir()) == [
        "SHA256SUMS", "clip_autokeras_binary_nsfw.zip", "clip_autokeras_nsfw_b32.zip",
        "test_vit2.safetensors",
    ]  # fmt: skip
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=staged, check=True)


def fetch(directory, *more):
    return main(["models", "fetch", str(directory), "--model", "test_vit2", *more])


def test_models_fetch_again_changes_nothing_and_takes_away_what_a_kill_left(staged):
    before = listing(staged)
    write_files(staged, f".test_vit2.safetensors.{uuid.uuid4()}.partial")
    assert fetch(staged) == 0
    assert listing(staged) == before


@pytest.mark.parametrize("left", ["test_vit2.safetensors", "clip_autokeras_nsfw_b32.zip"])
def test_models_fetch_goes_on_after_a_kill(staged, left):
    for path in staged.iterdir():
        if path.name != left:
            path.unlink()
    before = listing(staged)
    assert fetch(staged) == 0
    assert listing(staged).items() > before.items()
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=staged, check=True)


def test_models_fetch_leaves_files_beside_its_own_alone(staged):
    write_files(staged, "model.safetensors", "folder/SHA256SUMS")
    (staged / "test_vit2.safetensors").unlink()
    before = listing(staged)
    assert fetch(staged) == 0
    assert listing(staged).items() > before.items()


@pytest.mark.parametrize("name", ["test_vit2.safetensors", "clip_autokeras_binary_nsfw.zip"])
@pytest.mark.parametrize("with_sums", [True, False])
def test_models_fetch_replaces_no_file(staged, capsys, name, with_sums):
    (staged / name).write_bytes(b"fine-tuned by me")
    sums = staged / "SHA256SUMS"
    if with_sums:  # not even where the checksums are right
        lines = [line for line in sums.read_text().splitlines() if not line.endswith(name)]
        sums.write_text("\n".join([*lines, f"{file_sha256(staged / name)}  {name}", ""]))
    else:
        sums.unlink()
    before = listing(staged)
    assert fetch(staged) == 2
    assert listing(staged) == before
    assert str(staged) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["SHA256SUMS"], "SHA256SUMS"),
        (["SHA256SUMS", "test_vit2.safetensors"], "SHA256SUMS"),
        (["test_vit2.safetensors"], "test_vit2.safetensors"),
        ([".test_vit2.safetensors.partial"], ".test_vit2.safetensors.partial"),
        (["photos/1.jpg"], "photos"),
    ],
)
def test_models_fetch_refuses_a_directory_of_others(staged, tmp_path, capsys, names, named):
    write_files(tmp_path / "mine", *names)
    before = listing(tmp_path / "mine")
    assert fetch(tmp_path / "mine") == 2
    assert named in capsys.readouterr().err
    assert listing(tmp_path / "mine") == before


def test_models_fetch_refuses_a_file(staged, tmp_path, capsys):
    write_files(tmp_path, "file")
    assert fetch(tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "content of file"


def test_a_run_takes_all_weights_from_the_staged_directory(
    spark, shards, staged, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    options = ["--model", "test_vit2", "--embedding-size", "768", "--models", str(staged)]
    assert main(["score", str(shards / "00000.tar"), str(tmp_path / "out"), *options]) == 0
    text = capsys.readouterr().out
    assert file_sha256(staged / "test_vit2.safetensors") in text
    assert "mean nothing" not in text


def test_models_fetch_stages_the_aesthetic_classifier_too(
    staged, tmp_path, weights_cache, monkeypatch
):
    path = tmp_path / "cache" / "aesthetic.pth"
    shutil.copytree(weights_cache, path.parent)
    torch.save({"layers.0.weight": torch.ones(1)}, path)
    published = PublishedFile("https://nowhere.invalid/", path.name, file_sha256(path))
    monkeypatch.setattr("spark_nsfw.score.aesthetic.AESTHETIC_FILE", published)
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(path.parent))
    arguments = ["models", "fetch", str(staged), "--model", "test_vit2", "--aesthetic"]
    assert main(arguments) == 0
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=staged, check=True)
    assert "aesthetic.pth" in (staged / "SHA256SUMS").read_text()
    assert AestheticClassifier(models_dir=str(staged)).load_weights().keys() == {"layers.0.weight"}


def test_models_fetch_stages_q16s_prompts_too(staged, tmp_path, weights_cache, monkeypatch):
    shutil.copytree(weights_cache, tmp_path / "cache")
    shutil.copy(shared_file("heads/q16_vit_l_14_prompts.p"), tmp_path / "cache")
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "cache"))
    assert fetch(staged, "--q16") == 0
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "empty"))
    assert Q16Classifier(models_dir=str(staged)).load_weights()["prompts"].shape == (2, 768)


@pytest.mark.parametrize("name", ["test_vit2.safetensors", "clip_autokeras_binary_nsfw.zip"])
def test_a_tampered_file_in_the_staged_directory_is_refused(
    spark, shards, staged, tmp_path, capsys, name
):
    expected = file_sha256(staged / name)
    content = bytearray((staged / name).read_bytes())
    content[-100] ^= 1
    (staged / name).write_bytes(content)
    options = ["--model", "test_vit2", "--embedding-size", "768", "--models", str(staged)]
    assert main(["score", str(shards / "00000.tar"), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert name in error
    assert expected in error
    assert file_sha256(staged / name) in error


def test_a_tower_that_is_not_staged_is_named(spark, shards, staged, tmp_path, capsys):
    options = ["--model", "test_vit", "--models", str(staged)]
    assert main(["score", str(shards / "00000.tar"), str(tmp_path / "out"), *options]) == 1
    assert "has no test_vit, only" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made_in_two_ways(spark, shards, tmp_path_factory, detector_path):
    """Two outputs, ``a`` and ``b``, beside each other."""
    directory = tmp_path_factory.mktemp("made")
    for name, extra in [("a", []), ("b", ["--decode=exact"])]:
        given = arguments(shards / "00000.tar", directory / name, detector_path)
        assert main(["score", *given, *extra]) == 0
    return directory


def test_inspect_sums_up_what_made_an_output(made_in_two_ways, detector_path, capsys):
    output = str(made_in_two_ways / "a")
    assert main(["inspect", output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 13
    for line in [
        f"output       {output}",
        "rows         11 in 1 shard, 2 files",
        f"made by      spark_nsfw {package_version()}",
        "tower        test_vit2",
        "  weights    RANDOM (seed 0)",
        "  embedding  width 768, L2 norm 1, float32",
        "  pixels     OpenAI CLIP, 160 px, decode=fast",
        "detector     NsfwClassifier torch → nsfw_score",
        f"  weights    {detector_path}, sha256 905520bb0336…",
        "RANDOM WEIGHTS: THESE SCORES MEAN NOTHING (the tower test_vit2)",
    ]:
        assert line in lines


def test_inspect_as_json_has_the_complete_note(made_in_two_ways, detector_path, capsys):
    assert main(["inspect", str(made_in_two_ways / "a"), "--json"]) == 0
    (way,) = json.loads(capsys.readouterr().out)["made"]
    assert (way["num_rows"], way["num_shards"], way["num_files"]) == (11, 1, 2)
    assert way["random_weights"] == ["the tower test_vit2"]
    note = way["note"]
    assert note["embedder"]["model_name"] == "test_vit2"
    assert "decode=fast" in note["embedder"]["preprocessing"]
    assert note["classifiers"][0]["weights"]["sha256"] == file_sha256(detector_path)
    assert note["version"] == package_version()


def test_inspect_warns_of_a_mixture(made_in_two_ways, capsys):
    assert main(["inspect", str(made_in_two_ways)]) == 1
    text = capsys.readouterr().out
    assert "mixes rows that were made in 2 ways" in text
    assert text.count("rows         11 in 1 shard, 2 files") == 2
    assert "decode=fast" in text
    assert "decode=exact" in text
    assert main(["inspect", str(made_in_two_ways), "--json"]) == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["made"]) == 2
    assert "mixes rows" in printed.err


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_inspect_imports_neither_torch_nor_spark(made_in_two_ways, option):
    script = f"""
import sys
from spark_nsfw.cli import _parser, main
assert main(["inspect", {str(made_in_two_ways / "a")!r}, *{option!r}]) == 0
heavy = {{"torch", "timm", "pyspark", "pandas", "PIL"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inspect_of_files_that_others_wrote_says_so(tmp_path, capsys):
    pd.DataFrame({"x": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")
    assert main(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "rows         2 in 1 file\nmade by      no note: not written by spark_nsfw" in text
    assert "made by      unreadable: " in text
    assert str(tmp_path / "b.parquet") in text


def test_inspect_without_parquet_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no Parquet files" in capsys.readouterr().err


def refused(capsys, *words):
    """What the command says on stderr where it refuses its arguments."""
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["scroe", "in", "out"], "score"),
        (["score", "in", "out", "--bathc-size", "3"], "--batch-size"),
        (["score", "in", "out", "--clip-chekpoint=x.pt"], "--clip-checkpoint"),
        (["score", "in", "out", "--precision=flaot16"], "float16"),
        (["score", "in", "out", "--device=cudo:1"], "cuda"),
        (["export", "in", "out", "--shards=in", "--where=true", "--renumbr"], "--renumber"),
        (["models", "fetsh", "dir"], "fetch"),
    ],
)
def test_what_was_meant_is_suggested(words, meant, capsys):
    error = refused(capsys, *words)
    assert f"; did you mean {meant}?" in error
    assert error.count("did you mean") == 1


def test_nothing_is_suggested_for_what_is_like_nothing(capsys):
    error = refused(capsys, "report", "metadata", "-o", "x.html", "y.html", "--zzzz")
    assert "unrecognized arguments: y.html --zzzz\n" in error
    assert error.startswith("usage: spark-nsfw report ")
    assert "did you mean" not in refused(capsys, "qqq")


SCORE, EXPORT = ["score", "in", "out"], ["export", "m", "out", "--shards=in", "--where=true"]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (SCORE, "--batch-size", "0"),
        (SCORE, "--num-threads", "0"),
        (SCORE, "--embedding-size", "-3"),
        (SCORE, "--shards-per-wave", "two"),
        (SCORE, "--settle-seconds", "-1"),
        (SCORE, "--settle-seconds", "nan"),
        (SCORE, "--max-failed", "-1%"),
        (SCORE, "--max-failed", "-5"),
        (SCORE, "--device", "gpu"),
        (SCORE, "--device", "cuda:first"),
        (SCORE, "--image-extensions", ","),
        (["classify", "m", "out"], "--device", "gpu"),
        (EXPORT, "--samples-per-shard", "0"),
        (EXPORT, "--shard-digits", "0"),
        (["report", "m", "-o", "x.html"], "--recall", "0"),
        (["report", "m", "-o", "x.html"], "--recall", "1.5"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_flag(command, option, value, capsys):
    assert f"argument {option}: {value!r} " in refused(capsys, *command, f"{option}={value}")


def test_image_extensions_may_have_dots_and_capitals():
    parse = _parser().parse_args
    assert parse([*SCORE, "--image-extensions=.JPG, png"]).image_extensions == ("jpg", "png")
    assert parse(SCORE).image_extensions is None
