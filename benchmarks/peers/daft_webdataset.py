"""Daft with its own WebDataset reader, and a UDF of images in a process per core."""

from __future__ import annotations

from typing import Any

import daft
import pyarrow as pa
from daft import DataType, Series, col

from benchmarks.peers.models import Models, Task, cores

_SCORED = DataType.struct(
    {
        "image_embedding": DataType.fixed_size_list(DataType.float32(), 768),
        "nsfw_score": DataType.float32(),
    }
)


@daft.cls(use_process=True, max_concurrency=cores())
class Scorer:
    """Images → scores."""

    def __init__(self, task: Task) -> None:
        self.models = Models(task)

    @daft.method.batch(return_dtype=_SCORED, unnest=True, batch_size=8)
    def score(self, files: Series) -> Any:
        """A batch's rows."""
        pixels = []
        for file in files.to_pylist():
            with file.open() as stream:
                pixels.append(self.models.pixels(stream.read()))
        embeddings, scores = self.models.score(pixels)
        values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), 768)
        return pa.StructArray.from_arrays([values, pa.array(scores)], [*_SCORED.fields])


def main() -> None:
    """Run the task."""
    daft.set_execution_config(scantask_max_parallel=1)  # it hangs with more
    task = Task.given()
    samples = daft.read_webdataset(task.paths)
    samples.select(col("__key__").alias("key"), Scorer(task).score(col("jpg"))).write_parquet(
        task.output
    )


if __name__ == "__main__":
    main()
