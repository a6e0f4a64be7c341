"""INPUT arguments → units: the shards that they name, listed once with pyarrow."""

from __future__ import annotations

import itertools
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import bracex
from wcmatch import fnmatch

from spark_nsfw.errors import InputError, NothingToReadError
from spark_nsfw.files import FileEntry, find_file, iter_files
from spark_nsfw.read.source import Unit
from spark_nsfw.storage import hadoop_path, is_below, path_below

__all__ = ["ShardInputs", "expand_ranges"]

_GLOB_CHARACTERS = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\{\d+\.\.\d+\})")
_SLASH_IN_BRACES = re.compile(r"\{[^{}]*/[^{}]*\}")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(//[^/]*(?=/|\Z)|(?=/))")

#: Hidden names are left out elsewhere; within braces a glob matches as it does outside.
_MATCH_FLAGS = fnmatch.DOTMATCH | fnmatch.BRACE | fnmatch.CASE

#: Whether a name fits one segment of a glob; None stands for any number of names.
_Matcher = Callable[[str], bool] | None


@dataclass(frozen=True)
class ShardInputs:
    """Where the shards are: directories, tar files, globs and brace ranges, absolute.

    Attributes:
        patterns: as given, made absolute.
    """

    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> ShardInputs:
        """Take one or several inputs.

        Raises:
            InputError: none at all, inputs on more than one filesystem, or a range that
                runs backwards.
        """
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise InputError("no input: give a directory, a tar file, a glob or a brace range")
        patterns = tuple(_absolute(os.fspath(path)) for path in several)
        for pattern in patterns:
            _refuse_backwards(pattern)
        filesystems = {_split(pattern)[0] for pattern in patterns}
        if len(filesystems) > 1:
            raise InputError(
                f"inputs on several filesystems ({', '.join(sorted(filesystems))}); "
                "score each in a run of its own"
            )
        return cls(patterns)

    @property
    def filesystem(self) -> str:
        """Of all inputs, such as ``s3a://bucket``; empty for local paths."""
        return _split(self.patterns[0])[0]

    @property
    def roots(self) -> tuple[str, ...]:
        """The directories below which shards are named, longest first."""
        roots = {_root(pattern) for pattern in self.patterns}
        return tuple(sorted(roots, key=lambda root: (-len(root), root)))

    def shard_name(self, path: str) -> str:
        """A shard's path below its input root, without ``.tar``.

        Raises:
            InputError: the path is below none of the inputs.
        """
        name = _split(path)[1]
        for root in self.roots:
            if name.startswith(root):
                return name[len(root) :].removesuffix(".tar")
        raise InputError(f"{path} is below none of the inputs {', '.join(self.roots)}")

    def list_units(self) -> list[Unit]:
        """A unit for each shard that is there now, sorted by name.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            InputError: two shards have one name.
            StorageError: they cannot be listed now.
        """
        found: dict[str, FileEntry] = {}
        for pattern in self.patterns:
            found |= _list(pattern)
        if not found:
            raise NothingToReadError(
                f"{', '.join(self.patterns)} does not exist, or has no shard (*.tar) in it"
            )
        path_of: dict[str, str] = {}
        units = []
        for path in sorted(found):
            name = self.shard_name(path)
            other = path_of.setdefault(name, path)
            if other != path:
                raise InputError(
                    f"{other} and {path} would both be shard {name!r}; "
                    "score them in two runs, or from a directory above both"
                )
            units.append(Unit(name, path, found[path].modified_seconds))
        return sorted(units, key=lambda unit: unit.name)

    def covers(self, url: str) -> bool:
        """Whether tars below a directory would be input, or the input lies in it."""
        if any(is_below(self.filesystem + root, url) for root in self.roots):
            return True
        for pattern in self.patterns:
            inside = _split(pattern)[1]
            is_glob = _GLOB_CHARACTERS.search(inside)
            top = _root(pattern)
            below = path_below(url, self.filesystem + (top if is_glob else inside))
            if below is None:
                continue
            if not is_glob:
                return True
            tar = f"{top}{below}/x.tar" if below else f"{top}x.tar"
            if any(_select(expanded, [tar]) for expanded in expand_ranges(inside)):
                return True
        return False


def expand_ranges(pattern: str) -> Iterator[str]:
    """Expand WebDataset's numeric ranges: ``{00000..00002}`` → 00000, 00001, 00002.

    Other braces and glob characters are left as they are.

    Raises:
        InputError: a range that runs backwards.
    """
    _refuse_backwards(pattern)
    parts = [
        bracex.expand(part, limit=0) if _RANGE.fullmatch(part) else [part]
        for part in _RANGE.split(pattern)
    ]
    return map("".join, itertools.product(*parts))


def _refuse_backwards(pattern: str) -> None:
    for piece in _RANGE.findall(pattern):
        first, _, last = piece[1:-1].partition("..")
        if int(first) > int(last):
            raise InputError(f"{pattern}: the range {piece} runs backwards")


def _absolute(path: str) -> str:
    path = hadoop_path(path)
    match = _SCHEME.match(path)
    if match is None:
        return path if path.startswith("/") else os.path.abspath(path)
    return path if match.end() < len(path) else f"{path}/"  # a bucket is its root directory


def _split(path: str) -> tuple[str, str]:
    """URL → (filesystem such as ``s3a://bucket``, absolute path in it). ``file:`` is local."""
    match = _SCHEME.match(path)
    if match is None:
        return "", path
    filesystem = "" if match[1] == "file" else f"{match[1]}:{match[2]}"
    return filesystem, path[match.end() :]


def _root(pattern: str) -> str:
    path = _split(pattern)[1]
    match = _GLOB_CHARACTERS.search(path)
    if match:
        return path[: path.rfind("/", 0, match.start()) + 1]
    if path.endswith(".tar"):
        return path[: path.rfind("/") + 1]
    return path.rstrip("/") + "/"


def _list(pattern: str) -> dict[str, FileEntry]:
    """Path → entry of the shards of one input.

    Names that begin with a dot or an underscore are hidden, with all that is below them.

    Raises:
        NothingToReadError: an input, or one of a range of inputs, has no shard.
    """
    filesystem_url, path = _split(pattern)
    is_glob = _GLOB_CHARACTERS.search(path)
    root = _root(pattern).rstrip("/") if is_glob else path.rstrip("/")
    # A range of numbers is no more than any name here: ten thousand are slow to try.
    _, globs = _compiled(_RANGE.sub("*", path.rstrip("/"))) if is_glob else ("", [[]])
    entries = {
        filesystem_url + root + (f"/{entry.name}" if entry.name else ""): entry
        for entry in _iter_tars(f"{filesystem_url}{root or '/'}", globs)
    }
    if not is_glob:
        if not entries:
            raise _nothing_in(root)
        return entries
    tars = sorted(place[len(filesystem_url) :] for place in entries)
    chosen: set[str] = set()
    for expanded in expand_ranges(path.rstrip("/")):
        found = _select(expanded, tars)
        if not found:
            raise _nothing_in(expanded)
        chosen.update(found)
    return {filesystem_url + tar: entries[filesystem_url + tar] for tar in chosen}


def _nothing_in(path: str) -> NothingToReadError:
    return NothingToReadError(f"{path} does not exist, or has no shard (*.tar) in it")


def _iter_tars(url: str, globs: Sequence[Sequence[_Matcher]]) -> Iterator[FileEntry]:
    """The tars below a directory; or one without a name for a file itself.

    Directories that hold nothing any of the globs could name are not looked into.
    """

    def skip(name: str) -> bool:
        names = name.split("/")
        return _is_hidden_directory(name) or not any(_may_lead_to(glob, names) for glob in globs)

    file = find_file(url)
    if file is not None:
        if url.endswith(".tar"):
            yield file
        return
    for entry in iter_files(url, skip=skip, follow_links=True):
        directory, _, base = entry.name.rpartition("/")
        if base.endswith(".tar") and base[0] not in "._" and not _is_hidden_directory(directory):
            yield entry


def _is_hidden_directory(name: str) -> bool:
    """As Spark has it: ``_x`` and ``.x`` are hidden, partitions such as ``_x=1`` are not."""
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part)
        for part in name.split("/")
    )


