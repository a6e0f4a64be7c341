"""Concepts in anybody's own words: image_embedding → how near to each.

A file of concepts is safetensors with one tensor ``concepts`` (C, D), unit vectors of CLIP's
text tower, and says in its header what they are; `spark_nsfw.score.prompts` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save
from torch import nn

from spark_nsfw.errors import (
    InputError,
    WeightsError,
    WeightsUnavailableError,
)
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.tensor_ranges import read_header

__all__ = ["Concept", "ConceptClassifier", "concept_file", "refuse_bad_concepts"]

_TENSOR = "concepts"

#: CLIP's own, by which it multiplies cosines before a softmax.
_LOGIT_SCALE = 100.0

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Concept:
    """Something that images may show.

    Attributes:
        name: letters, digits and underscores; begins the names of its columns.
        prompts: texts whose mean direction it is.
        against: the name of the concept that it is weighed against; None for none.
    """

    name: str
    prompts: tuple[str, ...]
    against: str | None = None


def refuse_bad_concepts(source: str, concepts: Sequence[Concept]) -> None:
    """Refuse concepts that cannot become columns.

    Raises:
        InputError: names the concept, and what is wrong with it.
    """
    if not concepts:
        raise InputError(f"{source} has no concepts")
    names = [concept.name for concept in concepts]
    for concept in concepts:
        where = f"{source}: concept {concept.name!r}"
        if not _NAME.fullmatch(concept.name):
            raise InputError(f"{where}: a name is of letters, digits and underscores")
        if not concept.prompts:
            raise InputError(f"{where} has no prompts")
        if concept.against is not None and concept.against not in names:
            raise InputError(
                f"{where} is weighed against {concept.against!r}, which is not there; "
                f"there are {', '.join(names)}"
            )
        if concept.against == concept.name:
            raise InputError(f"{where} is weighed against itself")
    columns = _columns(concepts)
    repeated = {column for column in columns
                if [c.casefold() for c in columns].count(column.casefold()) > 1}  # fmt: skip
    if repeated:  # Spark ignores their case
        raise InputError(f"{source}: two concepts would have one column: {', '.join(repeated)}")


def _columns(concepts: Sequence[Concept]) -> list[str]:
    similarities = [f"{concept.name}_similarity" for concept in concepts]
    return similarities + [f"{concept.name}_score" for concept in concepts if concept.against]


def concept_file(
    concepts: Sequence[Concept], vectors: torch.Tensor, text_tower: dict[str, Any]
) -> bytes:
    """The content of a file of concepts.

    Args:
        concepts: C of them.
        vectors: float32 (C, D), of unit length.
        text_tower: what made them, as plain JSON types.
    """
    listed = [
        {"name": each.name, "prompts": list(each.prompts), "against": each.against}
        for each in concepts
    ]
    # One entry only: safetensors writes several in any order, and so another file each time.
    note = json.dumps({"concepts": listed, "text_tower": text_tower}, sort_keys=True)
    return bytes(save({_TENSOR: vectors.to(torch.float32).contiguous()}, {_TENSOR: note}))


class ConceptClassifier(ImageClassifier):
    """How near images are to concepts that `spark-nsfw concepts build` made of prompts.

    A column ``{name}_similarity`` for each concept, the cosine of its text and the image
    (CLIP's lie around 0.1 to 0.3); and where it is weighed against another concept a column
    ``{name}_score``, their softmax: 0 to 1, 1 = this one rather than the other.

    Args:
        embedding_column: the column that stored embeddings are read from.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: the file of concepts, a path or URL; its header is read at once.
        models_dir: directory or URL with ``concepts.safetensors``, where there is no
            ``model_path``.
        prefix: put before each column's name, so that two files can be used together.

    Attributes:
        concepts: those of the file, in its order.
        text_tower: what made them.

    Raises:
        WeightsError: the file cannot be read, or is another.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
        prefix: str = "",
    ) -> None:
        if model_path is None and models_dir is not None:
            model_path = f"{models_dir.rstrip('/')}/concepts.safetensors"
        if model_path is None:
            raise WeightsUnavailableError(
                "ConceptClassifier needs model_path (--detector concepts=FILE): make that file "
                "with `spark-nsfw concepts build`"
            )
        header = read_header(model_path)
        try:
            note = json.loads(header.metadata[_TENSOR])
            concepts = tuple(
                Concept(entry["name"], tuple(entry["prompts"]), entry["against"])
                for entry in note["concepts"]
            )
            num_concepts, embedding_size = map(int, header.tensors[_TENSOR]["shape"])
            refuse_bad_concepts(model_path, concepts)
            if num_concepts != len(concepts):
                raise ValueError(f"{num_concepts} vectors for {len(concepts)} concepts")
            self.text_tower: dict[str, Any] = note["text_tower"]
        except (ValueError, KeyError, TypeError) as exc:
            raise WeightsError(
                f"{model_path} was not written by `spark-nsfw concepts build`: {exc!r}"
            ) from exc
        self.concepts = concepts
        self._note: str = header.metadata[_TENSOR]
        self._columns = [prefix + column for column in _columns(concepts)]
        super().__init__(
            "concepts",
            embedding_column,
            self._columns[0],
            batch_size=batch_size,
            embedding_size=embedding_size,
            model_path=model_path,
            models_dir=models_dir,
        )

    @property
    def result_fields(self) -> list[pa.Field]:
        """A similarity per concept, then a score per concept that is weighed against another."""
        return [pa.field(column, pa.float32()) for column in self._columns]

    def describe(self) -> dict[str, Any]:
        """The columns, every concept with its prompts, and what made them."""
        described = super().describe()
        described["text_tower"] = self.text_tower
        described["concepts"] = {
            concept.name: {"prompts": list(concept.prompts), "against": concept.against}
            for concept in self.concepts
        }
        return described

    def load_model(self, device: str) -> nn.Module:
        """One matrix: float32 (N, D) → float32 (N, columns).

        Raises:
            WeightsError: the file cannot be had, or is not the one whose header was read.
        """
        path = str(self.weights_file())
        if read_header(path).metadata.get(_TENSOR) != self._note:
            raise WeightsError(f"{self.model_path} has other concepts or prompts than at first")
        vectors = self.load_weights().get(_TENSOR)
        shape = (len(self.concepts), self.embedding_size)
        if vectors is None or tuple(vectors.shape) != shape or not torch.isfinite(vectors).all():
            raise WeightsError(f"{self.model_path} does not hold {shape} finite numbers")
        return _Concepts(self.concepts, vectors).eval().requires_grad_(False).to(device)


class _Concepts(nn.Module):
    """Cosines, and a softmax of two as the sigmoid of their scaled difference."""

    def __init__(self, concepts: Sequence[Concept], vectors: torch.Tensor) -> None:
        super().__init__()
        self.num_concepts = len(concepts)
        unit = nn.functional.normalize(vectors.to(torch.float64), dim=1)
        names = [concept.name for concept in concepts]
        differences = [
            _LOGIT_SCALE * (unit[row] - unit[names.index(concept.against)])
            for row, concept in enumerate(concepts)
            if concept.against
        ]
        self.register_buffer("rows", torch.stack([*unit, *differences]).to(torch.float32))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        found = nn.functional.normalize(embeddings, dim=1) @ self.get_buffer("rows").T
        similarities, logits = found[:, : self.num_concepts], found[:, self.num_concepts :]
        return torch.cat([similarities, torch.sigmoid(logits)], dim=1)
