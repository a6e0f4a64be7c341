"""Stored embeddings to scores on one core: ``python -m benchmarks.classify``.

The process is bound to one core, and its own time on it counts, not that of others. Random
embeddings of width 768; the ways take turns, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.table import report
from spark_nsfw import AestheticClassifier, ImageClassifier, NsfwClassifier
from spark_nsfw.read.embeddings import EmbeddingSource
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.score.nsfw import NsfwDetector
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.stored import StoredScorer, score_column


def write_files(folder: Path, rows_per_file: int, num_files: int) -> pa.Array:
    """Sidecars of NeMo Curator and the same as clip-retrieval writes it; returns one column."""
    generator = np.random.default_rng(0)
    for name in ("zstd", "snappy", "clip/img_emb", "clip/metadata"):
        (folder / name).mkdir(parents=True)
    for number in range(num_files):
        matrix = generator.normal(size=(rows_per_file, 768)).astype(np.float32)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        keys = [f"{number:05}{row:05}" for row in range(rows_per_file)]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 768)
        column = lists.cast(pa.list_(pa.float32()))
        table = pa.table({"key": keys, "image_embedding": column})
        for codec in ("zstd", "snappy"):
            pq.write_table(table, folder / codec / f"{number:05}.parquet", compression=codec)
        np.save(folder / "clip/img_emb" / f"img_emb_{number}.npy", matrix.astype(np.float16))
        pq.write_table(
            pa.table({"image_path": keys}), folder / "clip/metadata" / f"metadata_{number}.parquet"
        )
    return column


def score_files(directory: Path, classifiers: list[ImageClassifier]) -> int:
    """The number of rows that got a score."""
    source = EmbeddingSource.open(str(directory))
    recipe = Recipe.of(None, classifiers, keep_embeddings=False)
    scorer = StoredScorer(recipe.ready(embedding_size=source.width), "cpu")
    schema = source.schema()
    rows = (rows for unit in source.units() for rows in source.read(unit, schema))
    return sum(b.num_rows - b.column("nsfw_score").null_count for b in scorer.score_rows(rows))


def score_python_lists(column: pa.Array, classifier: ImageClassifier) -> int:
    """What a UDF over rows does: each embedding becomes a Python object first."""
    embeddings = np.stack([np.array(row, np.float32) for row in column.to_pylist()])
    return len(classifier.classify(embeddings, "cpu"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows-per-file", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        column = write_files(folder, options.rows_per_file, options.files)
        torch.save(NsfwDetector(DETECTORS[768].widths).state_dict(), folder / "nsfw.pth")
        layers = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        tensors = {}
        for position, (inputs, outputs) in layers.items():
            tensors[f"layers.{position}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
            tensors[f"layers.{position}.bias"] = torch.zeros(outputs)
        torch.save(tensors, folder / "aesthetic.pth")
        nsfw = NsfwClassifier(model_path=str(folder / "nsfw.pth")).for_embedding_size(768)
        aesthetic = AestheticClassifier(model_path=str(folder / "aesthetic.pth"))
        both = [nsfw, aesthetic.for_embedding_size(768)]

        ways: dict[str, Callable[[], int]] = {
            "Arrow column in memory": lambda: int(
                score_column(column, 768, [nsfw], "cpu")[1].sum()
            ),
            "Python lists in memory": lambda: score_python_lists(column, nsfw),
            "Parquet, zstd, as ours": lambda: score_files(folder / "zstd", [nsfw]),
            "the same, two classifiers": lambda: score_files(folder / "zstd", both),
            "Parquet, snappy, as pandas writes": lambda: score_files(folder / "snappy", [nsfw]),
            "npy, float16": lambda: score_files(folder / "clip", [nsfw]),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                started = time.process_time()
                count = run()
                rates[way].append(count / (time.process_time() - started))
                expected = options.rows_per_file * (1 if "memory" in way else options.files)
                assert count == expected
    median = {way: statistics.median(values) for way, values in rates.items()}
    first = median["Arrow column in memory"]
    report(
        "classify",
        [
            {"embeddings from": way, "embeddings/CPU s": rate, "of the first": rate / first}
            for way, rate in median.items()
        ],
    )


if __name__ == "__main__":
    main()
