"""Detectors by the names that ``--detector`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from spark_nsfw.errors import InputError
from spark_nsfw.score.aesthetic import AestheticClassifier
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.concepts import ConceptClassifier
from spark_nsfw.score.detector import Detector
from spark_nsfw.score.multi_headed import MultiHeadedClassifier
from spark_nsfw.score.nsfw import NsfwClassifier
from spark_nsfw.score.open_nsfw import OpenNsfwClassifier
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.q16 import Q16Classifier
from spark_nsfw.score.safety_checker import SafetyCheckerClassifier
from spark_nsfw.score.timm_classifier import SHORT_NAMES, TimmImageClassifier

__all__ = ["DETECTOR_NAMES", "detector_of"]

#: Name → what makes it, of ``model_path`` and what else it takes of ``models_dir``, ``variant``.
_KNOWN: dict[str, Callable[..., Detector[Any]]] = {
    "laion": NsfwClassifier,
    "aesthetic": AestheticClassifier,
    "q16": Q16Classifier,
    "safety_checker": SafetyCheckerClassifier,
    "multi_headed": MultiHeadedClassifier,
    "concepts": ConceptClassifier,
    "open_nsfw": OpenNsfwClassifier,
    **{
        short: partial(TimmImageClassifier, model_name, pred_column=f"{short}_score")
        for short, model_name in SHORT_NAMES.items()
    },
}

#: All names; ``multi_headed`` and ``concepts`` need the file of their weights.
DETECTOR_NAMES = tuple(_KNOWN)


def detector_of(text: str, **options: Any) -> Detector[Any]:
    """The detector that a user named.

    Args:
        text: ``NAME``, ``NAME=FILE`` with the file of its weights,
            ``hf-hub:OWNER/NAME@LABEL`` or ``…@LABEL+LABEL=FILE`` for a timm model of the hub,
            or ``MODULE:CLASS`` for a class of one's own.
        options: ``models_dir``, ``variant``, ``model_path`` where ``text`` has none, and how
            pixels are scored; each detector gets those that it takes.

    Raises:
        InputError: there is no such detector, or a class that is none.
    """
    name, _, model_path = text.partition("=")
    if name.startswith("hf-hub:"):
        repository, _, labels = name.partition("@")
        label = labels.split("+") if labels else None
        make: Callable[..., Detector[Any]] = partial(TimmImageClassifier, repository, label)
    elif ":" in name:
        make = _class_of(name)
    elif name in _KNOWN:
        make = _KNOWN[name]
    else:
        close = get_close_matches(name, DETECTOR_NAMES, n=1)
        raise InputError(
            f"there is no detector {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
            + f" There are {', '.join(DETECTOR_NAMES)}, hf-hub:OWNER/NAME@LABEL for a timm model "
            "of the hub, and MODULE:CLASS for one of your own"
        )
    taken = inspect.signature(make).parameters
    given = {key: value for key, value in options.items() if key in taken}
    if "num_threads_per_worker" not in taken:
        given.pop("batch_size", None)  # theirs is of embeddings
    if model_path:
        given["model_path"] = model_path
    elif isinstance(make, partial) and options.get("models_dir"):
        raise InputError(
            "--models has no files of timm's classifiers: give this one's with "
            f"--detector {name}=FILE"
        )
    try:
        return make(**given)
    except TypeError as exc:
        raise InputError(f"--detector {text}: {exc}") from exc


def _class_of(name: str) -> type[Detector[Any]]:
    """``package.module:Class`` → that class.

    Raises:
        InputError: it cannot be imported, or is no detector.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError) as exc:
        raise InputError(
            f"--detector {name}: {exc}; looked in {Path.cwd()} and where packages are installed"
        ) from exc
    found = getattr(module, attribute, None)
    if found is None:
        close = get_close_matches(attribute, vars(module), n=1)
        raise InputError(
            f"--detector {name}: {module_name} has no class {attribute!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if not (isinstance(found, type) and issubclass(found, (ImageClassifier, PixelClassifier))):
        raise InputError(
            f"--detector {name}: a detector is a subclass of spark_nsfw.ImageClassifier or "
            f"spark_nsfw.PixelClassifier, not {found!r}"
        )
    return found
