"""Daft with a UDF of tar shards, a process per core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import daft
from daft import DataType, col

from benchmarks.peers.models import Models, Task, batches, cores, images

_SCORED = DataType.struct(
    {
        "key": DataType.string(),
        "image_embedding": DataType.fixed_size_list(DataType.float32(), 768),
        "nsfw_score": DataType.float32(),
    }
)


@daft.cls(use_process=True, max_concurrency=cores())
class Scorer:
    """Shards → rows."""

    def __init__(self, task: Task) -> None:
        self.models = Models(task)

    @daft.method(return_dtype=_SCORED, unnest=True)
    def score(self, path: str) -> Iterator[dict[str, Any]]:
        """One shard's rows."""
        for batch in batches(images(path)):
            keys, encoded = zip(*batch, strict=True)
            scored = self.models.score([self.models.pixels(image) for image in encoded])
            for key, embedding, score in zip(keys, *scored, strict=True):
                yield {"key": key, "image_embedding": embedding, "nsfw_score": float(score)}


def main() -> None:
    """Run the task."""
    task = Task.given()
    shards = daft.from_pydict({"path": task.paths}).into_batches(1)
    shards.select(Scorer(task).score(col("path"))).write_parquet(task.output)


if __name__ == "__main__":
    main()
