"""Columns that a dataset brings along, from ``00042.parquet`` and ``.json`` members.

Their types are settled once per dataset, from one shard, because a DataFrame needs
them before it reads the rest. Nothing is lost by that: what a later sample has under
another name or of another type goes to the column ``extra_json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_nsfw.errors import InputError, ShardUnreadableError
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.schema import CAPTION, CONTRACT_COLUMNS, EXTRA_JSON, KEY
from spark_nsfw.storage import open_input

__all__ = [
    "SHARDS_FOR_COLUMNS",
    "Description",
    "Sidecar",
    "describe",
    "infer_from_first",
    "infer_passthrough",
    "output_name",
    "passthrough_arrays",
    "spark_type",
]

#: How many samples of a shard are looked at to type the keys of its JSON members.
_INFERENCE_SAMPLES = 100

#: How many shards are tried until one has columns.
SHARDS_FOR_COLUMNS = 16

#: Arrow types that Spark lacks, and the narrowest Spark has that holds all their values.
_SPARK_TYPES = {
    pa.null(): pa.string(),
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.date64(): pa.timestamp("us"),
    pa.timestamp("s"): pa.timestamp("us"),
    pa.timestamp("ms"): pa.timestamp("us"),
    pa.timestamp("ns"): pa.timestamp("us"),
}


#: How half of a surrogate pair is written in JSON, escaped or in bytes.
_MAY_BE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def spark_type(data_type: pa.DataType) -> pa.DataType:
    """The narrowest type that Spark has and that holds all values of this one."""
    if pa.types.is_dictionary(data_type):
        return spark_type(data_type.value_type)
    if (
        pa.types.is_list(data_type)
        or pa.types.is_large_list(data_type)
        or pa.types.is_fixed_size_list(data_type)
    ):
        return pa.list_(spark_type(data_type.value_type))
    if pa.types.is_timestamp(data_type) and data_type.tz is not None:
        return pa.timestamp("us", tz="UTC")
    if pa.types.is_struct(data_type):
        return pa.struct([(child.name, spark_type(child.type)) for child in data_type])
    return _SPARK_TYPES.get(data_type, data_type)


def output_name(source_name: str, id_col: str, captions: bool = False) -> str | None:
    """A dataset's column → its name beside ours.

    ``status`` → ``source_status``, and so does ``Status``, which is the same to Spark; with
    ``captions``, which are ours, ``caption`` → ``source_caption``. None for the id where it
    repeats our ``key``.
    """
    if source_name == id_col == KEY:
        return None
    taken = (*CONTRACT_COLUMNS, CAPTION) if captions else CONTRACT_COLUMNS
    return f"source_{source_name}" if source_name.casefold() in taken else source_name


class Sidecar:
    """The Parquet file beside a shard, its columns under their output names.

    Args:
        table: the file's rows.
        id_col: the column whose values are the samples' ids. A file that this package wrote
            has the samples' keys instead: after an export with new keys, a sample's JSON
            still names its old one.
        captions: the column ``caption`` is ours.

    Raises:
        ShardUnreadableError: the table has no such column.
    """

    def __init__(self, table: pa.Table, id_col: str, captions: bool = False) -> None:
        footer = (table.schema.metadata or {}).items()
        self.has_keys = any(b"spark_nsfw" in name + value for name, value in footer)
        if self.has_keys:
            id_col = KEY
        if id_col not in table.column_names:
            raise ShardUnreadableError(
                f"the sidecar has no column {id_col!r} to match samples by; "
                f"its columns are {', '.join(table.column_names)}"
            )
        self._ids_are_integers = pa.types.is_integer(table[id_col].type)
        self._row_of = {str(value): row for row, value in enumerate(table[id_col].to_pylist())}
        columns = {}
        for source_name in table.column_names:
            name = output_name(source_name, id_col, captions)
            if name is None or (self.has_keys and source_name in CONTRACT_COLUMNS):
                continue
            columns[name] = table[source_name].combine_chunks()
        self.columns: dict[str, pa.Array] = columns

    @classmethod
    def read(cls, shard_url: str, id_col: str, captions: bool = False) -> Sidecar | None:
        """The sidecar of a shard, or None where there is none.

        Raises:
            ShardUnreadableError: there is one, but it cannot be read or matched.
        """
        url = shard_url.removesuffix(".tar") + ".parquet"
        try:
            with open_input(url) as stream:
                return cls(pq.read_table(stream), id_col, captions)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, ShardUnreadableError) as exc:
            raise ShardUnreadableError(f"{url}: {exc}") from exc

    def row(self, sample_id: str) -> int | None:
        """The row of a sample, or None. Integer ids match keys with leading zeros."""
        if self._ids_are_integers and sample_id.isdecimal():
            sample_id = str(int(sample_id))
        return self._row_of.get(sample_id)


@dataclass
class Description:
    """One sample's JSON member, its keys under their output names.

    Attributes:
        sample_id: the value of the id column, None where the JSON has none.
        values: the object's other entries.
        problem: why there is no object, where the member is not a JSON object.
        raw: the member's text in that case.
    """

    sample_id: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    raw: str | None = None


def describe(content: bytes | None, id_col: str, captions: bool = False) -> Description:
    """Parse a ``.json`` member; what is no JSON object is kept as it is, with the reason.

    Half a surrogate pair, which is no character, becomes U+FFFD.
    """
    if content is None:
        return Description()
    try:
        parsed = json.loads(content)
        if not isinstance(parsed, dict):
            raise ValueError("it is not an object")
        if _MAY_BE_SURROGATE.search(content):
            text = json.dumps(parsed, ensure_ascii=False)
            parsed = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError) as exc:
        raw = content.decode("utf-8", "replace")
        return Description(problem=f"the .json member cannot be used: {exc}", raw=raw)
    named = ((output_name(name, id_col, captions), value) for name, value in parsed.items())
    return Description(
        sample_id=str(parsed[id_col]) if id_col in parsed else None,
        values={name: value for name, value in named if name is not None},
    )


def infer_from_first(
    shard_urls: Sequence[str],
    id_col: str,
    columns: Sequence[str] | None = None,
    captions: bool = False,
) -> list[pa.Field]:
    """`infer_passthrough` of the first of these shards that has any columns.

    An empty or damaged shard has none, and must not settle what all others have.

    Raises:
        InputError, ShardUnreadableError: the first that was met, if every shard raised one.
    """
    problems: list[Exception] = []
    for url in shard_urls:
        try:
            fields = infer_passthrough(url, id_col, columns, captions)
        except (InputError, ShardUnreadableError) as exc:
            problems.append(exc)
            continue
        if fields:
            return fields
    if problems and len(problems) == len(shard_urls):
        raise problems[0]
    return []


def infer_passthrough(
    shard_url: str, id_col: str, columns: Sequence[str] | None = None, captions: bool = False
) -> list[pa.Field]:
    """Settle the names and types of a dataset's own columns from one of its shards.

    Sidecar columns keep their types; the keys of JSON members get string, int64,
    float64 or boolean, and string (holding JSON) where they are nested or mixed.

    Args:
        shard_url: the shard to look at.
        id_col: the column that holds the sample id, in sidecar and JSON.
        columns: output names to keep; None keeps all of them.
        captions: the column ``caption`` is ours.

    Returns:
        One field per column under its output name; ``extra_json`` comes last where
        there are any and ``columns`` is None.

    Raises:
        InputError: ``columns`` names one that the shard does not have.
        ShardUnreadableError: the shard has a sidecar that cannot be read.
    """
    types: dict[str, pa.DataType] = {}
    samples = iter_samples(shard_url, lambda extension: extension == "json")
    for _, sample in zip(range(_INFERENCE_SAMPLES), samples, strict=False):
        for name, value in describe(sample.members.get("json"), id_col, captions).values.items():
            types[name] = _widen(types.get(name, pa.null()), _json_type(value))
    sidecar = Sidecar.read(shard_url, id_col, captions)
    if sidecar is not None:
        types = {name: array.type for name, array in sidecar.columns.items()} | {
            name: data_type for name, data_type in types.items() if name not in sidecar.columns
        }
    fields: dict[str, pa.Field] = {}
    taken: set[str] = set()
    for name, data_type in types.items():
        if name.casefold() not in taken:  # to Spark, `URL` and `url` are one column
            taken.add(name.casefold())
            fields[name] = pa.field(name, spark_type(data_type))
    if columns is None:
        extra = [pa.field(EXTRA_JSON, pa.string())] if fields else []
        return [*fields.values(), *extra]
    unknown = [name for name in columns if name not in fields]
    if unknown:
        raise InputError(
            f"no column {', '.join(unknown)} in the sidecar or the JSON of {shard_url}; "
            f"there are: {', '.join(fields) or 'none'}"
        )
    return [fields[name] for name in columns]


def _json_type(value: object) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return pa.int64()
    if isinstance(value, float):
        return pa.float64()
    return pa.string()


def _widen(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    if first == second or second == pa.null():
        return first
    if first == pa.null():
        return second
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def passthrough_arrays(
    fields: Sequence[pa.Field],
    keys: Sequence[str | None],
    descriptions: Sequence[Description],
    sidecar: Sidecar | None,
) -> list[pa.Array]:
    """The dataset's own columns for a batch of samples of one shard.

    Where sidecar and JSON both have a column, the sidecar's value wins.

    Args:
        fields: what `infer_passthrough` gave.
        keys: the samples' keys, None for rows that stand for a shard.
        descriptions: their JSON members.
        sidecar: of the shard that all these samples come from.

    Returns:
        One array per field, as long as ``keys``.
    """
    extras: list[dict[str, Any]] = [{} for _ in keys]
    from_sidecar: dict[str, pa.Array] = {}
    if sidecar is not None:
        rows = [
            None
            if key is None
            else sidecar.row(key if sidecar.has_keys else about.sample_id or key)
            for key, about in zip(keys, descriptions, strict=True)
        ]
        indices = pa.array(rows, pa.int64())
        from_sidecar = {name: array.take(indices) for name, array in sidecar.columns.items()}

    arrays = {}
    for wanted in fields:
        if wanted.name == EXTRA_JSON:
            continue
        values = [about.values.get(wanted.name) for about in descriptions]
        array = _typed(values, wanted, extras)
        if wanted.name in from_sidecar:
            array = pc.coalesce(_cast(from_sidecar[wanted.name], wanted, extras), array)
        arrays[wanted.name] = array

    if not any(wanted.name == EXTRA_JSON for wanted in fields):
        return list(arrays.values())
    for about, extra in zip(descriptions, extras, strict=True):
        extra.update((name, about.values[name]) for name in about.values.keys() - arrays.keys())
    for name in from_sidecar.keys() - arrays.keys():
        for value, extra in zip(from_sidecar[name].to_pylist(), extras, strict=True):
            if value is not None:
                extra[name] = value
    arrays[EXTRA_JSON] = pa.array(
        [
            json.dumps(about.raw if about.raw is not None else extra, default=str)
            if extra or about.raw is not None
            else None
            for about, extra in zip(descriptions, extras, strict=True)
        ],
        pa.string(),
    )
    return [arrays[wanted.name] for wanted in fields]


def _typed(values: list[Any], wanted: pa.Field, extras: list[dict[str, Any]]) -> pa.Array:
    """Python values as the column's type; one that does not fit goes to its row's extras."""
    if all(_is_of(value, wanted.type) for value in values):
        return pa.array(values, wanted.type)
    fitted = [_fit(value, wanted, extra) for value, extra in zip(values, extras, strict=True)]
    return pa.array(fitted, wanted.type)


def _is_of(value: Any, data_type: pa.DataType) -> bool:
    """Whether it goes into a column of this type as it is, in the common cases."""
    if value is None:
        return True
    if isinstance(value, str):
        return bool(pa.types.is_string(data_type))
    if isinstance(value, bool):
        return bool(pa.types.is_boolean(data_type))
    if isinstance(value, int):
        return bool(data_type == pa.int64()) and -(2**63) <= value < 2**63
    return isinstance(value, float) and bool(pa.types.is_floating(data_type))


def _fit(value: Any, wanted: pa.Field, extra: dict[str, Any]) -> Any:
    if _is_of(value, wanted.type):
        return value
    if pa.types.is_string(wanted.type):
        return json.dumps(value, default=str)
    try:
        fitted = pa.scalar(value, wanted.type).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        fitted = None
    # Arrow takes 0.97 into a column of integers as 0, True into one of numbers as 1.
    if fitted == value and isinstance(value, bool) == pa.types.is_boolean(wanted.type):
        return fitted
    extra[wanted.name] = value
    return None


def _cast(array: pa.Array, wanted: pa.Field, extras: list[dict[str, Any]]) -> pa.Array:
    try:
        return array.cast(wanted.type)
    except pa.ArrowException:
        return _typed(array.to_pylist(), wanted, extras)
