"""``format("webdataset")``: the DataFrame of `read_webdataset`, through Spark's data sources."""

import os

import pyspark
import pytest
from pyspark.sql.types import StructType
from test_spark import collected, core_rows  # noqa: F401  # a fixture

from examples.photographs import write_shard
from spark_nsfw import read_webdataset, register_webdataset, score_samples
from spark_nsfw.errors import InputError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.spark.datasource import WebDatasetSource
from spark_nsfw.spark.reader import list_shards

HAS_SOURCES = pyspark.__version__ >= "4"
needs_sources = pytest.mark.skipif(not HAS_SOURCES, reason="needs Spark 4 or later")


@pytest.fixture(scope="module")
def reader(spark):
    register_webdataset(spark)
    return lambda **options: spark.read.format("webdataset").options(**options)


@pytest.mark.skipif(HAS_SOURCES, reason="needs Spark 3.5")
def test_a_spark_without_data_sources_says_what_to_use_instead(spark):
    with pytest.raises(InputError, match="use read_webdataset"):
        register_webdataset(spark)


@needs_sources
@pytest.mark.parametrize(
    "options",
    [{}, {"captions": True}, {"columns": "width"}, {"columns": ""}, {"image_extensions": "png"}],
    ids=str,
)
def test_it_is_read_webdatasets_dataframe(spark, shards, reader, options):
    names = {"columns", "image_extensions"} & options.keys()
    same = options | {name: [n for n in options[name].split(",") if n] for name in names}
    expected = read_webdataset(spark, str(shards), **same)
    found = reader(**options).load(str(shards))
    assert found.schema == expected.schema
    assert sorted(found.collect(), key=str) == sorted(expected.collect(), key=str)


@needs_sources
def test_each_shard_is_a_partition(shards, reader):
    by_partition = reader().load(str(shards)).rdd.mapPartitions(lambda it: [{r.shard for r in it}])
    names = [f"0000{i}" for i in range(4)] + ["odd/00000"]
    assert sorted(map(list, by_partition.collect())) == [[name] for name in names]


@needs_sources
def test_it_is_scored_like_any_other(shards, embedder, reader, core_rows):  # noqa: F811
    assert collected(score_samples(reader().load(str(shards)), embedder)) == core_rows


@needs_sources
@pytest.mark.parametrize("option", ["schema", "images"])
def test_keys_alone_read_no_image(tmp_path, reader, option):
    """The images cannot be read, and nobody notices."""
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", [("a", [("jpg", b"x")]), ("b", [("jpg", b"x")])])
    source = reader(max_image_bytes=0)
    if option == "schema":
        source = source.schema("key string, shard string, status string")
    else:
        source = source.option("images", "false")
    frame = source.load(str(tmp_path))
    assert "image" not in frame.columns
    rows = frame.select("key", "shard", "status").orderBy("shard", "key").collect()
    assert rows == [(key, shard, "ok") for shard in "01" for key in "ab"]
    assert {row.status for row in reader(max_image_bytes=0).load(str(tmp_path)).collect()} == {
        "member_oversized"
    }


@needs_sources
def test_a_reader_of_keys_hands_no_image_to_arrow(shards):
    inputs = ShardInputs.parse(shards)
    reader = WebDatasetSource({"path": str(shards)}).reader(StructType().add("key", "string"))
    batches = [batch for part in reader.partitions() for batch in reader.read(part)]
    assert {tuple(batch.schema.names) for batch in batches} == {("key",)}
    assert sum(batch.nbytes for batch in batches) < 10_000
    assert sum(os.path.getsize(path) for path in inputs.list_paths()) > 1_000_000


@needs_sources
def test_several_paths_globs_and_ranges(shards, reader):
    both = reader().load([str(shards / "00000.tar"), str(shards / "00002.tar")])
    assert {row.shard for row in both.collect()} == {"00000", "00002"}
    ranged = reader().load(str(shards / "{00000..00001}.tar"))
    assert {row.shard for row in ranged.collect()} == {"00000", "00001"}


@needs_sources
@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({}, "nowhere", "does not exist, or has no shard"),
        ({"columns": "depth"}, "", "no column depth"),
        ({"images": "perhaps"}, "", "option images is true or false, not 'perhaps'"),
    ],
)
def test_what_cannot_be_is_said(shards, reader, options, path, message):
    with pytest.raises(pyspark.errors.PySparkException, match=message):
        reader(**options).load(str(shards / path)).collect()


@pytest.mark.parametrize(
    "pattern", ["", "0000[01].tar", "{00001..00003}.tar", "odd", "*/*.tar", "{odd,none}", "0*"]
)
def test_pyarrow_lists_the_shards_that_spark_lists(spark, shards, pattern):
    inputs = ShardInputs.parse(str(shards / pattern))
    expected = [path.removeprefix("file:") for path in list_shards(spark, inputs)]
    assert inputs.list_paths() == expected


@pytest.mark.parametrize("pattern", ["none", "*.gone", "{00000..00009}.tar"])
def test_pyarrow_refuses_what_spark_refuses(shards, pattern):
    with pytest.raises(InputError, match="does not exist, or has no shard"):
        ShardInputs.parse(str(shards / pattern)).list_paths()


def test_hidden_files_are_no_shards(spark, tmp_path):
    for name in ["a", ".b", "_c", "_d/x", ".e/x", "_f=1/x"]:
        write_shard(tmp_path / f"{name}.tar", [("0", [("jpg", b"x")])])
    inputs = ShardInputs.parse(tmp_path)
    expected = [path.removeprefix("file:") for path in list_shards(spark, inputs)]
    assert inputs.list_paths() == expected == [f"{tmp_path}/_f=1/x.tar", f"{tmp_path}/a.tar"]
