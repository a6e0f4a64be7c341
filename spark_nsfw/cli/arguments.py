"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_nsfw.errors import InputError

if TYPE_CHECKING:
    from spark_nsfw.score.detector import Detector

__all__ = ["DEFAULT_MODEL", "Commands", "add_detector_arguments", "detectors", "names"]

#: What `argparse.ArgumentParser.add_subparsers` returns.
if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction

DEFAULT_MODEL = "vit_large_patch14_clip_quickgelu_224.openai"


def add_detector_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose detectors and their weights."""
    group.add_argument(
        "--detector",
        action="append",
        metavar="NAME[=FILE]",
        help="laion (the default), aesthetic, q16, safety_checker, open_nsfw, marqo or freepik, "
        "with the file of its weights if they are not to be downloaded; multi_headed=DIR; "
        "concepts=FILE, see `spark-nsfw concepts build`; hf-hub:OWNER/NAME@LABEL for a timm model "
        "of the hub; MODULE:CLASS for one of your own. May be repeated: each adds its columns",
    )
    group.add_argument(
        "--nsfw-checkpoint",
        metavar="FILE",
        help="weights of the detector laion: LAION's zip, NeMo Curator's .pth, dataset2metadata's "
        "state dict or safetensors (default: LAION's, downloaded once)",
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
        help="short for one more --detector aesthetic: LAION-Aesthetics V2, into aesthetic_score",
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


def detectors(options: argparse.Namespace, **speed: Any) -> list[Detector[Any]]:
    """The detectors that `add_detector_arguments` chose.

    Args:
        options: the parsed arguments.
        speed: further arguments of detectors that see pixels.

    Raises:
        InputError: one of them does not exist.
    """
    from spark_nsfw.score.registry import detector_of
    from spark_nsfw.spark.worker import send_class_from

    # A class in the current directory is found like those that are installed …
    sys.path.append(str(Path.cwd()))
    chosen = list(options.detector or ["laion"])
    if options.nsfw_checkpoint and "laion" not in chosen:
        raise InputError(
            "--nsfw-checkpoint is for the detector laion without a file of its own: add "
            "--detector laion, or leave one of the two files out"
        )
    if options.aesthetic or options.aesthetic_checkpoint:
        chosen.append("aesthetic")
    paths = {"laion": options.nsfw_checkpoint, "aesthetic": options.aesthetic_checkpoint}
    made = [
        detector_of(
            name,
            models_dir=options.models,
            variant=options.nsfw_variant,
            model_path=paths.get(name),
            **speed,
        )
        for name in chosen
    ]
    for detector in made:
        send_class_from(detector, Path.cwd())  # … but not on the workers' machines
    return made


def names(text: str | None) -> tuple[str, ...] | None:
    """``a, b`` → (``a``, ``b``); None stays None."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())
