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

from spark_nsfw.errors import InputError, ShardUnreadableError
from spark_nsfw.read.naming import output_name, spark_type
from spark_nsfw.read.sidecar import Sidecar
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.schema import EXTRA_JSON

__all__ = [
    "SHARDS_FOR_COLUMNS",
    "Description",
    "describe",
    "infer_from_first",
    "infer_passthrough",
    "passthrough_arrays",
]

#: How many samples of a shard are looked at to type the keys of its JSON members.
_INFERENCE_SAMPLES = 100

#: How many shards are tried until one has columns.
SHARDS_FOR_COLUMNS = 16

#: How half of a surrogate pair is written in JSON, escaped or in bytes.
_MAY_BE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


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
        except FileNotFoundError:
            continue  # gone since it was listed
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
    samples = iter_samples(shard_url, lambda extension: extension == "json", through=False)
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
