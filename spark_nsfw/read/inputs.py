"""INPUT → its source: shards, image files or Parquet, by what is there or by what a user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_nsfw.errors import InputError, NothingToReadError
from spark_nsfw.read.image_files import FilesSource, suffixes_of
from spark_nsfw.read.image_tables import ParquetSource, has_images
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions, ShardSource
from spark_nsfw.read.source import ImageSource

__all__ = ["INPUT_FORMATS", "InputOptions", "open_source"]

_Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Of an input, looked for in this order: Parquet files beside shards are their sidecars, and those
#: beside image files, if they hold no images, a list of these.
INPUT_FORMATS = ("webdataset", "parquet", "files")


#: Shards that nobody reads, and that would be missed.
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class InputOptions:
    """How an input is read; what does not apply to its format is refused.

    Attributes:
        format: one of `INPUT_FORMATS`; None chooses by what is there.
        image_column: of Parquet; None takes the one that can hold images.
        id_col: column of the samples' ids; None takes ``key`` where there is one.
        columns: which of the dataset's own columns to keep; None keeps all, () none.
        captions: keep the ``.txt`` member of shards as column ``caption``.
        image_extensions: which members or files are images.
        settle_seconds: image files that changed since are not there yet.
    """

    format: str | None = None
    image_column: str | None = None
    id_col: str | None = None
    columns: Sequence[str] | None = None
    captions: bool = False
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    settle_seconds: float = 0


def open_source(
    paths: _Paths,
    options: InputOptions | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> ImageSource:
    """The source of an input.

    Args:
        paths: directories, files, globs or brace ranges, on one filesystem.
        options: how it is read.
        tell: is given a line about files that are passed over.

    Raises:
        NothingToReadError: there is nothing that can be read.
        InputError: an option that its format has not got, or what the source refuses.
        StorageError: it cannot be listed now.
    """
    options = options or InputOptions()
    format_ = options.format or _format_of(paths, options, tell)
    _refuse_options(format_, options)
    return _OPENERS[format_](paths, options)


def _shards(paths: _Paths, options: InputOptions) -> ImageSource:
    samples = SampleOptions(
        image_extensions=options.image_extensions,
        captions=options.captions,
        id_col=options.id_col or "key",
    )
    return ShardSource(ShardInputs.parse(paths), samples, options.columns)


def _parquet(paths: _Paths, options: InputOptions) -> ImageSource:
    return ParquetSource.open(
        paths,
        image_column=options.image_column,
        id_col=options.id_col,
        columns=options.columns,
    )


def _files(paths: _Paths, options: InputOptions) -> ImageSource:
    return FilesSource.of(paths, options.image_extensions, options.settle_seconds)


_OPENERS: dict[str, Callable[[_Paths, InputOptions], ImageSource]] = {
    "webdataset": _shards,
    "parquet": _parquet,
    "files": _files,
}

#: Options of `InputOptions` that a format has not got, by the names that users know.
_LACKING = {
    "webdataset": {"image_column": "--image-column"},
    "parquet": {"captions": "--captions"},
    "files": {
        "image_column": "--image-column",
        "id_col": "--id-col",
        "columns": "--columns",
        "captions": "--captions",
    },
}


def _refuse_options(format_: str, options: InputOptions) -> None:
    for name, flag in _LACKING[format_].items():
        if getattr(options, name):
            raise InputError(f"{flag} is not for --input-format {format_}")


def _format_of(paths: _Paths, options: InputOptions, tell: Callable[[str], None]) -> str:
    """The format of what is there, or of what is named.

    Raises:
        NothingToReadError: a place with nothing that can be read.
        InputError: shards are compressed.
    """
    suffixes = {
        "webdataset": (".tar",),
        "parquet": (".parquet",),
        "files": suffixes_of(options.image_extensions),
    }
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    for format_, endings in suffixes.items():
        if several and all(os.fspath(path).endswith(endings) for path in several):
            return format_
    every = (*(s for endings in suffixes.values() for s in endings), *_COMPRESSED)
    found: list[str] = []
    for path in several:
        try:
            found += ShardInputs.parse(path, every).list_files()
        except NothingToReadError as exc:
            raise NothingToReadError(
                f"{path} does not exist, or has no shard (*.tar), no *.parquet and no image file "
                f"(*.{', *.'.join(options.image_extensions[:4])}, …) in it"
            ) from exc
    of = {
        format_: [path for path in found if path.endswith(suffixes[format_])]
        for format_ in INPUT_FORMATS
    }
    compressed = [path for path in found if path.endswith(_COMPRESSED)]
    if compressed and not of["webdataset"]:
        raise InputError(
            f"{compressed[0]} is compressed, and shards are read as they are: decompress it "
            "(gunzip, unzstd), which costs little space, since images are compressed already"
        )
    if of["files"] and of["parquet"] and not has_images(of["parquet"][0]):
        of["parquet"] = []  # it tells of the files, as img2dataset's does
    chosen = next(format_ for format_ in INPUT_FORMATS if of[format_])
    passed_over = [*compressed, *(of["files"] if chosen != "files" else [])]
    if passed_over:
        others = f" and {len(passed_over) - 1:,} more" if len(passed_over) > 1 else ""
        tell(f"reading as --input-format {chosen}; passed over: {passed_over[0]}{others}")
    return chosen
