"""What docs/ and conf/ say of clusters: the arithmetic done again, the versions compared."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from rapids_session import PLUGIN, settings

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "gpu-clusters.md").read_text()
CONF = settings(ROOT / "conf" / "spark-defaults.conf")
CARDS = re.findall(r"^\| (\d+) GiB [^|]*\|(.*)\|$", DOCUMENT, re.MULTILINE)

CONTEXT, RESERVE, WORKER = 0.5, 0.625, 1.1
(PER_IMAGE,) = {float(number) for number in re.findall(r"([\d.]+) MiB of activations", DOCUMENT)}
MIN_ALLOC_FRACTION = float(CONF["spark.rapids.memory.gpu.minAllocFraction"])


@pytest.mark.parametrize(("card", "cells"), CARDS)
def test_a_card_is_shared_as_the_table_says(card, cells):
    usable, fraction, pool, left, *workers = (float(cell) for cell in cells.split("|"))
    exact_pool = fraction * (usable - CONTEXT - RESERVE)
    exact_left = usable - CONTEXT - RESERVE - exact_pool
    assert (pool, left) == (round(exact_pool, 1), round(exact_left, 1))
    for batch_size, number in zip((64, 256, 1024), workers, strict=True):
        assert number == exact_left // (WORKER + 2 * batch_size * PER_IMAGE / 1024)
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


PLAIN = """
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb)
"""
DIVIDED = """
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 3g.20gb     Device  1: (UUID: MIG-22)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb)
"""


@pytest.mark.parametrize(
    ("listed", "addresses"),
    [(PLAIN, ["0", "1"]), (DIVIDED, ["MIG-11", "MIG-22", "GPU-bb"]), ("", [])],
)
def test_the_script_tells_the_gpus_that_nvidia_smi_lists(tmp_path, listed, addresses):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END{listed or chr(10)}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    told = subprocess.run(
        ["sh", ROOT / "conf" / "get_gpus_resources.sh"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    assert json.loads(told.stdout) == {"name": "gpu", "addresses": addresses}
