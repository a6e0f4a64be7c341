"""Datasets as other programs write them, by these programs: ``make test-layouts``."""

import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scoring import run_into

from spark_nsfw.read.inputs import open_source

OVERLAY = Path(__file__).parents[1] / ".layouts"

pytestmark = [
    pytest.mark.layouts,
    pytest.mark.skipif(not OVERLAY.exists(), reason="no .layouts: make test-layouts"),
]

HUGGING_FACE = """
import sys
from pathlib import Path
from datasets import Dataset, Features, Image, Value
from datasets.table import embed_table_storage

folder, output, embeds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "bytes"
paths = sorted(map(str, folder.glob("*.jpg")))
features = Features({"image": Image(), "label": Value("int64")})
whole = Dataset.from_dict({"image": paths, "label": list(range(len(paths)))}, features=features)
for part in range(2):
    shard = whole.shard(num_shards=2, index=part, contiguous=True)
    if embeds:  # as push_to_hub does
        shard = shard.with_format("arrow").map(embed_table_storage, batched=True)
    shard.to_parquet(output / f"train-{part:05}-of-00002.parquet")
"""

IMG2DATASET = """
import sys
from img2dataset import download

if __name__ == "__main__":
    download(
        url_list=sys.argv[1], input_format="csv", url_col="url", caption_col="caption",
        output_format=sys.argv[3], output_folder=sys.argv[2], processes_count=1, thread_count=4,
        image_size=256, number_sample_per_shard=5, enable_wandb=False,
    )
"""


def run_apart(tmp_path, code, *arguments):
    """A program with its own packages."""
    script = tmp_path / "program.py"
    script.write_text(code)
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "HF_HOME": str(tmp_path)}
    environment = os.environ | quiet | {"PYTHONPATH": str(OVERLAY)}
    command = [sys.executable, script, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture
def photographs(tmp_path, jpegs):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, jpeg in enumerate(jpegs[:9]):
        (folder / f"{index}.jpg").write_bytes(jpeg)
    return folder


def scores(spark, output, column):
    rows = spark.read.parquet(str(output)).where("status = 'ok'").select(column, "nsfw_score")
    return {row[0]: row[1] for row in rows.collect()}


@pytest.fixture
def expected(spark, photographs, tmp_path, embedder):
    """By the file's name."""
    run_into(spark, open_source(photographs), tmp_path / "expected", embedder)
    return scores(spark, tmp_path / "expected", "key")


@pytest.mark.parametrize("images", ["bytes", "paths"])
def test_hugging_faces_parquet_is_read_without_options(
    spark, photographs, tmp_path, embedder, expected, images
):
    place = tmp_path / "hf"
    place.mkdir()
    run_apart(tmp_path, HUGGING_FACE, photographs, place, images)
    summary = run_into(spark, open_source(place), tmp_path / "out", embedder)
    assert summary.num_by_status == {"ok": 9}
    found = scores(spark, tmp_path / "out", "label")
    assert {f"{label}.jpg": score for label, score in found.items()} == expected
    shards = {row.shard for row in spark.read.parquet(str(tmp_path / "out")).collect()}
    assert shards == {"train-00000-of-00002", "train-00001-of-00002"}


@pytest.mark.parametrize("layout", ["parquet", "webdataset", "files"])
def test_what_img2dataset_writes_is_read_without_options(
    spark, photographs, tmp_path, embedder, layout
):
    server = ThreadingHTTPServer(("127.0.0.1", 0), quiet_handler(photographs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    urls = [f"{base}/{index}.jpg" for index in range(9)] + [f"{base}/nothing.jpg"]
    lines = [f"{url},caption {index}" for index, url in enumerate(urls)]
    (tmp_path / "urls.csv").write_text("\n".join(["url,caption", *lines]) + "\n")
    try:
        run_apart(tmp_path, IMG2DATASET, tmp_path / "urls.csv", tmp_path / "in", layout)
    finally:
        server.shutdown()
        server.server_close()
    source = open_source(tmp_path / "in")
    assert source.describe()["inputs"]["kind"] == layout
    summary = run_into(spark, source, tmp_path / "out", embedder)
    assert summary.num_scored == 9
    rows = spark.read.parquet(str(tmp_path / "out"))
    if layout == "files":
        assert rows.count() == 9
        return
    # What could not be fetched is a row of the table, and not in the tar.
    missing = rows.where("status = 'image_missing'").collect()
    assert len(missing) == (1 if layout == "parquet" else 0)
    for row in rows.where("status = 'ok'").collect():
        assert row["source_status"] == "success"
        assert row["caption"] == f"caption {urls.index(row['url'])}"
        assert row["key"].startswith("0000")


def quiet_handler(folder):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    return Handler
