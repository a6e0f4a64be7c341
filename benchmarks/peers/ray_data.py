"""Ray Data: its WebDataset reader, and an actor per core."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from benchmarks.peers.models import Models, Task, batches, cores


class Scorer:
    """Images → scores."""

    def __init__(self, task: Task) -> None:
        self.models = Models(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch's rows."""
        parts = [
            self.models.score([self.models.pixels(image) for image in images])
            for images in batches(batch["jpg"])
        ]
        embeddings, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
        return {"key": batch["__key__"], "image_embedding": embeddings, "nsfw_score": scores}


def main() -> None:
    """Run the task."""
    task = Task.given()
    ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False)
    samples = ray.data.read_webdataset(task.paths, suffixes=["jpg"], decoder=None, num_cpus=0.25)
    samples.map_batches(
        Scorer,
        fn_constructor_args=[task],
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=cores()),
        num_cpus=0.5,  # readers and writers need the rest
    ).write_parquet(task.output, ray_remote_args={"num_cpus": 0.25})


if __name__ == "__main__":
    main()
