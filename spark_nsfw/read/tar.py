"""Shard → members → samples, as lazy generators.

A sample is a run of adjacent members that share a key, as the WebDataset format
defines it (https://github.com/webdataset/webdataset): the key is a member's path up
to the first dot of its basename, the extension is the rest in lower case. Memory
holds one sample at a time, whatever the size of the shard.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from spark_nsfw.errors import ShardError, ShardTruncatedError, ShardUnreadableError
from spark_nsfw.schema import Status
from spark_nsfw.storage import open_input

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Member", "Sample", "iter_members", "iter_runs", "iter_samples", "split_name"]

#: Default limit on one member's size; larger ones are never read into memory.
MAX_MEMBER_BYTES = 64 << 20

#: No file has a member of this size, and beyond it a file position does not fit 64 bits.
_MAX_SIZE_BYTES = 1 << 62

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)\Z", re.DOTALL)
#: WebDataset keeps its own notes in members such as ``__meta__.json``.
_RESERVED = re.compile(r"__[^/]*__(\Z|/|\.)")


@dataclass(slots=True)
class Member:
    """One regular entry of a tar file; ``content`` is None when it was not asked for.

    ``header`` says where it lies in the tar.
    """

    name: str
    size_bytes: int
    header: tarfile.TarInfo
    content: bytes | None = None
    status: Status = Status.OK
    error_message: str | None = None


@dataclass(slots=True)
class Sample:
    """Adjacent members that share a key.

    Attributes:
        key: None in the one sample that stands for a fault of the shard itself.
        members: content by extension, of the extensions that were asked for.
        extensions: every extension the sample has, read or not.
        locations: by extension, where a member's content begins in the tar and its length, in
            bytes; of plain members that are there whole.
        status: other than ``ok`` when the sample cannot be used as it is.
        error_message: why, for a person.
    """

    key: str | None
    members: dict[str, bytes] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=list)
    locations: dict[str, tuple[int, int]] = field(default_factory=dict)
    status: Status = Status.OK
    error_message: str | None = None

    def fail(self, status: Status, message: str) -> None:
        """Record the first thing that is wrong; later ones do not replace it."""
        if self.status is Status.OK:
            self.status, self.error_message = status, message


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name → (key, extension), or None where WebDataset sees no sample.

    ``a/b.c/001.SEG.png`` → (``a/b.c/001``, ``seg.png``). Names without an extension,
    hidden files and ``__reserved__`` names belong to no sample.
    """
    match = _NAME.match(name)
    if match is None or _RESERVED.match(name):
        return None
    return match[1], match[2].lower()


