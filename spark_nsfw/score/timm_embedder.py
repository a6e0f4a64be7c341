"""CLIP's image towers from timm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import timm
import torch
from torch import nn

from spark_nsfw.errors import InputError
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.download import Weights, hub_file, local_file
from spark_nsfw.score.embedder import ImageEmbedder
from spark_nsfw.score.openvino_engine import OpenVinoNetwork, refuse_openvino
from spark_nsfw.score.pixels import Decode
from spark_nsfw.score.staging import staged_file
from spark_nsfw.score.tower import Precision, create_network, network_shape, with_timm_names
from spark_nsfw.score.transformer import rearrange

if TYPE_CHECKING:
    from spark_nsfw.score.detector import Detector

__all__ = ["ENGINES", "RANDOM_SEED", "Engine", "TimmImageEmbedder"]

Engine = Literal["torch", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

#: Random towers must be the same in every worker.
RANDOM_SEED = 0


class TimmImageEmbedder(ImageEmbedder):
    """A CLIP image tower from timm.

    Args:
        model_name: of timm, such as ``vit_large_patch14_clip_quickgelu_224.openai``.
        pretrained: load timm's weights for that name from the model hub.
        batch_size: images per forward pass; None takes what suits the device.
        num_threads_per_worker: threads that decode images; None takes what suits the task's cores.
        image_embedding_column: the column that the embeddings go to.
        normalize_embeddings: divide each embedding by its L2 norm.
        classifiers: applied to the embeddings, or the pixels, in the same pass.
        autocast: compute in float16 on a GPU; False computes in float32 everywhere.
        checkpoint_path: weights from a file instead: timm's or open_clip's safetensors
            or PyTorch file, or OpenAI's ``ViT-L-14.pt``; a path or URL.
        precision: ``float32``, ``float16`` or ``bfloat16`` on any device, whatever
            ``autocast`` says.
        embedding_size: width D of the tower's projection; None takes the model's own.
        decode: ``exact`` gives the pixels of OpenAI's CLIP bit for bit; ``fast`` takes
            half the time for JPEG and moves scores less than float16 does
            (docs/fidelity.md).
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made, from
            which ``pretrained`` takes the weights instead of the hub.
        engine: ``openvino`` computes with OpenVINO, on a CPU only; ``torch`` everywhere
            (docs/performance.md says which is faster).
        use_index_files: NeMo Curator's, for DALI; accepted, and without effect: ``.idx``
            files beside the shards are not needed.

    Without ``pretrained`` or ``checkpoint_path`` the weights are random, from a fixed
    seed: for trying things out; the scores mean nothing.

    Raises:
        InputError: an argument that cannot work, such as an unknown model name.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        batch_size: int | None = None,
        num_threads_per_worker: int | None = None,
        image_embedding_column: str = "image_embedding",
        normalize_embeddings: bool = True,
        classifiers: Sequence[Detector[Any]] = (),
        autocast: bool = True,
        use_index_files: bool = False,
        *,
        checkpoint_path: str | None = None,
        precision: Precision | None = None,
        embedding_size: int | None = None,
        decode: Decode = "fast",
        models_dir: str | None = None,
        engine: Engine = "torch",
    ) -> None:
        if engine not in ENGINES:
            raise InputError(f"--engine (engine) is {' or '.join(ENGINES)}, not {engine!r}")
        if not timm.is_model(model_name):
            raise InputError(
                f"--model (model_name): timm has no model {model_name!r}; "
                f"close names: {', '.join(_close_names(model_name)) or 'none'}; "
                "timm.list_models() lists them all"
            )
        super().__init__(
            model_name,
            image_embedding_column,
            classifiers,
            embedding_size=embedding_size,
            batch_size=batch_size,
            num_threads_per_worker=num_threads_per_worker,
            normalize_embeddings=normalize_embeddings,
            autocast=autocast,
            precision=precision,
            decode=decode,
            checkpoint_path=checkpoint_path,
        )
        self.pretrained = pretrained
        self.models_dir = models_dir
        self.engine: Engine = engine
        self.use_index_files = use_index_files

    @property
    def _shape(self) -> nn.Module:
        return network_shape(self.model_name, self._embedding_size)

    @property
    def embedding_size(self) -> int:
        """Width D of the embeddings."""
        shape: Any = self._shape
        return int(shape.num_classes or shape.num_features)

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower takes, in pixels."""
        return int(self._config["input_size"][-1])

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the pixels, per RGB channel, on a scale of 0 to 1."""
        return self._config["mean"], self._config["std"]

    @property
    def _config(self) -> dict[str, Any]:
        return dict(timm.data.resolve_data_config({}, model=self._shape))

    @property
    def weights(self) -> Weights:
        """Which weights the tower has; their sha256 is known once it is `ready`."""
        if self.checkpoint_path is None and not self.pretrained:
            return Weights(f"random (seed {RANDOM_SEED})", None, is_random=True)
        return Weights(self.checkpoint_path or self.model_name, self._sha256)

    def weights_file(self) -> str | None:
        """The local checkpoint file, fetched if it must be; None for random weights."""
        if self.checkpoint_path is None and self.pretrained:
            if self.models_dir is not None:
                url, sha256 = staged_file(self.models_dir, self.model_name)
                return str(local_file(url, self._sha256 or sha256))
            return str(local_file(hub_file(self.model_name), self._sha256))
        return super().weights_file()

    def ready(self, device: str | None = None) -> ImageEmbedder:
        """As `ImageEmbedder.ready`.

        Raises:
            InputError: the engine is not installed, or has no such device or precision.
            WeightsError: the file cannot be had, or is not the one that was staged.
        """
        if self.engine == "openvino":
            self._refuse_gpu(device)
            refuse_openvino(self.precision_on("cpu"))
        return super().ready(device)

    def _refuse_gpu(self, device: str | None) -> None:
        if device is not None and torch.device(device).type != "cpu":
            raise InputError(
                f"--engine openvino (engine) computes on a CPU, not on {device}: give "
                "--device cpu, or --engine torch"
            )

    def describe(self) -> dict[str, Any]:
        """As `ImageEmbedder.describe`; the engine, too, where it is not torch."""
        engine = {} if self.engine == "torch" else {"engine": self.engine}
        return super().describe() | engine

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Timm's network with its weights, on the CPU, rearranged to compute the same faster.

        Raises:
            InputError: the engine is not installed, or computes on no such device.
            WeightsUnavailableError: the checkpoint cannot be had.
            WeightsMismatchError: its tensors do not fit the tower.
        """
        path = self.weights_file()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            network = create_network(self.model_name, self._embedding_size)
        if path is not None:
            tensors = with_timm_names(load_state_dict(path), network)
            check_fit(path, tensors, network.state_dict())
            network.load_state_dict(tensors)
        network = rearrange(network.eval())
        if self.engine == "torch":
            return network
        self._refuse_gpu(device)
        return OpenVinoNetwork(network, self.image_size, self.precision_on(device))


def _close_names(model_name: str) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(model_name, timm.list_models() + timm.list_pretrained(), n=3)
