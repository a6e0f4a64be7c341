"""One real Spark session, real photographs in real shards, the real detector."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from faulty_proxy import FaultyProxy
from torch import nn

from examples.photographs import (
    damaged_samples,
    encode,
    photographs,
    write_photograph_shards,
    write_shard,
)
from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from spark_nsfw import storage as storage_module

pytest_plugins = ["s3_fixtures"]

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_file(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} from the folder shared/ beside the repository")
    return path


@pytest.fixture(scope="session")
def detector_path() -> str:
    """LAION's own detector for ViT-L/14."""
    return str(shared_file("laion/clip_autokeras_binary_nsfw.zip"))


@pytest.fixture(scope="session")
def weights_cache(tmp_path_factory) -> Path:
    """A cache directory in which LAION's detectors lie, as if they had been downloaded."""
    directory = tmp_path_factory.mktemp("cache")
    for name in ("clip_autokeras_binary_nsfw.zip", "clip_autokeras_nsfw_b32.zip"):
        if (SHARED / "laion" / name).exists():
            shutil.copyfile(SHARED / "laion" / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def spark(weights_cache):
    import os

    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    # Python workers have the environment that Spark was started with.
    os.environ["SPARK_NSFW_CACHE"] = str(weights_cache)
    session = (
        SparkSession.builder.master("local[2]")
        .appName("tests")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.python.daemon.module", "spark_nsfw.spark.daemon")
        # Short queries, each seen once: better to run them than to optimise their bytecode.
        .config(
            "spark.driver.extraJavaOptions",
            "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
        )
        .config("spark.sql.session.timeZone", "UTC")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("moto")
    from object_store import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """An empty bucket of a real S3 server, behind a proxy that breaks down on request."""
    from object_store import Bucket

    with FaultyProxy(s3_server.url) as proxy:
        for variable, value in s3_server.environment(proxy.url).items():
            monkeypatch.setenv(variable, value)
        storage_module._filesystem.cache_clear()
        yield Bucket(s3_server, proxy)
    storage_module._filesystem.cache_clear()


@pytest.fixture(scope="session")
def jpegs() -> list[bytes]:
    """Twenty photographs as JPEG files."""
    return [encode(p, quality=90) for p, _ in zip(photographs(seed=7), range(20), strict=False)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Three whole shards, one of damaged and odd samples in a subfolder, one cut short."""
    directory = tmp_path_factory.mktemp("shards")
    write_photograph_shards(directory, num_shards=4, samples_per_shard=11)
    write_shard(directory / "odd" / "00000.tar", damaged_samples())
    cut = directory / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:400_000])
    return directory


@pytest.fixture
def embedder(detector_path) -> TimmImageEmbedder:
    """A small random tower, as wide as ViT-L/14's, with the real detector behind it."""
    return TimmImageEmbedder(
        "test_vit2",
        batch_size=8,
        embedding_size=768,
        classifiers=[NsfwClassifier(model_path=detector_path)],
    )


@pytest.fixture(scope="session")
def aesthetic_path(tmp_path_factory) -> str:
    """The published network of LAION-Aesthetics V2 with random weights, in a file."""
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    for parameter in layers.parameters():
        parameter.data *= 3  # so that scores differ as much as real ones
    path = tmp_path_factory.mktemp("aesthetic") / "aesthetic.pth"
    torch.save(nn.ModuleDict({"layers": layers}).state_dict(), path)
    return str(path)
