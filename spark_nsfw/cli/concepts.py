"""``spark-nsfw concepts``: prompts → concepts that images are scored by."""

from __future__ import annotations

import argparse

from spark_nsfw.cli.arguments import Commands
from spark_nsfw.cli.exit_status import ExitStatus
from spark_nsfw.cli.parser import device

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("concepts", help="make concepts to score by, from prompts")
    build = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "build",
        help="run CLIP's text tower over prompts",
        description="Run CLIP's text tower once over prompts in your own words, and write a file "
        "of concepts that embeddings of the same CLIP are scored by. PROMPTS is YAML: a concept's "
        "name, then a list of prompts, whose mean direction it is; or `prompts:` with that list "
        "and `against:` with the name of the concept that it is weighed against.",
        epilog="Needs open_clip: pip install 'spark-nsfw[concepts]'. Scoring does not.",
    )
    build.add_argument("prompts", help="YAML file, a path or URL")
    build.add_argument("output", help="file to write, such as concepts.safetensors")
    build.add_argument(
        "--model",
        default="ViT-L-14-quickgelu",
        metavar="NAME",
        help="open_clip's name of the CLIP that the embeddings are from (default: %(default)s)",
    )
    build.add_argument(
        "--pretrained",
        default="openai",
        metavar="TAG",
        help="open_clip's tag of its weights, downloaded once (default: %(default)s)",
    )
    build.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="its weights in a file instead: open_clip's safetensors or PyTorch file, or "
        "OpenAI's ViT-L-14.pt; a path or URL",
    )
    build.add_argument(
        "--device", type=device, default="cpu", help="torch device (default: %(default)s)"
    )
    build.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> int:
    from spark_nsfw.score.prompts import build_concepts

    concepts = build_concepts(
        options.prompts,
        options.output,
        options.model,
        options.pretrained,
        options.checkpoint,
        options.device,
    )
    for concept in concepts:
        against = f" against {concept.against}" if concept.against else ""
        print(f"{concept.name}: {len(concept.prompts)} prompts{against}")
    return ExitStatus.DONE
