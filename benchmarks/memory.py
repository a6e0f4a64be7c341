"""Resident memory of a scorer over shards of growing length: ``python -m benchmarks.memory``.

Each length runs in a process of its own, which reports its own peak.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.table import report
from examples.photographs import encode, photographs, write_shard

LENGTHS = (200, 1000, 4000)


def score(path: str) -> None:
    """Score one shard and print rows and this process's peak of resident memory in KiB."""
    from spark_nsfw import SampleOptions, Scorer, TimmImageEmbedder, iter_sample_rows

    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, batch_size=64)
    batches = Scorer(embedder, [], "cpu").score_rows(
        iter_sample_rows([(path, "s")], SampleOptions())
    )
    rows = sum(batch.num_rows for batch in batches)
    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    jpegs = [encode(p, quality=90) for p, _ in zip(photographs(), range(100), strict=False)]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            path = Path(folder) / f"{length}.tar"
            write_shard(path, ((f"{i:06}", [("jpg", jpegs[i % 100])]) for i in range(length)))
            command = [sys.executable, "-m", "benchmarks.memory", str(path)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            count, peak = map(int, answer.split())
            assert count == length
            rows.append(
                {
                    "images": length,
                    "shard MiB": path.stat().st_size / 2**20,
                    "peak resident MiB": peak / 2**10,
                }
            )
            path.unlink()
    first = float(str(rows[0]["peak resident MiB"]))
    for row in rows:
        row["of the shortest"] = float(str(row["peak resident MiB"])) / first
    report("memory", rows)


if __name__ == "__main__":
    score(sys.argv[1]) if len(sys.argv) > 1 else main()
