"""What is computed of an image or of a stored embedding, as one value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.schema import CONTRACT_COLUMNS, EMBEDDING_NORM
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.describing import code_sha256, is_foreign
from spark_nsfw.score.detector import Detector
from spark_nsfw.score.embedder import ImageEmbedder
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.pixels import Transform

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Which embeddings and scores are computed, on what device, into which columns.

    Its properties and `describe` load nothing and look at no file; only `ready` does.

    Attributes:
        embedder: the CLIP tower; None where embeddings are stored and only scored, and where
            all detectors look at pixels.
        classifiers: `ImageClassifier` on embeddings, `PixelClassifier` on pixels; each gives
            its columns.
        device: a torch device; None takes the task's GPU, else the CPU.
        keep_embeddings: whether the embeddings are a result, too.
        embedding_column: the embeddings' column; an embedder's own where there is one.
        embedding_size: width D of the embeddings; known once it is `ready`.
        keep_norms: whether the norm of each projection goes along with its embedding.

    Raises:
        InputError: two results would go to one column, or a classifier of embeddings stands
            beside one of pixels without an embedder.
    """

    embedder: ImageEmbedder | None
    classifiers: tuple[Detector[Any], ...]
    device: str | None = None
    keep_embeddings: bool = True
    embedding_column: str = "image_embedding"
    embedding_size: int | None = None
    keep_norms: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "classifiers", tuple(self.classifiers))
        for each in self.classifiers:
            if not isinstance(each, (ImageClassifier, PixelClassifier)):
                raise InputError(
                    f"{type(each).__name__} is neither an ImageClassifier nor a PixelClassifier"
                )
        if self.embedder is not None:
            column = self.embedder.image_embedding_column
            object.__setattr__(self, "embedding_column", column)
        if self.embedder is None and self.heads and self.pixel_classifiers:
            raise InputError(
                f"{type(self.heads[0]).__name__} scores embeddings and "
                f"{type(self.pixel_classifiers[0]).__name__} pixels: give an embedder for the first"
            )
        names = [self.embedding_column, *self.score_columns]
        if self.embedder is not None:
            names.append(EMBEDDING_NORM)
        contract = [name for name in names if name.casefold() in CONTRACT_COLUMNS]
        if contract:
            raise InputError(
                f"a result cannot replace the column {contract[0]}: choose another pred_column"
            )
        if len({name.casefold() for name in names}) < len(names):  # Spark ignores their case
            raise InputError(f"two results would go to one column: {', '.join(names)}")

    @classmethod
    def of(
        cls,
        embedder: ImageEmbedder | None,
        classifiers: Sequence[Detector[Any]] | None = None,
        *,
        device: str | None = None,
        keep_embeddings: bool = True,
    ) -> Recipe:
        """A recipe of an embedder and its own classifiers, unless others are given.

        Args:
            embedder: None scores pixels, or stored embeddings of the classifiers'
                ``embedding_column``.
            classifiers: None takes the embedder's own.
            device: a torch device; None takes the task's GPU, else the CPU.
            keep_embeddings: whether the embeddings are a result, too.

        Raises:
            InputError: there is nothing to compute, two results would go to one column,
                or the classifiers read stored embeddings of two columns.
        """
        if embedder is not None:
            chosen = embedder.classifiers if classifiers is None else classifiers
            return cls(embedder, tuple(chosen), device, keep_embeddings)
        if not classifiers:
            raise InputError("nothing to compute: give an embedder, or classifiers")
        heads = [each for each in classifiers if isinstance(each, ImageClassifier)]
        columns = sorted({classifier.embedding_column for classifier in heads})
        if len(columns) > 1:
            raise InputError(
                f"the classifiers read embeddings of several columns, {', '.join(columns)}: "
                "score one column at a time"
            )
        column = columns[0] if columns else "image_embedding"
        return cls(None, tuple(classifiers), device, keep_embeddings, embedding_column=column)

    @property
    def heads(self) -> tuple[ImageClassifier, ...]:
        """The classifiers that score embeddings."""
        return tuple(each for each in self.classifiers if isinstance(each, ImageClassifier))

    @property
    def pixel_classifiers(self) -> tuple[PixelClassifier, ...]:
        """The classifiers that score pixels."""
        return tuple(each for each in self.classifiers if isinstance(each, PixelClassifier))

    @property
    def reads_images(self) -> bool:
        """Whether it is about images, rather than stored embeddings."""
        return self.embedder is not None or bool(self.pixel_classifiers)

    @property
    def transforms(self) -> list[Transform]:
        """Of the models that look at an image, each once."""
        own = [] if self.embedder is None else [self.embedder.transform]
        return list(dict.fromkeys(own + [each.transform for each in self.pixel_classifiers]))

    @property
    def batch_size(self) -> int | None:
        """Images per forward pass: the embedder's, else the least of the classifiers', if any."""
        if self.embedder is not None:
            return self.embedder.batch_size
        given = [each.batch_size for each in self.pixel_classifiers if each.batch_size is not None]
        return min(given, default=None)

    @property
    def num_threads(self) -> int | None:
        """Threads that decode images: the embedder's, else the most of the classifiers', if any."""
        if self.embedder is not None:
            return self.embedder.num_threads_per_worker
        threads = [each.num_threads_per_worker for each in self.pixel_classifiers]
        return max((number for number in threads if number is not None), default=None)

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that it adds: the embedding and its norm if kept, then the classifiers'."""
        fields = []
        if self.keep_embeddings and (self.embedder is not None or not self.reads_images):
            fields.append(pa.field(self.embedding_column, pa.list_(pa.float32())))
        if self.keep_embeddings and self.embedder is not None and self.keep_norms:
            fields.append(pa.field(EMBEDDING_NORM, pa.float32()))
        return fields + [field for each in self.classifiers for field in each.result_fields]

    @property
    def result_columns(self) -> list[str]:
        """The names of `result_fields`."""
        return [field.name for field in self.result_fields]

    @property
    def score_columns(self) -> list[str]:
        """The classifiers' columns."""
        return [name for each in self.classifiers for name in each.result_columns]

    @property
    def is_ready(self) -> bool:
        """Whether all weights were found and their sha256 is known."""
        tower_is = self.embedder is None or self.embedder.is_ready
        return tower_is and all(classifier.is_ready for classifier in self.classifiers)

    def ready(self, *, device: str | None = None, embedding_size: int | None = None) -> Recipe:
        """A recipe whose weights are found, downloaded if need be, and known by their sha256.

        To be called once, on the driver: what does not fit is refused there, before any
        task starts, and workers check their own copies of the files against the sha256.

        Args:
            device: what the workers compute on, ``cpu`` or ``cuda``; settles the tower's
                precision. None takes this recipe's device; where that is None, too, each
                worker computes in the precision of its own device.
            embedding_size: width D of stored embeddings, where there is no embedder. None
                takes this recipe's own.

        Raises:
            EmbeddingWidthError: a classifier takes embeddings of another width.
            WeightsError: a file cannot be had or used.
            InputError: the width of stored embeddings is not given.
        """
        embedding_size = embedding_size or self.embedding_size
        if self.embedder is not None:
            if embedding_size not in (None, self.embedder.embedding_size):
                raise EmbeddingWidthError(
                    f"{self.embedder.model_name} gives embeddings of width "
                    f"{self.embedder.embedding_size}, not {embedding_size}"
                )
            embedding_size = self.embedder.embedding_size
        if embedding_size is None and self.heads:
            raise InputError("give the width of the stored embeddings (embedding_size)")
        device = _more_exact(self.device, device)
        return replace(
            self,
            embedder=None if self.embedder is None else self.embedder.ready(device),
            classifiers=self._ready_classifiers(embedding_size, device),
            device=device,
            embedding_size=embedding_size,
        )

    def with_ready_classifiers(self) -> Recipe:
        """As `ready`, but for the embedder's file, which is not looked at before it loads.

        Raises:
            EmbeddingWidthError: a classifier takes embeddings of another width.
            WeightsError: a file cannot be had or used.
        """
        width = None if self.embedder is None else self.embedder.embedding_size
        return replace(self, classifiers=self._ready_classifiers(width, self.device))

    def _ready_classifiers(
        self, embedding_size: int | None, device: str | None
    ) -> tuple[Detector[Any], ...]:
        ready: list[Detector[Any]] = []
        for each in self.classifiers:
            if isinstance(each, ImageClassifier):
                assert embedding_size is not None
                ready.append(each.for_embedding_size(embedding_size))
            elif isinstance(each, PixelClassifier):
                ready.append(each.ready(device))
        return tuple(ready)

    def describe(self) -> dict[str, Any]:
        """What the output's note says of it, as plain JSON types.

        ``embedder`` is left out where there is none. A sha256 is None until `ready`.
        """
        described: dict[str, Any] = {
            "classifiers": [_described(classifier) for classifier in self.classifiers],
            "rows": {"keep_embeddings": self.keep_embeddings},
        }
        if self.embedder is not None:
            described = {"embedder": _described(self.embedder)} | described
        return described

    @property
    def identity(self) -> str:
        """What a loaded scorer is known by in a worker: JSON of all that it computes.

        The same file is the same weights, wherever it lies. The device is not part of it.
        """
        settings: dict[str, Any] = {
            "classifiers": [_without_sources(each.describe()) for each in self.classifiers],
            "columns": [str(field) for field in self.result_fields],
        }
        if self.embedder is not None:
            settings["embedder"] = _without_sources(self.embedder.describe())
        if self.reads_images:
            settings["batch_size"], settings["num_threads"] = self.batch_size, self.num_threads
        else:
            settings["embedding_size"] = self.embedding_size
        return json.dumps(settings, sort_keys=True)


def _described(model: Detector[Any] | ImageEmbedder) -> dict[str, Any]:
    """A model's own description, its columns where there are several, and a user's own code.

    The code is looked at once the model is ready, like its weights.
    """
    described = dict(model.describe())
    if isinstance(model, Detector) and model.result_columns != [model.pred_column]:
        described["columns"] = model.result_columns
    if is_foreign(model) and model.is_ready:
        described["code_sha256"] = code_sha256(model)
    return described


def _more_exact(own: str | None, given: str | None) -> str | None:
    """``cuda:1`` rather than ``cuda``, if it is not about another kind of device."""
    if own is None or given is None:
        return given or own
    return own if torch.device(own).type == torch.device(given).type else given


def _without_sources(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_sources(entry)
            for name, entry in value.items()
            if name != "source" or value.get("sha256") is None
        }
    return [_without_sources(entry) for entry in value] if isinstance(value, list) else value
