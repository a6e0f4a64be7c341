"""What all sections share: the tower, the photographs, and how a rate is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import nn

from spark_nsfw.score.pixels import Transform, decode_once
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.timm_embedder import TimmImageEmbedder
from spark_nsfw.score.tower import Tower, create_network
from spark_nsfw.score.transformer import rearrange

MODEL = "vit_large_patch14_clip_quickgelu_224.openai"

#: 81.08 GMACs an image, of MODEL (timm's benchmark tables); other towers have no share.
FLOP_PER_IMAGE = {MODEL: 2 * 81.08e9}

Row = dict[str, object]


@dataclass
class Setup:
    """What is measured, and on what.

    Attributes:
        model, embedding_size: timm's tower.
        device: a torch device.
        shard: a tar of JPEGs; None takes scikit-image's pictures.
        detectors: where LAION's archives and golden sets are.
        seconds: how long each rate is measured.
    """

    model: str
    embedding_size: int | None
    device: str
    shard: str | None
    detectors: str
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def batch_size(self) -> int:
        """Images a pass, where that is not what is measured."""
        return 256 if self.on_gpu else 16

    def embedder(self, **arguments: object) -> TimmImageEmbedder:
        """The tower as users make it."""
        arguments = {"embedding_size": self.embedding_size} | arguments
        return TimmImageEmbedder(self.model, **arguments)  # type: ignore[arg-type]

    @cached_property
    def transform(self) -> Transform:
        """How an image becomes the tower's pixels."""
        return self.embedder().transform

    @cached_property
    def jpegs(self) -> list[bytes]:
        """256 photographs."""
        if self.shard is not None:
            import tarfile

            with tarfile.open(self.shard) as archive:
                return [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
        from examples.photographs import encode, photographs

        return [encode(photograph, quality=90) for photograph in islice(photographs(), 256)]

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The photographs decoded, uint8 (256, S, S, 3), on the CPU."""
        transform = self.transform
        return torch.from_numpy(np.stack([decode_once(j, [transform])[0] for j in self.jpegs]))

    def batch(self, num_images: int) -> torch.Tensor:
        """Pixels of any number of photographs, on the device."""
        repeats = -(-num_images // len(self.pixels))
        return self.pixels.repeat(repeats, 1, 1, 1)[:num_images].to(self.device)

    @cached_property
    def _network(self) -> nn.Module:
        """Timm's network, float32; its weights are values of float16, as OpenAI's are."""
        torch.manual_seed(0)
        with torch.device(self.device):
            network = create_network(self.model, self.embedding_size).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())
        return network

    def tower(self, precision: str, rearranged: bool = True) -> Tower:
        """A tower of its own, as timm has it or as this package rearranges it."""
        network = copy.deepcopy(self._network)
        if rearranged:
            network = rearrange(network)
        mean, std = self.embedder().statistics
        tower = Tower(network, mean, std, getattr(torch, precision), True, self.model)
        return tower.eval().to(self.device)

    def recipe(self, **arguments: object) -> Recipe:
        """Of the tower alone."""
        return Recipe.of(self.embedder(**arguments), [], device=self.device).ready()

    def finish(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds_per_call(self, work: Callable[[], object]) -> float:
        """The mean time of a call over ``seconds``, after three that do not count."""
        for _ in range(3):
            work()
        self.finish()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < self.seconds:
            for _ in range(4 if self.on_gpu else 1):  # the device is never without work
                work()
                count += 1
            self.finish()
        return (time.perf_counter() - started) / count

    def share(self, images_per_second: float, flop_per_second: float | None) -> Row:
        """The share of a matrix rate that a tower reaches."""
        if flop_per_second is None or self.model not in FLOP_PER_IMAGE:
            return {}
        used = images_per_second * FLOP_PER_IMAGE[self.model]
        return {"TFLOP/s": used / 1e12, "share of matrix rate": used / flop_per_second}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest cosine of rows."""
    pairs: Sequence[torch.Tensor] = [rows.double() / rows.double().norm(dim=1, keepdim=True)
                                     for rows in (a, b)]  # fmt: skip
    return float((pairs[0] * pairs[1]).sum(dim=1).min())
