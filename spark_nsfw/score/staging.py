"""A directory with every weight file that a cluster without internet needs.

::

    models/
    ├── SHA256SUMS                                           # `sha256sum -c` checks them
    ├── clip_autokeras_binary_nsfw.zip                       # LAION's detectors
    ├── clip_autokeras_nsfw_b32.zip
    └── vit_large_patch14_clip_quickgelu_224.openai.safetensors   # timm's towers
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from spark_nsfw.errors import WeightsUnavailableError
from spark_nsfw.score.download import PublishedFile, download, file_sha256, hub_file
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.storage import open_input

__all__ = ["fetch_models", "staged_file"]

_CHECKSUMS = "SHA256SUMS"


def fetch_models(
    directory: str | Path,
    model_names: Sequence[str],
    report: Callable[[str], None] = print,
    others: Sequence[PublishedFile] = (),
) -> None:
    """Fetch towers and detectors, and write their checksums beside them.

    Args:
        directory: is made if it is not there; files in it are replaced.
        model_names: timm's towers.
        report: is given a line per file.
        others: weights of further classifiers.

    Raises:
        WeightsUnavailableError: a file cannot be fetched.
        ChecksumError: a file is not the one that was published.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [download(d.url, d.file_name, d.sha256) for d in DETECTORS.values()]
    files += [download(other.url, other.file_name, other.sha256) for other in others]
    targets = [(path, path.name) for path in files]
    for name in model_names:
        path = Path(hub_file(name))
        targets.append((path, name + path.suffix))
    sums = _read_checksums(str(directory)) if (directory / _CHECKSUMS).exists() else {}
    for path, target in targets:
        partial = directory / f".{target}.partial"
        shutil.copyfile(path, partial)
        partial.replace(directory / target)
        sums[target] = file_sha256(directory / target)
        report(f"{sums[target]}  {target}")
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())]
    (directory / _CHECKSUMS).write_text("".join(lines))


def staged_file(directory: str, name: str) -> tuple[str, str]:
    """A file of a staged directory: its path or URL, and the sha256 it must have.

    Args:
        directory: a path or URL.
        name: of the file, or of a tower, whose file has an ending besides.

    Raises:
        WeightsUnavailableError: the directory or the file is not there.
    """
    sums = _read_checksums(directory)
    for target, sha256 in sums.items():
        if target == name or target.rpartition(".")[0] == name:
            return f"{directory.rstrip('/')}/{target}", sha256
    raise WeightsUnavailableError(
        f"{directory} has no {name}, only {', '.join(sums)}; "
        "`spark-nsfw models fetch` puts more towers there with --model"
    )


def _read_checksums(directory: str) -> dict[str, str]:
    url = f"{directory.rstrip('/')}/{_CHECKSUMS}"
    try:
        with open_input(url) as stream:
            lines = stream.read().decode().splitlines()
    except OSError as exc:
        raise WeightsUnavailableError(
            f"{url} cannot be read ({exc}); make the directory with `spark-nsfw models fetch`"
        ) from exc
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
