"""LAION-Aesthetics V2: image_embedding → aesthetic_score."""

from __future__ import annotations

import torch
from torch import nn

from spark_nsfw.score.checkpoint import check_fit
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.download import PublishedFile

__all__ = ["AESTHETIC_FILE", "AestheticClassifier"]

#: LAION-Aesthetics V2, trained on the SAC, LAION-Logos and AVA ratings.
AESTHETIC_FILE = PublishedFile(
    url="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    file_name="sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)

#: Position in the published network's ``layers`` → (inputs, outputs); between them lies dropout.
_AESTHETIC_LAYERS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


class AestheticClassifier(ImageClassifier):
    """LAION-Aesthetics V2 on OpenAI CLIP ViT-L/14 embeddings: about 1 to 10, 10 = pleasing.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_column: the column that the scores go to.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: ``sac+logos+ava1-l14-linearMSE.pth`` or another file of its tensors,
            a path or URL; None takes the published one, downloaded once.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_column: str = "aesthetic_score",
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        super().__init__(
            "aesthetic",
            embedding_column,
            pred_column,
            batch_size=batch_size,
            embedding_size=768,
            model_path=model_path,
            models_dir=models_dir,
        )

    @property
    def published_file(self) -> PublishedFile:
        """The file of its authors."""
        return AESTHETIC_FILE

    def load_model(self, device: str) -> nn.Linear:
        """The network as the one affine map that it is.

        Five linear layers with nothing but dropout between them are one: multiplied out
        in float64 it gives the same scores, at a thousandth of the cost.

        Raises:
            WeightsError: the file cannot be had, or holds another network.
        """
        tensors = {name: tensor.to(torch.float64) for name, tensor in self.load_weights().items()}
        expected = {}
        for position, (num_inputs, num_outputs) in _AESTHETIC_LAYERS.items():
            expected[f"layers.{position}.weight"] = torch.empty(num_outputs, num_inputs)
            expected[f"layers.{position}.bias"] = torch.empty(num_outputs)
        check_fit(str(self.weights_file()), tensors, expected)
        weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
        for position in _AESTHETIC_LAYERS:
            layer = tensors[f"layers.{position}.weight"]
            weight, bias = layer @ weight, layer @ bias + tensors[f"layers.{position}.bias"]
        network = nn.Linear(768, 1)
        network.load_state_dict({"weight": weight, "bias": bias})
        return network.requires_grad_(False).to(device)
