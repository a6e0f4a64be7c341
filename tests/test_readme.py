"""The Python of README and docs/python.md runs as it stands, on small data and a small tower."""

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + PYTHON, re.DOTALL)


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


def test_there_are_three_ways_to_use_it():
    assert len(BLOCKS) == 3


def test_every_detector_is_documented():
    from spark_nsfw.score.registry import DETECTOR_NAMES

    page = (ROOT / "docs" / "detectors.md").read_text()
    for name in DETECTOR_NAMES:
        assert re.search(rf"^\| `{name}(=[A-Z]+)?` \|", page, re.MULTILINE), name


def test_every_status_is_documented():
    from spark_nsfw import Status

    for status in Status:
        assert f"`{status.value}`" in README
