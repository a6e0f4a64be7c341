"""Q16: image_embedding → inappropriate content of any kind."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import nn

from spark_nsfw.errors import WeightsMismatchError
from spark_nsfw.score.checkpoint import load_state_dict
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.download import PublishedFile
from spark_nsfw.score.pickled_array import is_pickle, read_pickled_array

__all__ = ["Q16_FILE", "Q16Classifier"]

#: The learned prompts for ViT-L/14.
Q16_FILE = PublishedFile(
    url="https://raw.githubusercontent.com/ml-research/Q16/main/data/ViT-L-14/prompts.p",
    file_name="q16_vit_l_14_prompts.p",
    sha256="9b6c411824c2f64e0f847aa3c9f2b15b8e3a6c75e0efd82f2f672670c97ccad5",
)

_SHAPE = (2, 768)


class Q16Classifier(ImageClassifier):
    """Q16 on OpenAI CLIP ViT-L/14 embeddings: inappropriate content, violence and hate too.

    With e the unit embedding, p the two learned prompts (appropriate, inappropriate) and
    p̂ the same at unit length, it adds two columns:

    ================== ======= ====================================================
    q16_score          float   softmax(100 e·p̂)[1]: 0 to 1, 1 = inappropriate
    is_q16_inappropriate boolean argmax(e·p) = 1, as Q16's own code decides
    ================== ======= ====================================================

    Q16's code leaves the prompts at the lengths that training gave them, 22.2 and 21.3, so
    about one image in a hundred is decided differently from ``q16_score > 0.5``.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_column: the column that the scores go to.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: ``prompts.p`` of Q16's repository, read without executing it, or
            safetensors with one tensor (2, 768); a path or URL. None takes the published
            one, downloaded once.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made.
        decision_column: the column that the decisions go to.

    Source: Schramowski, Tauchmann, Kersting, "Can Machines Help Us Answering Question 16 in
    Datasheets, and In Turn Reflecting on Inappropriate Content?", FAccT 2022;
    https://github.com/ml-research/Q16.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_column: str = "q16_score",
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
        decision_column: str = "is_q16_inappropriate",
    ) -> None:
        super().__init__(
            "q16",
            embedding_column,
            pred_column,
            batch_size=batch_size,
            embedding_size=_SHAPE[1],
            model_path=model_path,
            models_dir=models_dir,
        )
        self.decision_column = decision_column

    @property
    def published_file(self) -> PublishedFile:
        """The file of its authors."""
        return Q16_FILE

    @property
    def result_fields(self) -> list[pa.Field]:
        """The score, and the decision of Q16's own code."""
        return [
            pa.field(self.pred_column, pa.float32()),
            pa.field(self.decision_column, pa.bool_()),
        ]

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The tensor ``prompts`` (2, 768): appropriate, inappropriate.

        Raises:
            WeightsError: there is no file, or it cannot be had or read.
        """
        path = self._needed_file()
        if is_pickle(path):
            return {"prompts": torch.from_numpy(read_pickled_array(path).astype("float64"))}
        tensors = list(load_state_dict(path).values())
        if len(tensors) > 1:
            raise WeightsMismatchError(f"{path} has {len(tensors)} tensors, Q16's prompts are one")
        return {"prompts": tensors[0]}

    def load_model(self, device: str) -> nn.Module:
        """The prompts, as float32 (N, 768) → float32 (N, 2): score, and 1 for inappropriate.

        Raises:
            WeightsError: the file cannot be had, or holds something else.
        """
        prompts = self.load_weights()["prompts"].to(torch.float64)
        if tuple(prompts.shape) != _SHAPE or not torch.isfinite(prompts).all():
            raise WeightsMismatchError(
                f"{self.weights_file()} holds {tuple(prompts.shape)}, "
                f"Q16's prompts for ViT-L/14 are {_SHAPE} finite numbers"
            )
        return _Prompts(prompts).eval().requires_grad_(False).to(device)


class _Prompts(nn.Module):
    """Both decisions. Of two prompts only the difference counts, and it loses no digits."""

    def __init__(self, prompts: torch.Tensor) -> None:
        super().__init__()
        unit = nn.functional.normalize(prompts, dim=1)
        rows = torch.stack([100 * (unit[1] - unit[0]), prompts[1] - prompts[0]])
        self.register_buffer("differences", rows.to(torch.float32))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(embeddings, dim=1)
        logit, preference = (unit @ self.get_buffer("differences").T).unbind(1)
        return torch.stack([torch.sigmoid(logit), (preference > 0).to(logit)], dim=1)
