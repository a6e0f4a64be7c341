"""A note → which models made the rows, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "ModelNote",
    "detector_of",
    "detector_words",
    "lacks_tower",
    "models_of",
    "random_models",
    "random_words",
    "tower_words",
]

#: What of a model's entry `ModelNote` has an attribute for.
_NAMED = ("classifier", "model_name", "variant", "pred_column", "weights")

_SHORT_SHA256 = 12


@dataclass(frozen=True)
class ModelNote:
    """What a note says of one model.

    Attributes:
        role: ``tower`` or ``detector``.
        name: the tower's name, or the detector's class and variant.
        column: that its scores go to; None for a tower, or if unknown.
        source: where its weights came from.
        sha256: of their file; None if they are from no file, or it is not known.
        is_random: whether the weights are random, so that its results mean nothing.
        options: all else that the note says of it.
    """

    role: str
    name: str
    column: str | None = None
    source: str = "unknown"
    sha256: str | None = None
    is_random: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_weights(self) -> str:
        """Where the weights came from, and the beginning of their sha256."""
        return self.source + (f", sha256 {self.sha256[:_SHORT_SHA256]}…" if self.sha256 else "")


def models_of(note: Mapping[str, Any]) -> list[ModelNote]:
    """The tower, if the note names one, and the detectors."""
    models = []
    embedder = note.get("embedder")
    if embedder:
        models.append(_model("tower", embedder.get("model_name", "unknown"), embedder))
    for entry in note.get("classifiers", []):
        name = " ".join(filter(None, [entry.get("classifier", "unknown"), entry.get("variant")]))
        models.append(_model("detector", name, entry))
    return models


def lacks_tower(models: Sequence[ModelNote]) -> bool:
    """Whether embeddings were scored, and the note does not say what made them."""
    if any(model.role == "tower" for model in models):
        return False
    # Only detectors that see pixels describe their preprocessing.
    return not models or any("preprocessing" not in model.options for model in models)


def detector_of(note: Mapping[str, Any], column: str) -> ModelNote | None:
    """The detector whose scores are in this column; None if the note does not tell."""
    detectors = [model for model in models_of(note) if model.role == "detector"]
    for detector in detectors:
        if column == detector.column or column in detector.options.get("columns", ()):
            return detector
    return None


def random_models(note: Mapping[str, Any]) -> list[str]:
    """The models whose weights are random, such as ``the tower test_vit2``."""
    return [f"the {model.role} {model.name}" for model in models_of(note) if model.is_random]


def _model(role: str, name: str, entry: Mapping[str, Any]) -> ModelNote:
    weights = entry.get("weights") or {}
    source = str(weights.get("source", "unknown" if "weights" in entry else "no file of weights"))
    return ModelNote(
        role=role,
        name=name,
        column=entry.get("pred_column"),
        source=source,
        sha256=weights.get("sha256"),
        is_random="weights" in entry
        and not weights.get("sha256")
        and (role == "tower" or source.startswith("random")),
        options={key: value for key, value in entry.items() if key not in _NAMED},
    )


def detector_words(notes: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The detectors that made a column's scores, one for each way in which rows were made."""
    found = [detector_of(note, column) for note in notes]
    return _each_once(None if model is None else _in_words(model) for model in found)


def tower_words(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The towers that made the embeddings; empty if no note names one."""
    models = [model for note in notes for model in models_of(note) if model.role == "tower"]
    return _each_once(_in_words(model) for model in models)


def random_words(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models whose weights are random, in any of the ways."""
    return _each_once(model for note in notes for model in random_models(note))


def _in_words(model: ModelNote) -> str:
    source = model.source
    if "://" not in source:
        source = source.rpartition("/")[2]  # where a file lay does not tell which it is
    weights = replace(model, source=source).short_weights
    return f"{model.name} (weights: {weights})"


def _each_once(words: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word is not None))