def _select(pattern: str, paths: Sequence[str]) -> list[str]:
    """Of sorted paths, those that a pattern without ranges names, itself or above them."""
    match = _GLOB_CHARACTERS.search(pattern)
    if match is None:
        return [
            path
            for path in _with_prefix(pattern, paths)
            if len(path) == len(pattern) or path[len(pattern)] == "/"
        ]
    prefix, globs = _compiled(pattern)
    return [
        path
        for path in _with_prefix(prefix, paths)
        if any(_matches(glob, path[len(prefix) :].split("/")) for glob in globs)
    ]


def _compiled(pattern: str) -> tuple[str, list[list[_Matcher]]]:
    """The directory above a glob, and the segments below it, of each of its alternatives."""
    match = _GLOB_CHARACTERS.search(pattern)
    assert match is not None
    start = pattern.rfind("/", 0, match.start()) + 1
    globs = [pattern[start:]]
    if _SLASH_IN_BRACES.search(pattern):
        globs = bracex.expand(globs[0], limit=0)
    return pattern[:start], [[_matcher(segment) for segment in glob.split("/")] for glob in globs]


def _with_prefix(prefix: str, paths: Sequence[str]) -> Iterator[str]:
    for position in range(bisect_left(paths, prefix), len(paths)):
        if not paths[position].startswith(prefix):
            return
        yield paths[position]


@lru_cache(maxsize=1024)
def _matcher(segment: str) -> _Matcher:
    if segment == "**":
        return None
    if not _GLOB_CHARACTERS.search(segment):
        return segment.__eq__
    included, _ = fnmatch.translate(segment, flags=_MATCH_FLAGS)
    expressions = [re.compile(expression) for expression in included]
    return lambda name: any(expression.match(name) for expression in expressions)


def _matches(glob: Sequence[_Matcher], names: Sequence[str]) -> bool:
    if not glob:
        return True
    first, *others = glob
    if first is None:
        return any(_matches(others, names[start:]) for start in range(len(names)))
    return bool(names) and first(names[0]) and _matches(others, names[1:])


def _may_lead_to(glob: Sequence[_Matcher], names: Sequence[str]) -> bool:
    """Whether what a glob names can be these names or below them."""
    for matcher, name in zip(glob, names, strict=False):
        if matcher is None:
            return True
        if not matcher(name):
            return False
    return True
