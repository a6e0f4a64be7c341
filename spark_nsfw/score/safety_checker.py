"""Stable Diffusion's safety checker: image_embedding → how near to one of its concepts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pyarrow as pa
import torch
from torch import nn

from spark_nsfw.errors import WeightsMismatchError
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.download import Weights
from spark_nsfw.score.tensor_ranges import read_tensors

__all__ = ["SAFETY_CHECKER_URL", "SafetyCheckerClassifier"]

#: 1.2 GB, of which 62 KB are fetched.
SAFETY_CHECKER_URL = (
    "https://huggingface.co/CompVis/stable-diffusion-safety-checker/resolve/main/model.safetensors"
)

#: Its name in a directory of staged weights.
_FILE_NAME = "stable-diffusion-safety-checker.safetensors"

_TENSORS = (
    "concept_embeds",
    "concept_embeds_weights",
    "special_care_embeds",
    "special_care_embeds_weights",
)

#: What every concept's score rises by once an image is near to a special one.
_ADJUSTMENT = 0.01


class SafetyCheckerClassifier(ImageClassifier):
    """Stable Diffusion's safety checker on OpenAI CLIP ViT-L/14 embeddings: sexual content.

    An image is unsafe where its cosine to one of 17 concepts exceeds that concept's
    threshold. Two columns say by how much, and which:

    ====================== ===== ==================================================
    safety_checker_score   float the largest (cosine - threshold); above 0 = unsafe
    safety_checker_concept int   the concept, 0 to 16; the file has no names for them
    ====================== ===== ==================================================

    Known for false positives. Only the concepts are read from the file, by range; Stable
    Diffusion's own CLIP, the rest of it, is OpenAI's.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_column: the column that the scores go to.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: its ``model.safetensors``; a path or URL, ``https`` too. None takes the
            one on the hub, which only the machine that starts the job must reach.
        models_dir: directory or URL that holds it as
            ``stable-diffusion-safety-checker.safetensors``.
        concept_column: the column that the concepts' numbers go to.
        rounded: round to three decimals, as diffusers does; False leaves it out, as its
            ``forward_onnx`` does.

    Source: https://huggingface.co/CompVis/stable-diffusion-safety-checker; diffusers,
    ``pipelines/stable_diffusion/safety_checker.py``.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_column: str = "safety_checker_score",
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
        concept_column: str = "safety_checker_concept",
        rounded: bool = True,
    ) -> None:
        super().__init__(
            "safety_checker",
            embedding_column,
            pred_column,
            batch_size=batch_size,
            embedding_size=768,
            model_path=model_path,
            models_dir=models_dir,
        )
        self.concept_column = concept_column
        self.rounded = rounded
        self._concepts: dict[str, torch.Tensor] | None = None

    @property
    def result_fields(self) -> list[pa.Field]:
        """The score, and which concept it comes from."""
        return [
            pa.field(self.pred_column, pa.float32()),
            pa.field(self.concept_column, pa.int32()),
        ]

    @property
    def weights(self) -> Weights:
        """Which file its concepts are from; the sha256 is theirs, see `weights_sha256`."""
        source = SAFETY_CHECKER_URL
        if self.models_dir is not None:
            source = f"{self.models_dir.rstrip('/')}/{_FILE_NAME}"
        return Weights(self.model_path or source, self._sha256)

    def weights_sha256(self) -> str:
        """The sha256 of the concepts' bytes, one tensor after the other.

        Not that of the file: no score depends on anything else in it, and 1.2 GB would have
        to be read, perhaps over the internet, to know it.

        Raises:
            WeightsError: the file cannot be read, or is another.
        """
        content = (tensor.numpy().tobytes() for tensor in self.load_weights().values())
        return hashlib.sha256(b"".join(content)).hexdigest()

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The concepts and their thresholds, float32; read once, and taken along to workers.

        Raises:
            WeightsError: the file cannot be read, or is another.
        """
        if self._concepts is None:
            source = self.weights.source
            tensors = {
                name: tensor.to(torch.float32)
                for name, tensor in read_tensors(source, _TENSORS).items()
            }
            for rows, thresholds in (_TENSORS[:2], _TENSORS[2:]):
                shapes = tuple(tensors[rows].shape), tuple(tensors[thresholds].shape)
                if 0 in shapes[0] or shapes != ((*shapes[0][:1], 768), shapes[0][:1]):
                    raise WeightsMismatchError(
                        f"{source} is not a safety checker for ViT-L/14: {rows} and {thresholds} "
                        f"are {shapes[0]} and {shapes[1]}, not (N, 768) and (N,)"
                    )
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise WeightsMismatchError(f"{source}: not all of its concepts are finite")
            self._concepts = tensors
        return self._concepts

    def load_model(self, device: str) -> nn.Module:
        """The concepts: float32 (N, 768) → float32 (N, 2), score and number of the concept.

        Raises:
            WeightsError: the file cannot be read, or is another.
        """
        network = _Checker(self.load_weights(), self.rounded)
        return network.eval().requires_grad_(False).to(device)


class _Checker(nn.Module):
    """Diffusers' rule, for all rows at once.

    In float64: a cosine's last bit can decide how a score is rounded, a thousandth up or down.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded
        self.num_special = len(tensors["special_care_embeds"])
        rows = torch.cat([tensors["special_care_embeds"], tensors["concept_embeds"]])
        directions = nn.functional.normalize(rows.to(torch.float64), dim=1)
        thresholds = [tensors["special_care_embeds_weights"], tensors["concept_embeds_weights"]]
        self.register_buffer("directions", directions)
        self.register_buffer("thresholds", torch.cat(thresholds).to(torch.float64))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(embeddings.to(torch.float64), dim=1)
        cosines = unit @ self.get_buffer("directions").T  # (N, special + concepts)
        margins = cosines - self.get_buffer("thresholds")
        # Diffusers raises the special scores, too, once one is above 0: that one is enough.
        near_special = (self._round(margins[:, : self.num_special]) > 0).any(dim=1)
        margin, concept = margins[:, self.num_special :].max(dim=1)
        score = self._round(margin + _ADJUSTMENT * near_special)
        return torch.stack([score, concept.to(score)], dim=1).to(torch.float32)

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        return torch.round(values, decimals=3) if self.rounded else values
