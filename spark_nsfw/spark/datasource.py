"""``spark.read.format("webdataset")``: shards as a data source of Spark 4."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from spark_nsfw.errors import InputError
from spark_nsfw.hadoop import HadoopSettings
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions, ShardSource
from spark_nsfw.read.source import Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.schema import IMAGE
from spark_nsfw.spark.cluster import reader_workers
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.types import arrow_schema, spark_schema
from spark_nsfw.spark.units import iter_unit_rows
from spark_nsfw.storage import settings, use_settings

if TYPE_CHECKING:
    from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
else:
    try:
        from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
    except ImportError:  # Spark 3.5 has no such thing; register_webdataset says so
        DataSource = DataSourceReader = InputPartition = object

__all__ = ["WebDatasetSource", "register_webdataset"]


def register_webdataset(spark: SparkSession) -> None:
    """Make ``spark.read.format("webdataset").load(path)`` known to a session.

    The DataFrame is the one of `read_webdataset`, each shard a partition. Options:
    ``id_col``, ``columns`` and ``image_extensions`` (names with commas between),
    ``captions`` and ``images`` (true or false), ``max_image_bytes``. With ``images``
    false there is no column ``image``, and no image is read.

    Spark does not tell a data source in Python which columns a query needs, so
    ``select("key")`` alone still reads the images. A schema does tell it:
    ``.schema("shard string, key string")`` gives these columns and reads no others.

    Args:
        spark: classic or Connect, of Spark 4.0 or later.

    Raises:
        InputError: this Spark has no data sources in Python.
    """
    if not hasattr(spark, "dataSource"):
        raise InputError(
            f"Spark {spark.version} has no data sources in Python, 4.0 and later have: "
            "use read_webdataset, which gives the same DataFrame"
        )
    adopt_stores(spark)
    adopted = settings()

    class ReachingSource(WebDatasetSource):
        """Travels with the session's settings of stores."""

        stores = adopted

    with reader_workers(spark):
        spark.dataSource.register(ReachingSource)


class WebDatasetSource(DataSource):
    """Shards of samples, one row each with the encoded image.

    Spark makes an instance in a Python process of its own on the driver, where there is
    no session: the shards are listed with pyarrow.
    """

    #: How it reaches stores.
    stores = HadoopSettings()

    @classmethod
    def name(cls) -> str:
        """What ``format`` is given."""
        return "webdataset"

    def schema(self) -> StructType:
        """The columns, the dataset's own as found in the first shard that has any.

        Raises:
            InputError: no shards, or an option that cannot be.
        """
        columns = self._source.schema()
        if self._flag("images", True):
            columns = columns.append(pa.field(IMAGE, pa.binary()))
        return spark_schema(columns)

    def reader(self, schema: StructType) -> WebDatasetReader:
        """A reader of these columns, Spark's or the user's, and of nothing besides."""
        names = schema.fieldNames()
        source = self._source
        ours = {*source.schema(()).names, IMAGE}
        own = [field for field in arrow_schema(schema) if field.name not in ours]
        options = replace(source.options, images=IMAGE in names)
        return WebDatasetReader(
            replace(source, options=options), source.schema(own), names, self.stores
        )

    @property
    def _source(self) -> ShardSource:
        use_settings(self.stores)
        options = SampleOptions(
            image_extensions=_names(self.options.get("image_extensions")) or IMAGE_EXTENSIONS,
            captions=self._flag("captions", False),
            id_col=str(self.options.get("id_col", "key")),
            max_image_bytes=int(self.options.get("max_image_bytes", MAX_MEMBER_BYTES)),
        )
        return ShardSource(self._inputs, options, _names(self.options.get("columns")))

    @property
    def _inputs(self) -> ShardInputs:
        if "path" in self.options:
            return ShardInputs.parse(self.options["path"])
        if "paths" in self.options:  # load([a, b]) hands over a list in JSON
            return ShardInputs.parse(json.loads(self.options["paths"]))
        raise InputError('no path: spark.read.format("webdataset").load(path)')

    def _flag(self, option: str, default: bool) -> bool:
        value = str(self.options.get(option, default)).lower()
        if value not in ("true", "false"):
            raise InputError(f"option {option} is true or false, not {value!r}")
        return value == "true"


class WebDatasetReader(DataSourceReader):
    """Reads shards, each in a partition of its own.

    Args:
        source: what is read.
        schema: the columns of its rows.
        names: the columns that are handed over, in this order.
        stores: how stores are reached.
    """

    def __init__(
        self,
        source: ShardSource,
        schema: pa.Schema,
        names: Sequence[str],
        stores: HadoopSettings,
    ) -> None:
        self.source = source
        self.columns = schema
        self.names = list(names)
        self.stores = stores

    def partitions(self) -> Sequence[InputPartition]:
        """One per shard."""
        use_settings(self.stores)
        return [ShardPartition(unit) for unit in self.source.units()]

    def read(self, partition: Any) -> Iterator[pa.RecordBatch]:
        """The samples of one shard."""
        use_settings(self.stores)
        for rows, images in iter_unit_rows([partition.unit], self.source, self.columns):
            arrays = dict(zip(rows.schema.names, rows.columns, strict=True))
            if IMAGE in self.names:
                arrays[IMAGE] = pa.array(images, pa.binary())
            yield pa.RecordBatch.from_pydict({name: arrays[name] for name in self.names})


class ShardPartition(InputPartition):
    """One shard."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())
