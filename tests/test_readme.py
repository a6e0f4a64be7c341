"""The Python of README and docs/python.md runs as it stands, on small data and a small tower."""

import importlib
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from pyspark import cloudpickle
from torch import nn

from spark_nsfw import (
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_batches,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + PYTHON, re.DOTALL)
(READ_IMAGE,) = [block for block in BLOCKS if "read_image" in block]
BLOCKS.remove(READ_IMAGE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, spark, tmp_path, capsys, jpegs, detector_path):
    from examples.photographs import write_photograph_shards

    write_photograph_shards(tmp_path / "dataset", num_shards=2, samples_per_shard=3)
    (tmp_path / "images").mkdir()
    for index, jpeg in enumerate(jpegs[:3]):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(jpeg)
    block = BLOCKS[number].replace("/path/to", str(tmp_path))
    tower = '"vit_large_patch14_clip_quickgelu_224.openai"'
    assert tower in block
    block = block.replace(tower, '"test_vit2", embedding_size=768').replace(
        "pretrained=True", "pretrained=False"
    )
    names: dict = {}
    exec(block, names)
    if "scored" in names:
        metadata = pd.read_parquet(tmp_path / "metadata")
        assert metadata["nsfw_score"].between(0, 1).all()
        assert len(metadata) == 6
    elif "samples" in names:
        assert names["metadata"].where("nsfw_score between 0 and 1").count() == 6
        assert capsys.readouterr().out.count("|000010002|") == 1 + 1
    else:
        assert names["scores"].shape == (3,)
        assert ((names["scores"] >= 0) & (names["scores"] <= 1)).all()


def test_images_are_read_as_documented(tmp_path, detector_path):
    from examples.photographs import write_photograph_shards

    write_photograph_shards(tmp_path / "dataset", num_shards=2, samples_per_shard=6)
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768)
    scorer = Scorer(embedder, [NsfwClassifier(model_path=detector_path)], device="cpu")
    shards = [(str(path), path.stem) for path in sorted((tmp_path / "dataset").glob("*.tar"))]
    rows = pa.Table.from_batches(scorer.score(iter_sample_batches(shards, SampleOptions())))
    (tmp_path / "metadata").mkdir()
    pq.write_table(rows, tmp_path / "metadata" / "rows.parquet")
    names: dict = {}
    exec(READ_IMAGE.replace("/path/to", str(tmp_path)), names)
    assert len(names["images"]) == 9
    again = embedder.embed(names["images"], device="cpu")
    assert np.array_equal(again, np.stack(names["worst"]["image_embedding"]))


INPUTS = (ROOT / "docs" / "inputs.md").read_text()


def test_the_input_of_ones_own_runs(spark, tmp_path, jpegs, monkeypatch, capsys):
    join, copies, source, run = re.findall(r"```python\n(.*?)```", INPUTS, re.DOTALL)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "zips.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "code")
    cloudpickle.register_pickle_by_value(importlib.import_module("zips"))
    (tmp_path / "zips").mkdir()
    with zipfile.ZipFile(tmp_path / "zips" / "a.zip", "w") as archive:
        for index, jpeg in enumerate([*jpegs[:3], b"no image"]):
            archive.writestr(f"{index}.jpg", jpeg)
    tower = '"vit_large_patch14_clip_quickgelu_224.openai"'
    assert tower in run
    run = run.replace(tower, '"test_vit2", embedding_size=768').replace("/path/to", str(tmp_path))
    for told in (
        "3 scored, 1 failed",
        "3 scored, 1 failed",
    ):  # the second time there is nothing to do
        exec(run.replace("pretrained=True", "pretrained=False"), {})
        assert told in capsys.readouterr().out
    found = pd.read_parquet(tmp_path / "metadata")
    assert found["nsfw_score"].notna().sum() == 3
    assert len(source.splitlines()) <= 45
    clean = [f"{index}.jpg" for index, score in enumerate(found["nsfw_score"]) if score < 0.2]
    table = pd.DataFrame({"uid": [f"{index}.jpg" for index in range(4)], "label": range(4)})
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "0.parquet")
    exec(join.replace("/path/to", str(tmp_path)), {})
    assert sorted(pd.read_parquet(tmp_path / "clean")["uid"]) == clean
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "a.jpg").write_bytes(jpegs[0])
    scores = {"shard": ["cats@12"] * 2, "key": ["a.jpg", "b.jpg"], "nsfw_score": [0.1, 0.2]}
    shutil.rmtree(tmp_path / "metadata")
    pd.DataFrame(scores).to_parquet(tmp_path / "metadata")
    shutil.rmtree(tmp_path / "clean")
    exec(copies.replace("/path/to", str(tmp_path)), {})
    copied = [path for path in (tmp_path / "clean").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in copied] == [jpegs[0]]


def test_there_are_three_ways_to_use_it():
    assert len(BLOCKS) == 3


def test_every_detector_is_documented():
    from spark_nsfw.score.registry import DETECTOR_NAMES

    page = (ROOT / "docs" / "detectors.md").read_text()
    for name in DETECTOR_NAMES:
        assert re.search(rf"^\| `{name}(=[A-Z]+)?` \|", page, re.MULTILINE), name


def detectors_block(language, start):
    page = (ROOT / "docs" / "detectors.md").read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def test_the_detectors_of_ones_own_run(tmp_path, jpegs):
    mine: dict = {}
    exec(detectors_block("python", "# mine.py"), mine)
    exec(detectors_block("python", "# heavier.py"), mine)
    watermark = nn.Sequential(nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
    blur = nn.Sequential(timm.create_model("resnet18", num_classes=1), nn.Sigmoid())
    for name, network in [("watermark.pt", watermark), ("blur.pt", blur)]:
        torch.save(network.state_dict(), tmp_path / name)
    head = mine["WatermarkClassifier"](str(tmp_path / "watermark.pt"))
    assert head.result_columns == ["watermark_score"]
    assert 0 < mine["RedClassifier"]().classify(jpegs[:1], "cpu")[0] < 1
    assert head.classify(np.ones((3, 768)), "cpu").shape == (3,)
    detector = mine["BlurClassifier"](str(tmp_path / "blur.pt"))
    assert detector.result_columns == ["blur_score"]
    assert detector.classify(jpegs[:2], "cpu").shape == (2,)


def test_the_prompts_are_understood():
    pytest.importorskip("yaml")
    from spark_nsfw.score.prompts import parse_prompts

    concepts = parse_prompts(detectors_block("yaml", "# prompts.yaml"), "prompts.yaml")
    assert {concept.name: concept.against for concept in concepts} == {
        "weapon": "everyday", "everyday": None, "watermark": None,
    }  # fmt: skip


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


def test_every_status_is_documented():
    from spark_nsfw import Status

    for status in Status:
        assert f"`{status.value}`" in README
