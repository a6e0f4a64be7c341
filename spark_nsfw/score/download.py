"""Path, URL or hub name → verified local file, kept in a cache that processes share."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError

from filelock import FileLock
from pyarrow import fs

from spark_nsfw.errors import ChecksumError, InputError, WeightsUnavailableError
from spark_nsfw.storage import open_input, resolve

__all__ = [
    "PublishedFile",
    "Weights",
    "cache_dir",
    "download",
    "file_sha256",
    "hub_file",
    "hub_problem",
    "local_file",
    "repository_file",
]

_BLOCK_BYTES = 1 << 20

#: How long the hub may take to answer at all; its own client would try for minutes.
_PROBE_SECONDS = 4

#: Longer than a tick of any file system's clock (FAT: 2 s): two writes within one tick
#: leave the same time.
_CLOCK_TICK_SECONDS = 3

#: Path → a state of its file, and the sha256 that it had then.
_known_hashes: dict[str, tuple[tuple[int, ...], str]] = {}


@dataclass(frozen=True)
class PublishedFile:
    """A weight file on the internet, known by its sha256.

    Attributes:
        url: where it is.
        file_name: its name in `cache_dir` and in staged directories.
        sha256: what it must be, in hex.
    """

    url: str
    file_name: str
    sha256: str


@dataclass(frozen=True)
class Weights:
    """Which weights a model has.

    Attributes:
        source: path, URL or hub name of the file; ``random (seed N)`` where there is none.
        sha256: of the file; None for random weights, and until the file has been looked at.
        is_random: no file stands behind them, so no score means anything.
    """

    source: str
    sha256: str | None
    is_random: bool = False

    def __str__(self) -> str:
        return self.source if self.sha256 is None else f"{self.source} sha256:{self.sha256}"


def cache_dir() -> Path:
    """Where downloads are kept: ``$SPARK_NSFW_CACHE``, else ``~/.cache/spark_nsfw``.

    Raises:
        WeightsUnavailableError: neither is there, as for a container's nameless user.
    """
    configured = os.environ.get("SPARK_NSFW_CACHE")
    try:
        return Path(configured) if configured else Path.home() / ".cache" / "spark_nsfw"
    except RuntimeError as exc:
        raise WeightsUnavailableError(
            "this user has no home directory: set $SPARK_NSFW_CACHE to where downloads are kept"
        ) from exc


def file_sha256(path: str | Path) -> str:
    """The sha256 of a local file, in hex; remembered for as long as the file is unchanged.

    Not while the file is younger than a tick of its file system's clock: it could be
    written again and look the same.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        state, changed_seconds = _file_state(file)
        known = _known_hashes.get(str(path))
        if known is not None and known[0] == state:
            return known[1]
        started_seconds = time.time()
        digest = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        is_old = started_seconds - changed_seconds > _CLOCK_TICK_SECONDS
        if is_old and _file_state(file)[0] == state:
            _known_hashes[str(path)] = state, digest.hexdigest()
    return digest.hexdigest()


def _file_state(file: BinaryIO) -> tuple[tuple[int, ...], float]:
    """What changes with a file's content, and when it last did, in Unix seconds.

    A program can set a file's time of change back, but not the time when it did that.
    """
    stat = os.fstat(file.fileno())
    state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return state, max(stat.st_mtime, stat.st_ctime)


def local_file(url: str, sha256: str | None = None) -> Path:
    """The file behind a path or URL, copied to the cache first where it is remote.

    Raises:
        WeightsUnavailableError: there is no such file, or it cannot be read.
        ChecksumError: its sha256 is not the expected one.
    """
    try:
        filesystem, name = resolve(url)
        if isinstance(filesystem, fs.LocalFileSystem):
            path = Path(name)
            if not path.is_file():
                raise FileNotFoundError("no such file on this machine")
            if sha256 is not None:
                _verify(str(path), file_sha256(path), sha256)
            return path
        info = filesystem.get_file_info(name)
        version = f"{url} {info.size} {info.mtime_ns}"  # a replaced file is another file
        marker = hashlib.sha256(version.encode()).hexdigest()[:16]
        path = cache_dir() / f"{marker}-{Path(name).name}"
        if not _is_whole(path, info.size, sha256):
            with _lock(path):
                if not _is_whole(path, info.size, sha256):  # not even now
                    with open_input(url) as stream:
                        _write_whole(stream, path, url, info.size, sha256)
        return path
    except (OSError, InputError) as exc:
        raise WeightsUnavailableError(
            f"{url}: {exc}; every machine that scores must be able to read it"
        ) from exc


