"""The network between pixels and image_embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from spark_nsfw.errors import InputError
from spark_nsfw.score.blocks import in_blocks

__all__ = [
    "CPU_BLOCK_IMAGES",
    "PRECISIONS",
    "Precision",
    "Tower",
    "batch_size_on",
    "check_speed",
    "compute_exactly",
    "create_network",
    "network_shape",
    "precision_on",
    "with_timm_names",
]

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")

#: On a CPU every forward pass has this many images, so that an embedding depends on nothing
#: but its image. More at a time are no faster.
CPU_BLOCK_IMAGES = 8

#: Larger batches would only hold pixels.
_CPU_BATCH_SIZE = 64

#: A GPU's matrix units are busy from here on (docs/performance.md).
_GPU_BATCH_SIZE = 256


def precision_on(device: str, precision: Precision | None, autocast: bool) -> Precision:
    """The precision that a model computes in on a device.

    Args:
        device: a torch device.
        precision: on any device; None goes by ``autocast``.
        autocast: float16 on a GPU; else float32 everywhere.
    """
    if precision is not None:
        return precision
    return "float16" if autocast and torch.device(device).type == "cuda" else "float32"


def compute_exactly(device: str) -> None:
    """Let float32 be float32 on a GPU, and half precision add up in float32.

    CUDA's defaults differ; they are the process's own.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def batch_size_on(device: str, batch_size: int | None) -> int:
    """The images that models on pixels take at a time on a device.

    Args:
        device: a torch device.
        batch_size: what the user gave; None where nobody says.
    """
    if torch.device(device).type == "cuda":
        # Tasks of one core each are many to a GPU, and share its memory.
        suitable = _GPU_BATCH_SIZE if torch.get_num_threads() > 1 else _CPU_BATCH_SIZE
        return batch_size or suitable
    return min(batch_size or _CPU_BATCH_SIZE, _CPU_BATCH_SIZE)


def check_speed(batch_size: int | None, num_threads: int | None, precision: str | None) -> None:
    """Refuse what no model on pixels can run with.

    Raises:
        InputError: names the option.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size (batch_size) is at least 1, not {batch_size}")
    if num_threads is not None and num_threads < 1:
        raise InputError(f"--num-threads (num_threads_per_worker) is at least 1, not {num_threads}")
    if precision not in (None, *PRECISIONS):
        raise InputError(
            f"--precision (precision) is one of {', '.join(PRECISIONS)}, not {precision!r}"
        )


class Tower(nn.Module):
    """A network on raw pixels, on one device in one precision.

    Args:
        network: takes normalised pixels (N, 3, S, S) of that precision, gives (N, D).
        mean, std: of the pixels, per RGB channel, on a scale of 0 to 1.
        precision: of the network's weights and activations.
        normalize: divide what it gives by its L2 norm.
        name: of the model, for messages.
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        precision: torch.dtype,
        normalize: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network.to(precision) if isinstance(network, nn.Module) else network
        self.precision = precision
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) → float32 (N, D)."""
        return self.with_norms(pixels)[0]

    def with_norms(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, and the L2 norm of each projection before it was normalised.

        uint8 (N, S, S, 3) → float32 (N, D), float32 (N,).
        """
        if pixels.device.type == "cpu":
            both = in_blocks(self._project, pixels, CPU_BLOCK_IMAGES)
        else:
            both = self._project(pixels)
        return both[:, :-1], both[:, -1]

    def _project(self, pixels: torch.Tensor) -> torch.Tensor:
        # Planes first, while a value is one byte: the passes below are then seven times as fast.
        planes = pixels.permute(0, 3, 1, 2).contiguous()
        x = planes.to(torch.float32).sub_(self.get_buffer("mean")).div_(self.get_buffer("std"))
        given = self.network(x.to(self.precision))
        if given.shape[:1] != (len(pixels),) or given.ndim > 2:
            raise InputError(
                f"the network of {self.name} gives {tuple(given.shape)} for {len(pixels)} images, "
                f"not ({len(pixels)},) or ({len(pixels)}, K)"
            )
        projections = given.to(torch.float32).reshape(len(given), -1)
        norms = torch.linalg.vector_norm(projections, dim=1, keepdim=True)
        if self.normalize:
            projections = projections / norms.clamp_min(1e-12)
        return torch.cat([projections, norms], dim=1)


def create_network(model_name: str, embedding_size: int | None) -> nn.Module:
    """A timm network with random weights, ``embedding_size`` wide or as wide as its own."""
    kwargs = {} if embedding_size is None else {"num_classes": embedding_size}
    network: nn.Module = timm.create_model(model_name, pretrained=False, **kwargs)
    return network


@lru_cache(maxsize=8)
def network_shape(model_name: str, embedding_size: int | None) -> nn.Module:
    """A network without memory behind its weights: its configuration and shapes."""
    with torch.device("meta"):
        return create_network(model_name, embedding_size)


def with_timm_names(
    tensors: dict[str, torch.Tensor], network: nn.Module
) -> dict[str, torch.Tensor]:
    """Checkpoint tensors under timm's names, whichever of the known formats they have.

    timm would resize position embeddings and patch kernels that do not fit, and so
    load a 336 pixel checkpoint into a 224 pixel tower; such tensors keep their shape here.
    """
    renamed: dict[str, torch.Tensor] = checkpoint_filter_fn(dict(tensors), network)
    originals = {
        "pos_embed": ("positional_embedding", "pos_embed"),
        "patch_embed.proj.weight": ("conv1.weight", "patch_embed.proj.weight"),
    }
    for name, endings in originals.items():
        for source, tensor in tensors.items():
            of_tower = source.startswith(("visual.", "module.visual.")) or source == name
            is_original = name in renamed and of_tower and source.endswith(endings)
            if is_original and tensor.numel() != renamed[name].numel():
                renamed[name] = tensor
    return renamed
