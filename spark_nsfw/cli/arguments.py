"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spark_nsfw.score.classifier import ImageClassifier

__all__ = ["DEFAULT_MODEL", "Commands", "add_classifier_arguments", "classifiers", "names"]

#: What `argparse.ArgumentParser.add_subparsers` returns.
if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction

DEFAULT_MODEL = "vit_large_patch14_clip_quickgelu_224.openai"


def add_classifier_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose classifiers and their weights."""
    group.add_argument(
        "--nsfw-checkpoint",
        metavar="FILE",
        help="detector: LAION's zip, NeMo Curator's .pth, dataset2metadata's state dict or "
        "safetensors (default: LAION's, downloaded once)",
    )
    group.add_argument(
        "--nsfw-variant",
        choices=["torch", "laion"],
        default="torch",
        help="torch: the scores of NeMo Curator and DataComp; laion: those of LAION's "
        "TensorFlow model (default: %(default)s)",
    )
    group.add_argument(
        "--aesthetic",
        action="store_true",
        help="also score with LAION-Aesthetics V2, into aesthetic_score (ViT-L/14 only)",
    )
    group.add_argument(
        "--aesthetic-checkpoint",
        metavar="FILE",
        help="its sac+logos+ava1-l14-linearMSE.pth (default: downloaded once)",
    )
    group.add_argument(
        "--models",
        metavar="DIR",
        help="take weights from a directory or URL that `spark-nsfw models fetch` filled, not "
        "from the internet",
    )


def classifiers(options: argparse.Namespace) -> list[ImageClassifier]:
    """The classifiers that `add_classifier_arguments` chose."""
    from spark_nsfw.score.aesthetic import AestheticClassifier
    from spark_nsfw.score.nsfw import NsfwClassifier

    chosen: list[ImageClassifier] = [
        NsfwClassifier(
            model_path=options.nsfw_checkpoint,
            variant=options.nsfw_variant,
            models_dir=options.models,
        )
    ]
    if options.aesthetic or options.aesthetic_checkpoint:
        chosen.append(
            AestheticClassifier(model_path=options.aesthetic_checkpoint, models_dir=options.models)
        )
    return chosen


def names(text: str | None) -> tuple[str, ...] | None:
    """``a, b`` → (``a``, ``b``); None stays None."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())
