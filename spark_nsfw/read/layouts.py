"""Which files hold stored embeddings, and of which shard.

Three layouts of a directory are known::

    shard=00042/part-….parquet                            # ours, a partition per shard
    00042.parquet                                         # NeMo Curator's, a sidecar per shard
    img_emb/img_emb_7.npy, metadata/metadata_7.parquet    # clip-retrieval's, row by row
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from spark_nsfw.errors import InputError, NothingToReadError
from spark_nsfw.files import list_files
from spark_nsfw.read.source import Unit
from spark_nsfw.schema import SHARD
from spark_nsfw.storage import is_below

__all__ = ["PARTITION", "EmbeddingFile", "embedding_files", "files_of"]

#: A file in a partition of ours: its directory, and the shard's name, escaped.
PARTITION = re.compile(rf"((?:.*/)?{SHARD}=([^/]*))/", re.DOTALL)
_NPY = re.compile(r"(.*)img_emb/(img_emb_(\w+))\.npy\Z", re.DOTALL)


@dataclass(frozen=True)
class EmbeddingFile:
    """One file of stored embeddings.

    Attributes:
        shard: the name of the shard that its rows are of.
        place: of its unit: the partition's directory, the ``.npy``, or the file itself, as
            for a single file that was named.
        parquet: path or URL of the rows.
        npy: of their embeddings, (N, D) in the order of the rows; None where the rows
            have a column of them.
    """

    shard: str
    place: str
    parquet: str
    npy: str | None = None


def embedding_files(metadata: str) -> list[EmbeddingFile]:
    """The files of a directory, in whichever layout it has, or one Parquet file.

    Raises:
        NothingToReadError: there are none.
        InputError: an ``.npy`` without its Parquet.
    """
    root, names = list_files(metadata)
    parquet = {name for name in names if name.endswith(".parquet")}
    arrays = [match for match in map(_NPY.match, names) if match]
    files = []
    for match in arrays:
        rows = f"{match[1]}metadata/metadata_{match[3]}.parquet"
        if rows not in parquet:
            raise InputError(
                f"{root}{match[0]} has no {rows} beside it, which clip-retrieval writes: "
                "without it nobody knows what the embeddings are of"
            )
        npy = root + match[0]
        files.append(EmbeddingFile(match[1] + match[2], npy, root + rows, npy))
    if not arrays:
        is_file = len(names) == 1 and is_below(metadata, root + names[0])
        for name in sorted(parquet):
            file = root + name
            partition = PARTITION.match(file)  # the input may be one partition, or in one
            if partition:
                shard, place = unquote(partition[2]), partition[1]
            else:
                shard, place = name.removesuffix(".parquet"), file
            files.append(EmbeddingFile(shard, file if is_file else place, file))
    if not files:
        raise NothingToReadError(f"{metadata}: there are no Parquet files")
    return files


def files_of(unit: Unit) -> list[EmbeddingFile]:
    """The files of a unit, in the order of their names."""
    if not PARTITION.fullmatch(f"{unit.place}/"):
        array = _NPY.match(unit.place)
        if array is None:
            return [EmbeddingFile(unit.name, unit.place, unit.place)]
        rows = f"{array[1]}metadata/metadata_{array[3]}.parquet"
        return [EmbeddingFile(unit.name, unit.place, rows, unit.place)]
    root, names = list_files(unit.place)
    files = [
        EmbeddingFile(unit.name, unit.place, root + name)
        for name in names
        if name.endswith(".parquet")
    ]
    if not files:
        raise FileNotFoundError(f"{unit.place} has no Parquet file any more")
    return files
