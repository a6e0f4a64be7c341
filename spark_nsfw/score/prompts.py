"""prompts.yaml → concepts.safetensors, with CLIP's text tower.

::

    weapon:
      prompts: [a photo of a gun, a photo of a knife]
      against: everyday
    everyday: [a photo of an everyday object]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spark_nsfw.errors import InputError, WeightsUnavailableError
from spark_nsfw.files import write_file
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.concepts import Concept, concept_file, refuse_bad_concepts
from spark_nsfw.score.download import file_sha256, local_file
from spark_nsfw.storage import open_input

__all__ = ["build_concepts", "parse_prompts"]

_SHAPE_HINT = "a concept is a list of prompts, or has `prompts:` and `against:`"

#: Tensors of a CLIP checkpoint that are not the text tower's.
_NOT_TEXT = ("visual.", "logit_scale", "logit_bias", "input_resolution", "context_length",
             "vocab_size")  # fmt: skip

#: The smallest that open_clip makes: the real one would cost a gigabyte, and is not used.
_NO_IMAGE_TOWER = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}


def parse_prompts(text: str, source: str) -> list[Concept]:
    """The concepts of a YAML text.

    Args:
        text: concept name → list of prompts, or → ``prompts`` and ``against``.
        source: what errors call it.

    Raises:
        InputError: it is no YAML, or not of this form, or its concepts cannot become columns.
    """
    parsed = _load_yaml(text, source)
    if not isinstance(parsed, dict):
        raise InputError(f"{source} has no concepts: {_SHAPE_HINT}")
    concepts = []
    for name, entry in parsed.items():
        if not isinstance(name, str):
            raise InputError(f"{source}: {name!r} is not a name; write it in quotes")
        whole = {"prompts": entry} if isinstance(entry, list) else entry
        if not isinstance(whole, dict) or not {"prompts"} <= set(whole) <= {"prompts", "against"}:
            raise InputError(f"{source}: concept {name!r} is not understood: {_SHAPE_HINT}")
        prompts, against = whole["prompts"], whole.get("against")
        texts = isinstance(prompts, list) and all(isinstance(p, str) and p.strip() for p in prompts)
        if not texts:
            raise InputError(
                f"{source}: concept {name!r}: prompts are a list of texts, not {prompts!r}; "
                "write numbers, yes and no in quotes"
            )
        if against is not None and not isinstance(against, str):
            raise InputError(f"{source}: concept {name!r}: `against:` names one concept")
        concepts.append(Concept(name, tuple(prompts), against))
    refuse_bad_concepts(source, concepts)
    return concepts


def _load_yaml(text: str, source: str) -> Any:
    """Plain data of a YAML text.

    Raises:
        InputError: it is no YAML, or gives a key twice.
    """
    try:
        import yaml
    except ImportError as exc:
        raise _no_extra(exc) from exc

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is given twice, of which YAML's own would keep the last."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = [(loader.construct_object(key, deep=True), value) for key, value in node.value]
        keys = [key for key, _ in pairs]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise InputError(f"{source} has {key!r} twice")
        return {key: loader.construct_object(value, deep=True) for key, value in pairs}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # it is a SafeLoader
    except (yaml.YAMLError, TypeError) as exc:
        raise InputError(f"{source} is not YAML: {exc}") from exc


def build_concepts(
    prompts: str,
    output: str,
    model_name: str = "ViT-L-14-quickgelu",
    pretrained: str = "openai",
    checkpoint_path: str | None = None,
    device: str = "cpu",
) -> list[Concept]:
    """Write a file of concepts, and return them.

    A concept's vector is made as open_clip makes its zero-shot classifiers: the unit vectors
    of its prompts, their mean, at unit length.

    Args:
        prompts: a YAML file, see `parse_prompts`; a path or URL.
        output: the file to write; a path or URL. One that is there is replaced.
        model_name: of open_clip; the CLIP whose image tower the embeddings come from.
        pretrained: open_clip's tag of its weights.
        checkpoint_path: its weights in a file instead, a path or URL: open_clip's or
            OpenAI's.
        device: a torch device.

    Raises:
        InputError: the prompts or the model's name cannot work.
        WeightsError: the weights cannot be had, or do not fit.
        StorageError: a file cannot be read or written now.
    """
    try:
        with open_input(prompts) as stream:
            text = stream.read().decode()
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise InputError(f"{prompts} cannot be read: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{prompts} is not UTF-8 text: {exc}") from exc
    concepts = parse_prompts(text, prompts)
    path = checkpoint_path or _pretrained_file(model_name, pretrained)
    tower = _text_tower(model_name, path).to(device)
    vectors = _vectors(tower, model_name, concepts, device)
    made_by = {
        "model": model_name,
        "weights": {
            "source": checkpoint_path or f"{model_name}/{pretrained}",
            "sha256": file_sha256(local_file(path)),
        },
    }
    write_file(output, concept_file(concepts, vectors, made_by))
    return concepts


def _pretrained_file(model_name: str, tag: str) -> str:
    """The weights that open_clip knows by this tag, downloaded if they must be.

    Raises:
        InputError: it knows none.
        WeightsUnavailableError: they cannot be fetched.
    """
    open_clip = _open_clip()
    config = open_clip.get_pretrained_cfg(model_name, tag)
    if not config:
        known = open_clip.list_pretrained_tags_by_model(model_name)
        raise InputError(
            f"open_clip has no weights {tag!r} for {model_name!r}; "
            f"there are {', '.join(known) or 'none'}"
        )
    activation = (open_clip.get_model_config(model_name) or {}).get("quick_gelu", False)
    if config.get("quick_gelu", False) != activation:
        raise InputError(
            f"the weights {tag!r} were not trained with the activation of {model_name}: "
            f"use {model_name}-quickgelu, or without this ending"
        )
    try:
        return str(open_clip.download_pretrained(config))
    except Exception as exc:  # the hub's client raises many kinds
        raise WeightsUnavailableError(
            f"the weights {tag!r} of {model_name} cannot be fetched ({exc}); "
            "fetch them elsewhere, and give the file with --checkpoint (checkpoint_path)"
        ) from exc


def _text_tower(model_name: str, path: str) -> Any:
    """Open_clip's model, with the text tower's weights and no image tower.

    Raises:
        InputError: open_clip has no such model, or its text tower is no CLIP's.
        WeightsError: the file cannot be had, or does not fit.
    """
    open_clip = _open_clip()
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise InputError(f"open_clip has no model {model_name!r}")
    if "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
        raise InputError(f"the text tower of {model_name} is not CLIP's and cannot be used here")
    file = local_file(path)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**config | {"vision_cfg": _NO_IMAGE_TOWER})
    del model.visual
    loaded = load_state_dict(file)
    found = {
        short: tensor
        for short, tensor in ((name.removeprefix("module."), t) for name, t in loaded.items())
        if not short.startswith(_NOT_TEXT)
    }
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(_NOT_TEXT)
    }
    check_fit(path, found, expected)
    model.load_state_dict(found, strict=False)
    return model.eval().requires_grad_(False)


def _vectors(tower: Any, model_name: str, concepts: Sequence[Concept], device: str) -> torch.Tensor:
    """A unit vector per concept: float32 (C, D), on the CPU."""
    tokenize = _open_clip().get_tokenizer(model_name)
    vectors = []
    with torch.inference_mode():
        for concept in concepts:
            embedded = tower.encode_text(tokenize(list(concept.prompts)).to(device), normalize=True)
            mean = embedded.to(torch.float32).mean(dim=0)
            vectors.append((mean / mean.norm()).cpu())
    return torch.stack(vectors)


def _open_clip() -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import open_clip
    except ImportError as exc:
        raise _no_extra(exc) from exc
    return open_clip


def _no_extra(exc: ImportError) -> InputError:
    return InputError(f"{exc.name} is not installed: pip install 'spark-nsfw[concepts]'")