class _StrictTarInfo(tarfile.TarInfo):
    """A header reader that tells the end of an archive from its loss.

    `tarfile` ends its iteration in silence both at the end-of-archive marker and
    where the bytes run out or turn into something else. Before Python 3.11.14 it also
    walks in circles where a member has a negative size.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        return cls._checked(super().frombuf(buf, encoding, errors))

    @classmethod
    def _checked(cls, info: Self) -> Self:
        if not 0 <= info.size < _MAX_SIZE_BYTES:
            raise tarfile.InvalidHeaderError(f"a size of {info.size:,} bytes")  # type: ignore[attr-defined]
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return cls._checked(super().fromtarfile(tarfile_))  # a PAX header has a size, too
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as exc:
            offset = tarfile_.offset
            if offset == 0:
                raise ShardUnreadableError(f"not a tar archive ({exc})") from exc
            raise ShardTruncatedError(
                f"no end-of-archive marker: {exc} at byte {offset:,}"
            ) from exc
        except (ValueError, IndexError, OverflowError, RecursionError) as exc:
            # what tarfile raises over extension headers that are not what they should be
            raise ShardTruncatedError(
                f"a header before byte {tarfile_.offset:,} cannot be read: "
                f"{type(exc).__name__}: {exc}"
            ) from exc


def iter_members(
    stream: BinaryIO,
    wanted: Callable[[str], bool],
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[Member]:
    """Walk the members of an open, seekable tar file in order.

    Args:
        stream: positioned at the start of the archive.
        wanted: told a member's name, says whether its content is read.
        max_member_bytes: a wanted member above this size is given without content.

    Raises:
        ShardUnreadableError: the bytes are no tar archive.
        ShardTruncatedError: the archive ends before its end-of-archive marker.
        StorageError: they cannot be read now.
    """
    try:
        with tarfile.open(
            # A name that is not UTF-8 is still a name, but Arrow could not hold its bytes.
            fileobj=stream, mode="r:", tarinfo=_StrictTarInfo,
            encoding="utf-8", errors="backslashreplace",
        ) as archive:  # fmt: skip
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if info.isdir() or info.ischr() or info.isblk() or info.isfifo():
                    continue
                member = Member(info.name, info.size, info)
                if not wanted(info.name):
                    pass
                elif not info.isreg() or info.issparse():
                    member.status = Status.MEMBER_UNREADABLE
                    member.error_message = f"{info.name} is a link or a sparse file, not plain data"
                elif info.size > max_member_bytes:
                    member.status = Status.MEMBER_OVERSIZED
                    member.error_message = (
                        f"{info.name} has {info.size:,} bytes, the limit is {max_member_bytes:,}"
                    )
                else:
                    stream.seek(info.offset_data)
                    content = stream.read(info.size)
                    if len(content) == info.size:
                        member.content = content
                    else:
                        member.status = Status.MEMBER_TRUNCATED
                        member.error_message = (
                            f"{info.name} is cut off: {len(content):,} of {info.size:,} bytes"
                        )
                yield member
    except (tarfile.TarError, EOFError) as exc:
        raise ShardTruncatedError(f"the archive ends early: {exc}") from exc


def iter_samples(
    url: str,
    wanted: Callable[[str], bool] = lambda extension: True,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    *,
    through: bool = True,
) -> Iterator[Sample]:
    """Read the samples of one shard, in order, without ever holding more than one.

    A shard that is damaged or ends early gives the samples that can be read and then one
    `Sample` with ``key=None`` that says what happened; so does one that has no sample.

    Args:
        url: a local path or any URL that pyarrow's filesystems open.
        wanted: told an extension, says whether such members are read.
        max_member_bytes: larger members make their sample fail instead of being read.
        through: most of it will be read, as `open_input` takes it.

    Raises:
        FileNotFoundError: there is no such shard.
        StorageError: it cannot be read now, which says nothing of what is in it.
    """
    seen: set[int] = set()  # hashes: a tenth of the memory of the keys
    sample: Sample | None = None
    fault: Sample | None = None

    def name_is_wanted(name: str) -> bool:
        parts = split_name(name)
        return parts is not None and wanted(parts[1])

    try:
        with open_input(url, through=through) as stream:
            for member in iter_members(stream, name_is_wanted, max_member_bytes):
                parts = split_name(member.name)
                if parts is None:
                    continue
                key, extension = parts
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                    if hash(key) in seen:
                        sample.fail(
                            Status.KEY_REPEATED,
                            f"members of key {key!r} stand in two places of the shard; "
                            "sort the tar by name",
                        )
                    seen.add(hash(key))
                _add_member(sample, extension, member)
    except ShardTruncatedError as exc:
        fault = Sample(None, status=Status.SHARD_TRUNCATED, error_message=str(exc))
    except ShardError as exc:
        fault = Sample(None, status=Status.SHARD_UNREADABLE, error_message=str(exc))
    if sample is not None:
        yield sample
    elif fault is None:
        fault = Sample(None, status=Status.SHARD_EMPTY, error_message="the archive has no samples")
    if fault is not None:
        yield fault


def iter_runs(stream: BinaryIO) -> Iterator[tuple[str, list[Member]]]:
    """Walk the samples of an open tar file without reading their content.

    Yields:
        A key, and the adjacent members that share it.

    Raises:
        ShardUnreadableError, ShardTruncatedError: after the last sample that has a header.
    """
    run: list[Member] = []
    run_key, fault = "", None
    try:
        for member in iter_members(stream, lambda name: False):
            parts = split_name(member.name)
            if parts is None:
                continue
            if run and parts[0] != run_key:
                yield run_key, run
                run = []
            run_key = parts[0]
            run.append(member)
    except ShardError as exc:
        fault = exc
    if run:
        yield run_key, run
    if fault is not None:
        raise fault


def _add_member(sample: Sample, extension: str, member: Member) -> None:
    if extension in sample.extensions:
        sample.fail(Status.MEMBER_DUPLICATED, f"two members with extension {extension!r}")
    elif member.status is not Status.OK:
        sample.fail(member.status, member.error_message or member.name)
    elif member.content is not None:
        sample.members[extension] = member.content
    sample.extensions.append(extension)
    header = member.header
    if header.isreg() and not header.issparse() and member.status is not Status.MEMBER_TRUNCATED:
        sample.locations.setdefault(extension, (header.offset_data, header.size))
