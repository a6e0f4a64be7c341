"""``webdataset`` in the processes of a DataLoader, which score; Parquet by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.peers.models import COLUMNS, Models, Task, batches, cores


class Scored(IterableDataset):  # type: ignore[type-arg]
    """Keys, embeddings and scores of a worker's shards."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[tuple[list[str], Any, Any]]:
        models = Models(self.task)
        samples = webdataset.WebDataset(
            self.task.paths, shardshuffle=False, handler=webdataset.warn_and_continue
        ).to_tuple("__key__", "jpg")
        for batch in batches(samples):
            keys, images = zip(*batch, strict=True)
            yield list(keys), *models.score([models.pixels(image) for image in images])


def main() -> None:
    """Run the task."""
    task = Task.given()
    Path(task.output).mkdir()
    loader = DataLoader(Scored(task), batch_size=None, num_workers=cores())
    with pq.ParquetWriter(Path(task.output) / "part.parquet", _SCHEMA) as writer:
        parts = []
        for part in loader:
            parts.append(part)
            if len(parts) == 32:
                writer.write_table(_table(parts))
                parts = []
        if parts:
            writer.write_table(_table(parts))


_SCHEMA = pa.schema(
    zip(COLUMNS, [pa.string(), pa.list_(pa.float32(), 768), pa.float32()], strict=True)
)


def _table(parts: list[tuple[list[str], Any, Any]]) -> pa.Table:
    keys, embeddings, scores = zip(*parts, strict=True)
    values = pa.array(np.concatenate(embeddings).ravel())
    return pa.table(
        [
            pa.array([key for each in keys for key in each]),
            pa.FixedSizeListArray.from_arrays(values, 768),
            pa.array(np.concatenate(scores)),
        ],
        schema=_SCHEMA,
    )


if __name__ == "__main__":
    main()
