"""INPUT arguments → the files that they name, listed once with pyarrow; of shards, units."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyarrow.fs import FileType

from spark_nsfw.errors import InputError, NothingToReadError, StorageError
from spark_nsfw.files import FileEntry, exists, is_hidden, iter_files
from spark_nsfw.read.patterns import PathPattern, is_pattern, refuse_backwards
from spark_nsfw.read.source import Unit
from spark_nsfw.storage import hadoop_path, is_below, on_store, path_below, resolve

__all__ = ["ShardInputs"]

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(//[^/]*(?=/|\Z)|(?=/))")


@dataclass(frozen=True)
class ShardInputs:
    """Where the shards are: directories, files, globs and brace ranges, absolute.

    Attributes:
        patterns: as given, made absolute.
        suffixes: of the names of the files that are meant.
    """

    patterns: tuple[str, ...]
    suffixes: tuple[str, ...] = (".tar",)

    @classmethod
    def parse(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        suffixes: tuple[str, ...] = (".tar",),
    ) -> ShardInputs:
        """Take one or several inputs.

        Args:
            paths: directories, files, globs or brace ranges.
            suffixes: of the files that are meant.

        Raises:
            InputError: none at all, inputs on more than one filesystem, or a range that
                runs backwards.
        """
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise InputError("no input: give a directory, a tar file, a glob or a brace range")
        patterns = tuple(_absolute(os.fspath(path)) for path in several)
        for pattern in patterns:
            refuse_backwards(pattern)
        filesystems = {_split(pattern)[0] for pattern in patterns}
        if len(filesystems) > 1:
            raise InputError(
                f"inputs on several filesystems ({', '.join(sorted(filesystems))}); "
                "score each in a run of its own"
            )
        return cls(patterns, suffixes)

    @property
    def filesystem(self) -> str:
        """Of all inputs, such as ``s3a://bucket``; empty for local paths."""
        return _split(self.patterns[0])[0]

    @property
    def roots(self) -> tuple[str, ...]:
        """The directories below which shards are named, longest first."""
        return tuple(sorted(self._roots, key=lambda root: (-len(root), root)))

    def describe(self, kind: str) -> dict[str, Any]:
        """What an output's note says of them: rows of other inputs never mix with theirs."""
        return {"kind": kind, "filesystem": self.filesystem, "roots": list(self.roots)}

    @cached_property
    def _roots(self) -> frozenset[str]:
        return frozenset(self._root(pattern) for pattern in self.patterns)

    def shard_name(self, path: str) -> str:
        """A shard's path below its input root, without ``.tar`` or what else it ends in.

        Raises:
            InputError: the path is below none of the inputs.
        """
        name = _split(path)[1]
        end = name.rfind("/")
        while end >= 0:
            if name[: end + 1] in self._roots:
                return self._without_suffix(name[end + 1 :])
            end = name.rfind("/", 0, end)
        raise InputError(f"{path} is below none of the inputs {', '.join(self.roots)}")

    def place_of(self, name: str) -> str:
        """The path or URL of the shard of a name, `shard_name`, without listing any.

        Raises:
            StorageError: it cannot be found out now.
        """
        suffix = self.suffixes[0]
        places = [f"{self.filesystem}{root}{name}{suffix}" for root in self.roots]
        fitting = [place for place in places if self.shard_name(place) == name]
        if len(fitting) == 1:
            return fitting[0]
        return next((place for place in fitting if exists(place)), fitting[0])

    def list_units(self) -> list[Unit]:
        """A unit for each shard that is there now, sorted by name.

        Names that begin with a dot or an underscore are hidden, with all that is below them.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            InputError: two shards have one name.
            StorageError: they cannot be listed now.
        """
        units: dict[str, Unit] = {}
        for path, entry in self.list_files().items():
            unit = Unit(self.shard_name(path), path, entry.modified_seconds, entry.size)
            other = units.setdefault(unit.name, unit)
            if other is not unit:
                raise InputError(
                    f"{other.place} and {path} would both be shard {unit.name!r}; "
                    "score them in two runs, or from a directory above both"
                )
        return sorted(units.values(), key=lambda unit: unit.name)

    def list_files(self) -> dict[str, FileEntry]:
        """The files that are there now, by path, sorted.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            StorageError: they cannot be listed now.
        """
        listed: dict[str, FileEntry] = dict(self._list_places())
        for pattern in self.patterns:
            if is_pattern(_split(pattern)[1]):
                listed |= self._list_matches(pattern)
        return dict(sorted(listed.items()))

    def _is_meant(self, path: str) -> bool:
        return path.endswith(self.suffixes)

    def _without_suffix(self, name: str) -> str:
        longest = max((s for s in self.suffixes if name.endswith(s)), key=len, default="")
        return name[: len(name) - len(longest)]

    def _root(self, pattern: str) -> str:
        path = _split(pattern)[1]
        if is_pattern(path):
            plain = itertools.takewhile(lambda segment: not is_pattern(segment), path.split("/"))
            return "/".join([*plain, ""])
        if self._is_meant(path):
            return path[: path.rfind("/") + 1]
        return path.rstrip("/") + "/"

    def _below_root(self, pattern: str) -> str:
        return _split(pattern)[1][len(self._root(pattern)) :].rstrip("/")

    def _list_matches(self, pattern: str) -> dict[str, FileEntry]:
        """Path → entry of the files that a glob or a range names.

        Raises:
            NothingToReadError: there are none, or none of one name in a range.
        """
        wanted = PathPattern(self._below_root(pattern))
        url = _split(pattern)[0] + self._root(pattern)
        found: dict[str, FileEntry] = {}
        matched: set[str] = set()
        for entry in self._iter_meant(url, wanted):
            matches = wanted.matches(entry.name)
            if matches:
                found[url + entry.name] = entry
                matched.update(matches)
        missing = wanted.first_missing(matched)
        if missing is not None:
            raise self._nothing_in(url + missing)
        return found

    def _nothing_in(self, path: str) -> NothingToReadError:
        what = "shard (*.tar)" if self.suffixes == (".tar",) else f"*{', *'.join(self.suffixes)}"
        return NothingToReadError(f"{path} does not exist, or has no {what} in it")

    def _iter_meant(self, url: str, wanted: PathPattern | None = None) -> Iterator[FileEntry]:
        """The files in a directory that are meant and not hidden.

        Directories in which none is wanted are not walked.
        """

        def skip(name: str) -> bool:
            return is_hidden(name) or not (wanted is None or wanted.may_match_below(name))

        for entry in iter_files(url, skip=skip, follow_links=True):
            directory, _, base = entry.name.rpartition("/")
            if self._is_meant(base) and base[0] not in "._" and not is_hidden(directory):
                yield entry

    def _list_places(self) -> Iterator[tuple[str, FileEntry]]:
        """Path and entry of files that are named or lie in a directory that is."""
        paths = [_split(pattern)[1] for pattern in self.patterns]
        places = [path.rstrip("/") for path in paths if not is_pattern(path)]
        if not places:
            return
        urls = [f"{self.filesystem}{place or '/'}" for place in places]
        paths = [resolve(url)[1] for url in urls]
        try:
            infos = on_store(urls[0], lambda filesystem, _: filesystem.get_file_info(paths))
        except OSError as exc:
            raise StorageError(f"{self.filesystem}{places[0]} cannot be listed: {exc}") from exc
        for place, info in zip(places, infos, strict=True):
            url = self.filesystem + place
            if info.type is FileType.File:
                if not self._is_meant(place):
                    raise self._nothing_in(url)
                yield url, FileEntry("", info.size or 0, (info.mtime_ns or 0) / 1e9)
                continue
            found = [(f"{url}/{entry.name}", entry) for entry in self._iter_meant(url or "/")]
            if not found:
                raise self._nothing_in(url or "/")
            yield from found

    def covers(self, url: str) -> bool:
        """Whether tars below a directory could be input, or the input lies in it."""
        for pattern in self.patterns:
            root = self.filesystem + self._root(pattern)
            if is_below(root, url):
                return True
            if not is_pattern(_split(pattern)[1]):
                if is_below(url, pattern) or is_below(pattern, url):
                    return True
            elif (below := path_below(url, root)) is not None and (
                PathPattern(self._below_root(pattern)).may_match_below(below)
            ):
                return True
        return False


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