def download(url: str, file_name: str, sha256: str) -> Path:
    """Fetch a file over HTTP once; later calls find it in the cache.

    What lies there and is something else, such as half a download, is fetched again.

    Args:
        url: where it is.
        file_name: its name in `cache_dir`.
        sha256: what it must be, in hex.

    Raises:
        WeightsUnavailableError: it could not be fetched.
        ChecksumError: what was fetched, or what lies in the cache and cannot be fetched
            again, is something else.
    """
    path = cache_dir() / file_name
    if _is_whole(path, None, sha256):  # a cache that cannot be written will do then
        return path
    with _lock(path):
        if _is_whole(path, None, sha256):
            return path
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                length = response.headers.get("Content-Length")
                _write_whole(response, path, url, length and int(length), sha256)
        except (OSError, HTTPException) as exc:
            if path.exists():
                _verify(str(path), file_sha256(path), sha256)
            raise WeightsUnavailableError(
                f"{url} could not be downloaded ({exc}); fetch it elsewhere and put it at {path}, "
                "or give its path"
            ) from exc
    return path


def hub_file(model_name: str) -> str:
    """Timm's weights of a model, fetched from the hub once; later found in its cache.

    Raises:
        InputError: timm has no weights under this name.
        WeightsUnavailableError: they cannot be fetched.
    """
    import timm

    config = timm.get_pretrained_cfg(model_name)
    if config is None or not config.hf_hub_id:
        raise InputError(
            f"timm has no weights on the hub for {model_name!r}; "
            "give a name with a tag such as .openai, or a file with --clip-checkpoint "
            "(checkpoint_path)"
        )
    file_names = [config.hf_hub_filename] if config.hf_hub_filename else []
    return repository_file(
        config.hf_hub_id,
        [*file_names, "model.safetensors", "pytorch_model.bin"],
        f"the weights of {model_name}",
        "--clip-checkpoint (checkpoint_path), or a directory that `spark-nsfw models fetch` made "
        "with --models (models_dir)",
    )


def repository_file(repository: str, file_names: Sequence[str], what: str, option: str) -> str:
    """The first of some files that a repository of the hub has; fetched once.

    Args:
        repository: ``owner/name``.
        file_names: in order of preference.
        what: for messages, what the file is.
        option: for messages, with what its path can be given.

    Raises:
        WeightsUnavailableError: it has none, or the hub is out of reach.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file_name in file_names:
        cached = try_to_load_from_cache(repository, file_name)
        if isinstance(cached, str):
            return cached
    reason: Exception | str = hub_problem() or ""
    for file_name in file_names if not reason else ():
        try:
            return str(hf_hub_download(repository, file_name))
        except EntryNotFoundError as exc:
            if not isinstance(exc, LocalEntryNotFoundError):
                continue  # the hub answered that there is no such file
            reason = exc
        except (OSError, ValueError) as exc:
            reason = exc
        break
    if not reason:
        raise WeightsUnavailableError(f"{repository} has none of {', '.join(file_names)}")
    raise WeightsUnavailableError(
        f"{what} could not be fetched from the hub ({reason}); on a machine without internet "
        f"fetch {file_names[0]} of {repository} elsewhere and give its path with {option}"
    ) from (reason if isinstance(reason, Exception) else None)


def hub_problem() -> str | None:
    """Why the model hub cannot be asked now; None if it answers within a few seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return None
    except HTTPError:
        return None  # it answers
    except (OSError, HTTPException) as exc:
        return f"{constants.ENDPOINT} does not answer: {getattr(exc, 'reason', exc)}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process of this machine at a time, so that each file is fetched once.

    Raises:
        WeightsUnavailableError: the cache cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as exc:
        raise WeightsUnavailableError(
            f"{path.parent} cannot be written ({exc}): set $SPARK_NSFW_CACHE to a directory that "
            f"can, or put {path.name} there"
        ) from exc
    try:
        yield
    finally:
        lock.release()


def _is_whole(path: Path, num_bytes: int | None, sha256: str | None) -> bool:
    """Whether a file is there that nothing speaks against."""
    try:
        size_fits = num_bytes in (None, path.stat().st_size)
        return size_fits and sha256 in (None, file_sha256(path))
    except OSError:
        return False


def _write_whole(
    stream: BinaryIO, path: Path, source: str, num_bytes: int | None, sha256: str | None
) -> None:
    """Copy a stream to ``path`` so that no other process ever sees half of it, or a wrong one.

    Raises:
        OSError: it cannot be written, or the stream ended early.
        ChecksumError: it is not the expected file.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4()}")
    try:
        digest = hashlib.sha256()
        with open(partial, "xb") as file:  # for all whom the umask lets read, unlike a mkstemp
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
            arrived = file.tell()
        if num_bytes not in (None, arrived):
            raise OSError(f"the connection was cut after {arrived:,} of {num_bytes:,} bytes")
        if sha256 is not None:
            _verify(source, digest.hexdigest(), sha256)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _verify(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ChecksumError(
            f"{name} is not the expected file: sha256 {found} found, {expected} expected; "
            "delete it or give another"
        )
