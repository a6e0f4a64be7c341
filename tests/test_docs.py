"""What docs/ and conf/ say of clusters: the arithmetic done again, the versions compared."""

import re
from pathlib import Path

import pytest
import timm
import torch
from rapids_session import PLUGIN, settings

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "gpu-clusters.md").read_text()
CONF = settings(ROOT / "conf" / "spark-defaults.conf")
CARDS = re.findall(r"^\| (\d+) GiB [^|]*\|(.*)\|$", DOCUMENT, re.MULTILINE)

CONTEXT, RESERVE = 0.5, 0.625
MIN_ALLOC_FRACTION = float(CONF["spark.rapids.memory.gpu.minAllocFraction"])


@pytest.mark.parametrize(("card", "cells"), CARDS)
def test_a_card_is_shared_as_the_table_says(card, cells):
    usable, fraction, pool, left, *workers = (float(cell) for cell in cells.split("|"))
    exact_pool = fraction * (usable - CONTEXT - RESERVE)
    exact_left = usable - CONTEXT - RESERVE - exact_pool
    assert (pool, left) == (round(exact_pool, 1), round(exact_left, 1))
    tower = 1.1
    for batch_size, number in zip((64, 256, 1024), workers, strict=True):
        assert number == exact_left // (tower + batch_size * 8 / 1024 * 1.25)
    assert exact_pool > MIN_ALLOC_FRACTION * usable  # or the plugin would not start
    if card == "24":
        assert fraction == float(CONF["spark.rapids.memory.gpu.allocFraction"])


def test_all_cards_are_there():
    assert [card for card, _ in CARDS] == ["16", "24", "48", "80"]


def test_the_tower_is_as_large_as_is_said():
    with torch.device("meta"):
        tower = timm.create_model("vit_large_patch14_clip_quickgelu_224.openai", pretrained=False)
    assert f"{sum(p.numel() for p in tower.parameters()):,} parameters" in DOCUMENT


def test_conf_and_documents_name_the_plugin_that_was_asked():
    version = PLUGIN.rpartition(":")[2]
    assert CONF["spark.jars.packages"] == f"com.nvidia:rapids-4-spark_2.13:{version}"
    jar = f"com.nvidia_rapids-4-spark_2.13-{version}.jar"
    assert CONF["spark.executorEnv.PYTHONPATH"] == f"./{jar}"
    for document in ("gpu-clusters.md", "databricks.md"):
        named = re.findall(r"\b2\d\.\d\d\.\d\b", (ROOT / "docs" / document).read_text())
        assert set(named) == {version}


@pytest.mark.parametrize("name", ["constraints", "constraints-spark35", "constraints-spark40"])
def test_the_versions_that_are_tested_are_documented(name):
    (version,) = re.findall(r"^pyspark==(.*)$", (ROOT / f"{name}.txt").read_text(), re.MULTILINE)
    assert f"| {version}" in (ROOT / "docs" / "clusters.md").read_text()
