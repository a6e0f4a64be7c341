"""What a dataset's own columns are called beside ours, and which types Spark has for them."""

from __future__ import annotations

import pyarrow as pa

from spark_nsfw.schema import CAPTION, CONTRACT_COLUMNS, KEY

__all__ = ["output_name", "spark_type"]

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


def spark_type(data_type: pa.DataType) -> pa.DataType:
    """The narrowest type that Spark has and that holds all values of this one."""
    if pa.types.is_dictionary(data_type):
        return spark_type(data_type.value_type)
    if pa.types.is_time(data_type):
        return pa.string()  # 12:34:56.789
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
