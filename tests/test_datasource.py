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
    reader = WebDatasetSource({"path": str(shards)}).reader(StructType().add("key", "string"))
    batches = [batch for part in reader.partitions() for batch in reader.read(part)]
    assert {tuple(batch.schema.names) for batch in batches} == {("key",)}
    assert sum(batch.nbytes for batch in batches) < 10_000
    assert sum(os.path.getsize(path) for path in listed_by_us(shards)) > 1_000_000


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


def listed_by_spark(spark, pattern):
    """What Spark's own source of files finds for a directory or a glob."""
    files = spark.read.format("binaryFile").options(
        pathGlobFilter="*.tar", recursiveFileLookup="true"
    )
    return sorted(path.removeprefix("file://") for path in files.load(str(pattern)).inputFiles())


def listed_by_us(pattern):
    return sorted(unit.place for unit in ShardInputs.parse(str(pattern)).list_units())


@pytest.mark.parametrize(
    ("pattern", "for_spark"),
    [
        *((same, same) for same in ["", "0000[01].tar", "odd", "*/*.tar", "{odd,none}", "0*"]),
        ("0000[!0].tar", "0000[^0].tar"),
        ("{odd/00000,00001}.tar", "{odd/00000,00001}.tar"),
        ("{00001..00003}.tar", "{00001,00002,00003}.tar"),
    ],
)
def test_we_list_the_shards_that_spark_lists(spark, shards, pattern, for_spark):
    found = listed_by_us(shards / pattern)
    assert found == listed_by_spark(spark, shards / for_spark)
    assert found


@pytest.mark.parametrize("pattern", ["none", "*.gone", "{00000..00009}.tar"])
def test_we_refuse_what_is_not_there(shards, pattern):
    with pytest.raises(InputError, match="does not exist, or has no shard"):
        listed_by_us(shards / pattern)


def test_hidden_files_are_no_shards(spark, tmp_path):
    for name in ["a", ".b", "_c", "_d/x", ".e/x", "_f=1/x"]:
        write_shard(tmp_path / f"{name}.tar", [("0", [("jpg", b"x")])])
    assert listed_by_us(tmp_path) == [f"{tmp_path}/_f=1/x.tar", f"{tmp_path}/a.tar"]
    assert listed_by_us(tmp_path) == listed_by_spark(spark, tmp_path)
