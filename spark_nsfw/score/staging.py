"""A directory with every weight file that a cluster without internet needs.

::

    models/
    ├── SHA256SUMS                                           # `sha256sum -c` checks them
    ├── clip_autokeras_binary_nsfw.zip                       # LAION's detectors
    ├── clip_autokeras_nsfw_b32.zip
    └── vit_large_patch14_clip_quickgelu_224.openai.safetensors   # timm's towers
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spark_nsfw.errors import InputError, StorageError, WeightsUnavailableError
from spark_nsfw.files import write_text
from spark_nsfw.ownership import refuse_foreign_entries
from spark_nsfw.score.download import PublishedFile, download, file_sha256, hub_file
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.storage import open_input

__all__ = ["fetch_models", "staged_file"]

_CHECKSUMS = "SHA256SUMS"

#: Names under which files grow.
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.partial", re.DOTALL)


def fetch_models(
    directory: str | Path,
    model_names: Sequence[str],
    report: Callable[[str], None] = print,
    others: Sequence[PublishedFile] = (),
) -> None:
    """Add towers and detectors to a directory, and their checksums beside them.

    A file that is there already is never replaced.

    Args:
        directory: is made if it is not there; else empty, or filled by this function.
        model_names: timm's towers.
        report: is given a line per file.
        others: weights of further classifiers.

    Raises:
        InputError: the directory has files that this function did not write, or one of the
            names with another content. Nothing was written.
        WeightsUnavailableError: a file cannot be fetched.
        ChecksumError: a file is not the one that was published.
        StorageError: the directory cannot be written now.
    """
    directory = Path(directory)
    published = [PublishedFile(d.url, d.file_name, d.sha256) for d in DETECTORS.values()]
    published += others
    wanted = {each.file_name: each.sha256 for each in published}
    # All that can be refused is refused before gigabytes are fetched.
    if _has_our_checksums(directory):
        _refuse_other_content(directory, wanted)
    else:
        _refuse_foreign_files(directory, wanted, model_names)
    sources = {
        each.file_name: download(each.url, each.file_name, each.sha256) for each in published
    }
    for name in model_names:
        path = Path(hub_file(name))
        sources[name + path.suffix] = path
        wanted[name + path.suffix] = file_sha256(path)
    _refuse_other_content(directory, wanted)
    copied: dict[str, str] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.iterdir():
            if _PARTIAL.fullmatch(left_over.name):  # of a run that was killed
                left_over.unlink()
        for name, source in sources.items():
            if not (directory / name).exists():
                _copy(source, directory / name)
            copied[name] = wanted[name]
            report(f"{wanted[name]}  {name}")
            if len(copied) >= len(published):  # or the checksums would not pass for ours
                _add_checksums(directory, copied)
    except StorageError:
        raise
    except OSError as exc:
        raise StorageError(f"{directory} cannot be written: {exc}") from exc


def _has_our_checksums(directory: Path) -> bool:
    """Whether an earlier run has written checksums there.

    Raises:
        InputError: there are checksums that no earlier run wrote.
    """
    path = directory / _CHECKSUMS
    if not os.path.lexists(path):
        return False
    try:
        sums = _read_checksums(str(directory))
    except UnicodeDecodeError:
        sums = {}
    if not sums.items() >= {each.file_name: each.sha256 for each in DETECTORS.values()}.items():
        raise InputError(  # every run writes those
            f"{path} is not from `spark-nsfw models fetch`: give a directory of its own"
        )
    return True


def _add_checksums(directory: Path, sums: Mapping[str, str]) -> None:
    """Write lines for these files among those that are there for others."""
    path = directory / _CHECKSUMS
    before = path.read_text() if path.exists() else ""
    lines = [line for line in before.splitlines() if _named_in(line) not in sums]
    lines += [f"{sha256}  {name}" for name, sha256 in sums.items()]
    text = "".join(f"{line}\n" for line in sorted(lines, key=_named_in))
    if text != before:
        write_text(str(path), text)


def _named_in(line: str) -> str:
    return line.partition("  ")[2]


def _refuse_foreign_files(
    directory: Path, wanted: Mapping[str, str], model_names: Sequence[str]
) -> None:
    """Refuse a directory without checksums, unless a killed run left all that is in it.

    Raises:
        InputError: names a file that no such run wrote.
    """

    def is_ours(name: str) -> bool:
        is_tower = any(name == model + Path(name).suffix for model in model_names)
        return name in wanted or is_tower or _PARTIAL.fullmatch(name) is not None

    refuse_foreign_entries(str(directory), is_ours, "`spark-nsfw models fetch`")
    _refuse_other_content(directory, wanted)


def _refuse_other_content(directory: Path, wanted: Mapping[str, str]) -> None:
    """Refuse to replace files.

    Raises:
        InputError: a file of one of these names has another sha256.
    """
    for name, sha256 in wanted.items():
        path = directory / name
        if os.path.lexists(path) and not (path.is_file() and file_sha256(path) == sha256):
            raise InputError(
                f"{path} is there and is another file than the one to be fetched (sha256 "
                f"{sha256}): it is not replaced. Move it away, or give another directory"
            )


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that it appears whole, and never in place of another one."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4()}.partial")
    try:
        with open(source, "rb") as old, open(partial, "xb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
        try:
            os.link(partial, target)  # unlike a rename, fails where a file came in between
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


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
