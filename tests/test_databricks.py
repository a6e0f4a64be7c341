"""The Databricks notebook's cells, run one after the other in local Spark."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from test_cli import staged  # noqa: F401  # a fixture

from spark_nsfw.note import package_version

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "score_nsfw_databricks.py"
CELLS = NOTEBOOK.read_text().split("\n# COMMAND ----------\n")
MAGIC = "# MAGIC "


class Widgets:
    """Databricks' widgets: a default each, and what the person at the notebook has typed."""

    def __init__(self, typed):
        self.typed, self.values = typed, {}

    def text(self, name, default, label):
        self.values[name] = self.typed.get(name, default)

    def get(self, name):
        value = self.values[name]
        return value() if callable(value) else value  # typed once the scores have been seen


def run(spark, **typed):
    """Run every cell of Python; returns what was displayed, a list of rows each."""
    displayed = []
    restarted = []
    library = SimpleNamespace(restartPython=lambda: restarted.append(True))
    names = {
        "spark": spark,
        "dbutils": SimpleNamespace(widgets=Widgets(typed), library=library),
        "display": lambda frame: displayed.append(frame.collect()),
    }
    for cell in CELLS:
        code = "\n".join(line for line in cell.splitlines() if not line.startswith("# MAGIC"))
        code = code.replace(
            "vit_large_patch14_clip_quickgelu_224.openai", "test_vit2"
        ).replace("    tower,\n", "    tower,\n    embedding_size=768,\n")  # fmt: skip
        exec(compile(code, str(NOTEBOOK), "exec"), names)
    assert restarted == [True]
    return displayed


def test_it_is_in_databricks_source_format():
    assert CELLS[0].startswith("# Databricks notebook source\n")
    magics = [cell.strip() for cell in CELLS if MAGIC in cell]
    for cell in magics:
        lines = [line for line in cell.splitlines() if line != "# Databricks notebook source"]
        assert all(line.startswith("# MAGIC") for line in lines)  # no cell mixes the two
        assert lines[0].startswith((f"{MAGIC}%md", f"{MAGIC}%pip install /Volumes/"))
    (install,) = re.findall(r"%pip install (\S+)", NOTEBOOK.read_text())
    assert install.endswith(f"/spark_nsfw-{package_version()}-py3-none-any.whl")


def test_shards_are_scored_looked_at_and_kept(spark, staged, shards, tmp_path, capsys):  # noqa: F811
    scores = tmp_path / "scores"

    def median():
        return str(pd.read_parquet(scores)["nsfw_score"].median())

    statuses, histogram, kept = run(
        spark, source=str(shards), scores=str(scores), models=str(tmp_path / "staged"),
        threshold=median,
    )  # fmt: skip
    assert (tmp_path / "staged" / "SHA256SUMS").exists()
    frame = pd.read_parquet(scores)
    scored = frame["nsfw_score"].dropna()
    assert {row["status"]: row["count"] for row in statuses} == frame[
        "status"
    ].value_counts().to_dict()
    assert sum(row["count"] for row in histogram) == len(scored) > 35
    assert kept[0]["below 0.5"] == pytest.approx((scored < 0.5).mean())
    safe = pd.read_parquet(str(scores) + "_safe")
    assert sorted(safe["nsfw_score"]) == sorted(scored[scored < scored.median()])
    assert 0 < len(safe) < len(scored)
    assert f"{len(safe)} of {len(frame)} rows are below {median()}" in capsys.readouterr().out


def test_a_table_of_images_is_scored_into_a_table(spark, staged, jpegs, tmp_path):  # noqa: F811
    spark.sql(f"CREATE SCHEMA notebook LOCATION '{tmp_path / 'schema'}'")
    try:
        rows = [(number, image) for number, image in enumerate([*jpegs[:4], b"no image"])]
        spark.createDataFrame(rows, "id long, image binary").write.saveAsTable("notebook.images")
        run(spark, source="notebook.images", scores="notebook.scores", models=str(staged))
        scores = spark.table("notebook.scores")
        assert scores.columns == [
            "id", "status", "error_message", "image_embedding", "embedding_norm", "nsfw_score",
        ]  # fmt: skip
        assert scores.where("nsfw_score between 0 and 1").count() == 4
        assert spark.table("notebook.scores_safe").columns == [
            "id", "status", "error_message", "nsfw_score",
        ]  # fmt: skip
    finally:
        spark.sql("DROP SCHEMA notebook CASCADE")
