"""INPUT arguments → one Hadoop glob for Spark's file source, and a name for each shard."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileType

from spark_nsfw.errors import InputError
from spark_nsfw.storage import expand_braces, hadoop_path, resolve

__all__ = ["ShardInputs"]

_GLOB_CHARACTERS = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BRACES = re.compile(r"\{[^{}]*\}")
#: What Spark does not list; partitions such as ``_x=1`` it does.
_HIDDEN = re.compile(r"/(\.|_[^/=]*(/|\Z))")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(//[^/]*(?=/|\Z)|(?=/))")


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
            InputError: none at all, or inputs on more than one filesystem.
        """
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise InputError("no input: give a directory, a tar file, a glob or a brace range")
        patterns = tuple(_absolute(os.fspath(path)) for path in several)
        filesystems = {_split(pattern)[0] for pattern in patterns}
        if len(filesystems) > 1:
            raise InputError(
                f"inputs on several filesystems ({', '.join(sorted(filesystems))}); "
                "score each in a run of its own"
            )
        return cls(patterns)

    @property
    def glob(self) -> str:
        """All inputs as one Hadoop glob, so that a stream over them has one source.

        Raises:
            InputError: one of several inputs has a comma, which would part it in two.
        """
        globs = [_hadoop_glob(pattern) for pattern in self.patterns]
        if len(globs) == 1:
            return globs[0]
        for pattern in self.patterns:
            if "," in _BRACES.sub("", pattern):
                raise InputError(
                    f"{pattern} has a comma, and cannot be one of several inputs: give it "
                    "alone, or with ? for the comma"
                )
        filesystem = _split(globs[0])[0]
        return f"{filesystem}/{{{','.join(_split(glob)[1].lstrip('/') for glob in globs)}}}"

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

    def list_paths(self) -> list[str]:
        """The paths of all shards, sorted, listed with pyarrow where there is no Spark session.

        Raises:
            InputError: there are none, one that was named is missing, or two have one name.
        """
        found = sorted({path for pattern in self.patterns for path in _list(pattern)})
        if not found:
            raise InputError(
                f"{', '.join(self.patterns)} does not exist, or has no shard (*.tar) in it"
            )
        self.check(found)
        return found

    def check(self, paths: Sequence[str]) -> None:
        """Refuse inputs that name a shard that is not there, or give two shards one name.

        Args:
            paths: the shards that were listed.

        Raises:
            InputError: names the input without shards, or both paths.
        """
        found = [_split(path)[1] for path in paths]
        files = set(found)
        directories = {path[: match.start()] for path in files for match in re.finditer("/", path)}
        for pattern in self.patterns:
            for expanded in expand_braces(_split(pattern)[1].rstrip("/")):
                if _GLOB_CHARACTERS.search(expanded):
                    below = re.compile(_regex(expanded) + r"(/.*)?\Z", re.DOTALL)
                    there = any(below.match(path) for path in found)
                else:
                    there = expanded in files or expanded in directories
                if not there:
                    raise InputError(f"{expanded} does not exist, or has no shard (*.tar) in it")
        path_of: dict[str, str] = {}
        for path in paths:
            name = self.shard_name(path)
            if name in path_of:
                raise InputError(
                    f"{path_of[name]} and {path} would both be shard {name!r}; "
                    "score them in two runs, or from a directory above both"
                )
            path_of[name] = path


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


def _list(pattern: str) -> Iterator[str]:
    """The shards of one input; names that begin with a dot or an underscore are hidden."""
    filesystem_url, path = _split(pattern)
    wanted = re.compile(_regex(_hadoop_glob(path.rstrip("/"))) + r"(/.*)?\Z", re.DOTALL)
    is_glob = _GLOB_CHARACTERS.search(path)
    root = _root(pattern).rstrip("/") if is_glob else path.rstrip("/")
    filesystem, directory = resolve(f"{filesystem_url}{root or '/'}")
    if not is_glob and filesystem.get_file_info(directory).type is FileType.File:
        yield filesystem_url + root
        return
    directory = directory.rstrip("/")
    selector = FileSelector(directory or "/", allow_not_found=True, recursive=True)
    for info in filesystem.get_file_info(selector):
        below = info.path[len(directory) :]
        if info.type is FileType.File and below.endswith(".tar") and not _HIDDEN.search(below):
            shard = root + below
            if wanted.match(shard):
                yield filesystem_url + shard


def _hadoop_glob(pattern: str) -> str:
    """Numeric brace ranges, which Hadoop lacks, become alternatives of digit classes."""
    return _RANGE.sub(lambda match: f"{{{','.join(_digit_globs(match[1], match[2]))}}}", pattern)


def _digit_globs(first: str, last: str) -> list[str]:
    """Globs for the numbers of a range: ``000``, ``129`` → ``0[0-9][0-9]``, ``1[0-1][0-9]``, ….

    Matching a name against tens of thousands of alternatives would take the place of
    the listing itself.
    """
    if int(first) > int(last):
        raise InputError(f"the range {{{first}..{last}}} runs backwards")
    if len(first) != len(last):
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    if first == last:
        return [first]
    low, high = first[0], last[0]
    if low == high:
        return [low + rest for rest in _digit_globs(first[1:], last[1:])]
    width = len(first) - 1
    globs = []
    if first[1:].strip("0"):
        globs += [low + rest for rest in _digit_globs(first[1:], "9" * width)]
        low = str(int(low) + 1)
    tail = []
    if last[1:].strip("9"):
        tail = [high + rest for rest in _digit_globs("0" * width, last[1:])]
        high = str(int(high) - 1)
    if low <= high:
        globs.append(f"[{low}-{high}]" + "[0-9]" * width)
    return globs + tail


def _regex(glob: str) -> str:
    """A Hadoop glob as a regular expression."""
    parts, depth = [], 0
    for token in re.findall(r"\\.|\[[^]]*\]|.", glob, re.DOTALL):
        if token == "*":
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif token == "{":
            parts.append("(?:")
            depth += 1
        elif token == "}" and depth:
            parts.append(")")
            depth -= 1
        elif token == "," and depth:
            parts.append("|")
        elif len(token) > 2 and token.startswith("["):
            parts.append("[^" + token[2:] if token[1] in "!^" else token)
        else:
            parts.append(re.escape(token[-1]))
    return "".join(parts)
