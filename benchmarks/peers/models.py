"""What every peer shares: the task, the pixels, the tower and the detector."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

#: Images of a forward pass: on a CPU more at a time are no faster.
BATCH_SIZE = 8

T = TypeVar("T")

#: What a peer writes of an image.
COLUMNS = ("key", "image_embedding", "nsfw_score")


@dataclass(frozen=True)
class Task:
    """What a peer is to do.

    Attributes:
        shards: directory of tar shards.
        output: directory for Parquet with `COLUMNS`, not there yet.
        model: a timm tower, 768 wide.
        weights: its state dict.
        detector: LAION's file.
    """

    shards: str
    output: str
    model: str
    weights: str
    detector: str

    @classmethod
    def given(cls) -> Task:
        """The one on the command line."""
        return cls(**json.loads(sys.argv[1]))

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def paths(self) -> list[str]:
        """Of the shards."""
        return [str(path) for path in sorted(Path(self.shards).glob("*.tar"))]


class Models:
    """Tower and detector in one process, on one thread: others have the other cores."""

    def __init__(self, task: Task) -> None:
        import timm
        import torch

        from spark_nsfw import NsfwClassifier

        torch.set_num_threads(1)
        self.tower = timm.create_model(task.model, num_classes=768).eval()
        self.tower.load_state_dict(torch.load(task.weights))
        config = self.tower.pretrained_cfg
        self.size = config["input_size"][-1]
        self.mean = torch.tensor(config["mean"]).view(3, 1, 1) * 255
        self.std = torch.tensor(config["std"]).view(3, 1, 1) * 255
        detector = NsfwClassifier(model_path=task.detector).for_embedding_size(768)
        self.detector = detector.load_model("cpu")

    def pixels(self, image: bytes) -> Any:
        """A decoded image: uint8 (S, S, 3), by this project's own fast decoder."""
        from spark_nsfw.score.pixels import decode_image

        return decode_image(image, self.size, decode="fast")

    def score(self, pixels: Sequence[Any]) -> tuple[Any, Any]:
        """Embeddings float32 (N, 768) and scores float32 (N,) of decoded images."""
        import numpy as np
        import torch

        planes = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            embeddings = torch.nn.functional.normalize(
                self.tower(planes.float().sub_(self.mean).div_(self.std)), dim=-1
            )
            return embeddings.numpy(), self.detector(embeddings).numpy()


def batches(values: Iterable[T], size: int = BATCH_SIZE) -> Iterator[list[T]]:
    """``size`` at a time; the last may be fewer."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def images(path: str) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each JPEG of a shard, as a few lines of `tarfile` give them."""
    import tarfile

    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                yield member.name[:-4], archive.extractfile(member).read()  # type: ignore[union-attr]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))
