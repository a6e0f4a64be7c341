"""Spark Connect: no SparkContext, no RDD, no JVM, and the same rows."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest
from test_spark import core_rows  # noqa: F401  # a fixture

import spark_nsfw

pytestmark = pytest.mark.cluster

PACKAGE = Path(spark_nsfw.__file__).parent
WAYS = ["score_samples", "one step", "two steps", "saved", "the job"]
WAYS += ["data source"] if pyspark.__version__ >= "4" else []


@pytest.fixture(scope="module")
def report(shards, detector_path, weights_cache, tmp_path_factory):
    pytest.importorskip("grpc", reason="Spark Connect needs pyspark[connect]")
    directory = tmp_path_factory.mktemp("connect")
    script = str(Path(__file__).with_name("connect_session.py"))
    environment = os.environ | {
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_NSFW_CACHE": str(weights_cache),
    }
    for name in [name for name in environment if name.startswith("PYSPARK_GATEWAY")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, script, shards, detector_path, directory],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if "module not found: org.apache.spark#spark-connect" in done.stderr:
        pytest.skip("Spark 3.5's Connect server cannot be had from a Maven repository here")
    assert done.returncode == 0, done.stderr[-5000:]
    return pickle.loads((directory / "report.pickle").read_bytes())


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_are_the_cores(report, core_rows, way):  # noqa: F811
    assert report["session"] == "pyspark.sql.connect.session"
    assert report["rows"][way] == core_rows


def test_the_udf_scores_every_image(report, core_rows):  # noqa: F811
    assert report["udf"] > 35


def test_add_artifacts_brings_the_package_to_the_servers_workers(report):
    assert "package.zip" in report["package"]


@pytest.mark.parametrize(
    "module",
    [
        "dataset",
        "spark/reader",
        "spark/udf",
        "spark/datasource",
        "spark/units",
        "spark/plans",
        "spark/types",
        "spark/worker",
        "spark/stored",
    ],
)
def test_what_works_through_connect_touches_no_jvm(module):
    text = (PACKAGE / f"{module}.py").read_text()
    assert not re.search(r"\b_jvm|\b_jsparkSession|\b_jdf|sparkContext|\.rdd\b", text)
