"""Arrow schema ↔ Spark schema, and how Spark is told a column's name."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_type, to_arrow_type
from pyspark.sql.types import StructField, StructType

__all__ = ["arrow_schema", "quoted", "spark_schema"]


def spark_schema(fields: Iterable[pa.Field]) -> StructType:
    """The Spark columns that hold these Arrow columns; all of them nullable."""
    return StructType(
        [
            StructField(field.name, from_arrow_type(field.type, prefer_timestamp_ntz=True))
            for field in fields
        ]
    )


def arrow_schema(schema: StructType) -> pa.Schema:
    """The Arrow columns that hold these Spark columns."""
    return pa.schema([pa.field(field.name, to_arrow_type(field.dataType)) for field in schema])


def quoted(name: str) -> str:
    """A column's name for `pyspark.sql.functions.col`, which reads ``a.b`` as a field of ``a``."""
    return f"`{name.replace('`', '``')}`"
