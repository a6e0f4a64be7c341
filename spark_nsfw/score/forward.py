"""pixels → embeddings and scores: forward passes of several threads on one device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.describing import is_foreign
from spark_nsfw.score.lanes import Lane, Lanes, Pixels, out_of_memory
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.tower import batch_size_on

__all__ = ["ForwardPasses", "Results"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """What the forward passes give for N images, on the CPU.

    Attributes:
        embeddings: float32 (N, D); None where there is no embedder.
        norms: float32 (N,), of their projections; None where there is no embedder.
        scores: of each classifier, float32 (N,) or (N, K).
    """

    embeddings: torch.Tensor | None
    norms: torch.Tensor | None
    scores: list[torch.Tensor]


#: Threads that keep a GPU busy: while one waits for its results, the other has copied and
#: launched the next batch. Each has a stream of its own.
_GPU_STREAMS = 2


class ForwardPasses:
    """The models of a recipe on one device, for several threads at a time.

    On a GPU every pass has the same number of images, whatever is missing filled up, since a GPU's
    kernels, and with them the last bits of a result, depend on how many there are.

    Args:
        recipe: about images, and its classifiers fit its embedder.
        device: a torch device.

    Attributes:
        batch_size: images per forward pass.
        num_threads: forward passes under way at a time.
        fitting_batch_size: images that the device has memory for, as far as is known.
        records: whether a GPU's passes are recorded as CUDA graphs, if they can be.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.embedder = recipe.embedder
        self.classifiers = recipe.classifiers
        self._transforms = recipe.transforms
        self.on_gpu = torch.device(device).type == "cuda"
        self.device = _with_number(device) if self.on_gpu else device
        self.batch_size = batch_size_on(self.device, recipe.batch_size)
        # On a CPU each core takes images of its own through the models.
        self.num_threads = _GPU_STREAMS if self.on_gpu else torch.get_num_threads()
        self.fitting_batch_size = self.batch_size
        self._lanes = Lanes(self.num_threads, self.device)
        self.records = True
        self._is_recorded = False

    def load(self) -> None:
        """Load all models; before the threads start, or each would load its own.

        Raises:
            WeightsError: a file cannot be had or does not fit.
            torch.cuda.OutOfMemoryError: there is not even memory for one image.
        """
        if self.embedder is not None:
            self.embedder.tower(self.device)
        for classifier in self.classifiers:
            classifier.model(self.device)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)  # other streams would not wait for the weights
            if self.records:
                self._record()

    def _record(self) -> None:
        """Record the passes of all lanes, of as many images as there is memory for."""
        with torch.inference_mode(), self._lanes.alone():
            while not self._is_recorded and self._can_be_recorded:
                size = self.fitting_batch_size
                try:
                    for lane in self._lanes.all:
                        lane.record(self._compute, self._transforms, size)
                    self._is_recorded = True
                    return
                except RuntimeError as exc:
                    short = out_of_memory(exc)
                    if short and size == 1:
                        raise
                    if not short:  # if it was a fault, the first pass will show it, too
                        _log.warning("computing step by step, without a CUDA graph: %s", exc)
                        self.records = False
                for lane in self._lanes.all:
                    lane.forget()
                if not self.records:
                    return
                torch.cuda.empty_cache()  # out of the except block, which held the tensors
                self._smaller(size)

    @property
    def _can_be_recorded(self) -> bool:
        """Whether all models are networks, and no user's own code, which may do anything."""
        ours = [*self.classifiers, *([self.embedder] if self.embedder is not None else [])]
        models = [classifier.model(self.device) for classifier in self.classifiers]
        networks = [getattr(model, "network", model) for model in models]  # a tower has one inside
        return not any(is_foreign(each) for each in ours) and all(
            isinstance(network, torch.nn.Module) for network in networks
        )

    def score(self, pixels: Pixels, num_images: int) -> Results:
        """Embed and score images, in pieces that the device has memory for.

        Where it has not, half is tried, alone, because the other passes may have had the
        memory. What a full batch taught is kept for all to come.

        Args:
            pixels: uint8 (N, S, S, 3) for each transform of the recipe.
            num_images: of these, how many count; the results of the others are not defined, and
                on a CPU there are none.

        Raises:
            torch.cuda.OutOfMemoryError: there is not even memory for one image.
        """
        if not self.on_gpu:
            pixels = {transform: images[:num_images] for transform, images in pixels.items()}
        num_rows = len(next(iter(pixels.values())))
        size = self.fitting_batch_size
        with torch.inference_mode():
            with self._lanes.one_of_several() as lane:
                try:
                    return self._forward(lane, pixels, size)
                except RuntimeError as exc:
                    if not out_of_memory(exc):
                        raise
            with self._lanes.alone() as lane:
                while True:
                    torch.cuda.empty_cache()  # out of the except block, which held the tensors
                    size = self._smaller(min(size, num_rows))
                    try:
                        return self._forward(lane, pixels, size)
                    except RuntimeError as exc:
                        if size == 1 or not out_of_memory(exc):
                            raise

    def _forward(self, lane: Lane, pixels: Pixels, size: int) -> Results:
        """As `score`, ``size`` images at a time."""
        pieces = [self._split(images, size) for images in pixels.values()]
        outputs = [
            lane.run(self._compute, dict(zip(pixels, piece, strict=True)))
            for piece in zip(*pieces, strict=True)
        ]
        joined = [torch.cat(columns) for columns in zip(*outputs, strict=True)]
        if self.embedder is None:
            return Results(None, None, joined)
        return Results(joined[0], joined[1], joined[2:])

    def _split(self, images: torch.Tensor, size: int) -> list[torch.Tensor]:
        """Pieces of at most ``size`` images; on a GPU of exactly that."""
        pieces = list(images.split(size))
        missing = size - len(pieces[-1])
        if self.on_gpu and missing:
            pieces[-1] = torch.cat([pieces[-1], images.new_zeros(missing, *images.shape[1:])])
        return pieces

    def _compute(self, pixels: Pixels) -> Sequence[torch.Tensor]:
        """On the device, of each image: its embedding and norm if there is an embedder; scores."""
        embeddings = norms = None
        outputs = []
        if self.embedder is not None:
            tower = self.embedder.tower(self.device)
            embeddings, norms = tower.with_norms(pixels[self.embedder.transform])
            outputs += [embeddings, norms]
        for classifier in self.classifiers:
            if isinstance(classifier, ImageClassifier):
                assert embeddings is not None
                outputs.append(classifier.score(embeddings, norms))
            elif isinstance(classifier, PixelClassifier):
                outputs.append(classifier.score(pixels[classifier.transform]))
        return outputs

    def _smaller(self, tried: int) -> int:
        """The size to try after this one did not fit."""
        if tried > self.fitting_batch_size:
            return self.fitting_batch_size  # another thread found it meanwhile
        half = (tried + 1) // 2
        if 1 < tried == self.fitting_batch_size:
            self.fitting_batch_size = half
            _log.warning(
                "%s has no memory for a batch of %d images, going on with %d",
                self.device, tried, half,
            )  # fmt: skip
        return half


def _with_number(device: str) -> str:
    """``cuda`` as tensors call it: ``cuda:0``, or whichever is the current one."""
    return str(torch.empty(0, device=device).device)
