"""``spark.read.format("webdataset")``: shards as a data source of Spark 4."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from spark_nsfw.errors import InputError
from spark_nsfw.read.columns import SHARDS_FOR_COLUMNS, infer_from_first
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions, iter_sample_batches
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.schema import IMAGE, sample_schema
from spark_nsfw.spark.pools import reader_workers
from spark_nsfw.spark.types import arrow_fields, spark_schema

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
    with reader_workers(spark):
        spark.dataSource.register(WebDatasetSource)


class WebDatasetSource(DataSource):
    """Shards of samples, one row each with the encoded image.

    Spark makes an instance in a Python process of its own on the driver, where there is
    no session: the shards are listed with pyarrow.
    """

    @classmethod
    def name(cls) -> str:
        """What ``format`` is given."""
        return "webdataset"

    def schema(self) -> StructType:
        """The columns, the dataset's own as found in the first shard that has any.

        Raises:
            InputError: no shards, or an option that cannot be.
        """
        columns = _names(self.options.get("columns"))
        captions = self._flag("captions", False)
        passthrough: Sequence[pa.Field] = ()
        if columns is None or columns:
            shards = self._inputs.list_paths()[:SHARDS_FOR_COLUMNS]
            passthrough = infer_from_first(shards, self._id_col, columns, captions)
        fields = sample_schema(captions=captions, passthrough=passthrough)
        images = self._flag("images", True)
        return spark_schema(field for field in fields if images or field.name != IMAGE)

    def reader(self, schema: StructType) -> WebDatasetReader:
        """A reader of these columns, Spark's or the user's, and of nothing besides."""
        extensions = _names(self.options.get("image_extensions"))
        names = schema.fieldNames()
        captions = self._flag("captions", False)
        own = {*sample_schema(captions=captions).names}
        options = SampleOptions(
            image_extensions=extensions or IMAGE_EXTENSIONS,
            captions=captions,
            id_col=self._id_col,
            passthrough=tuple(field for field in arrow_fields(schema) if field.name not in own),
            max_image_bytes=int(self.options.get("max_image_bytes", MAX_MEMBER_BYTES)),
            images=IMAGE in names,
        )
        return WebDatasetReader(self._inputs, options, names)

    @property
    def _inputs(self) -> ShardInputs:
        if "path" in self.options:
            return ShardInputs.parse(self.options["path"])
        if "paths" in self.options:  # load([a, b]) hands over a list in JSON
            return ShardInputs.parse(json.loads(self.options["paths"]))
        raise InputError('no path: spark.read.format("webdataset").load(path)')

    @property
    def _id_col(self) -> str:
        return str(self.options.get("id_col", "key"))

    def _flag(self, option: str, default: bool) -> bool:
        value = str(self.options.get(option, default)).lower()
        if value not in ("true", "false"):
            raise InputError(f"option {option} is true or false, not {value!r}")
        return value == "true"


class WebDatasetReader(DataSourceReader):
    """Reads shards, each in a partition of its own.

    Args:
        inputs: where they are.
        options: what is read of a sample.
        names: the columns that are handed over, in this order.
    """

    def __init__(self, inputs: ShardInputs, options: SampleOptions, names: Sequence[str]) -> None:
        self.inputs = inputs
        self.options = options
        self.names = list(names)

    def partitions(self) -> Sequence[InputPartition]:
        """One per shard."""
        return [ShardPartition(path) for path in self.inputs.list_paths()]

    def read(self, partition: Any) -> Iterator[pa.RecordBatch]:
        """The samples of one shard."""
        shard = partition.path, self.inputs.shard_name(partition.path)
        for batch in iter_sample_batches([shard], self.options):
            yield batch.select(self.names)


class ShardPartition(InputPartition):
    """One shard."""

    def __init__(self, path: str) -> None:
        self.path = path


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())
