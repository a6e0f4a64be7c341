import re

import pytest
from pyarrow import fs

from spark_nsfw.errors import InputError
from spark_nsfw.read.paths import ShardInputs, _digit_globs, _regex
from spark_nsfw.storage import _filesystem, expand_braces, resolve


@pytest.mark.parametrize(
    ("path", "shard", "name"),
    [
        ("/data", "file:/data/00000.tar", "00000"),
        ("/data/", "file:/data/a/00000.tar", "a/00000"),
        ("/data/*/x*.tar", "file:/data/b/x1.tar", "b/x1"),
        ("/data/00000.tar", "file:/data/00000.tar", "00000"),
        ("/data/{00000..00009}.tar", "file:/data/00003.tar", "00003"),
        ("s3a://bucket/a b", "s3a://bucket/a b/c.tar", "c"),
        ("s3a://bucket", "s3a://bucket/a/c.tar", "a/c"),
        ("s3a://bucket/*.tar", "s3a://bucket/c.tar", "c"),
        ("hdfs:///data", "hdfs://namenode:8020/data/x.tar", "x"),
        ("file:///data", "file:/data/00000.tar", "00000"),
    ],
)
def test_a_shard_is_named_by_its_path_below_the_input(path, shard, name):
    assert ShardInputs.parse(path).shard_name(shard) == name


def test_two_inputs_that_give_two_shards_one_name_are_refused_with_both_paths():
    inputs = ShardInputs.parse(["/a", "/b"])
    with pytest.raises(InputError, match=r"/a/0.tar and file:/b/0.tar would both be shard '0'"):
        inputs.check(["file:/a/0.tar", "file:/b/0.tar"])


def test_one_input_above_both_keeps_them_apart():
    inputs = ShardInputs.parse("/data")
    inputs.check(["file:/data/a/0.tar", "file:/data/b/0.tar"])


@pytest.mark.parametrize(
    "path", ["/data/1.tar", "/empty", "/data/{0..1}.tar", "/data/x*.tar", "/data/{x,y}.tar"]
)
def test_an_input_without_shards_is_refused(path):
    with pytest.raises(InputError, match="does not exist, or has no shard"):
        ShardInputs.parse([path, "/data/0.tar"]).check(["file:/data/0.tar"])


def test_inputs_on_two_filesystems_are_refused():
    with pytest.raises(InputError, match="several filesystems"):
        ShardInputs.parse(["/a", "s3a://bucket/b"])


def test_several_inputs_are_one_glob():
    assert ShardInputs.parse(["/a", "/b/{0..1}.tar"]).glob == "/{a,b/{[0-1]}.tar}"
    assert ShardInputs.parse(["s3a://x/a", "s3a://x/b"]).glob == "s3a://x/{a,b}"


def test_a_bucket_is_its_root_directory():
    inputs = ShardInputs.parse("s3a://bucket")
    assert (inputs.glob, inputs.filesystem, inputs.roots) == (
        "s3a://bucket/",
        "s3a://bucket",
        ("/",),
    )
    inputs.check(["s3a://bucket/x.tar"])
    assert ShardInputs.parse(["s3a://bucket", "s3a://bucket/a/b.tar"]).filesystem == "s3a://bucket"


def test_a_comma_among_several_inputs_is_refused_and_alone_it_is_not():
    with pytest.raises(InputError, match=r"/d/a,b has a comma.* give it alone, or with \?"):
        ShardInputs.parse(["/d/a,b", "/d/c"]).glob  # noqa: B018
    assert ShardInputs.parse("/d/a,b").glob == "/d/a,b"
    assert ShardInputs.parse(["/d/{a,b}", "/d/c"]).glob == "/{d/{a,b},d/c}"
    assert ShardInputs.parse(["/d/a?b", "/d/c"]).glob == "/{d/a?b,d/c}"


@pytest.mark.parametrize(
    ("first", "last"),
    [(0, 0), (0, 99), (3, 97), (0, 1234), (17, 4321), (999, 1000), (12, 19), (100, 8999)],
)
def test_digit_globs_match_their_range_and_nothing_else(first, last):
    globs = _digit_globs(f"{first:04d}", f"{last:04d}")
    pattern = re.compile("|".join(f"(?:{_regex(glob)})" for glob in globs))
    matched = [n for n in range(10_000) if pattern.fullmatch(f"{n:04d}")]
    assert matched == list(range(first, last + 1))
    assert len(globs) < 40


def test_a_range_that_runs_backwards_is_refused():
    with pytest.raises(InputError, match="backwards"):
        expand_braces("{5..3}.tar")


def test_braces_expand_as_in_webdataset():
    from webdataset.shardlists import expand_urls

    for pattern in ["a/{000..011}.tar", "{0..1}/{8..9}.tar", "plain.tar", "x{007..007}"]:
        assert expand_braces(pattern) == expand_urls(pattern)


def test_braces_without_a_range_are_left_alone():
    assert expand_braces("{a,b}/{0..1}.tar") == ["{a,b}/0.tar", "{a,b}/1.tar"]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/data/a b.tar", "/data/a b.tar"),
        ("file:/data/50%25.tar", "/data/50%25.tar"),
        ("file:///data/50%25.tar", "/data/50%.tar"),
        ("dbfs:/mnt/x.tar", "/dbfs/mnt/x.tar"),
        ("dbfs:/Volumes/main/x.tar", "/Volumes/main/x.tar"),
        ("/Volumes/main/x.tar", "/Volumes/main/x.tar"),
    ],
)
def test_local_urls_resolve(url, path):
    assert resolve(url)[1] == path


@pytest.mark.parametrize(
    ("path", "glob", "listed"),
    [
        ("/dbfs/mnt/in/*.tar", "dbfs:/mnt/in/*.tar", "dbfs:/mnt/in/0.tar"),
        ("dbfs:/mnt/in", "dbfs:/mnt/in", "dbfs:/mnt/in/0.tar"),
        ("/Volumes/main/in", "/Volumes/main/in", "dbfs:/Volumes/main/in/0.tar"),
    ],
)
def test_databricks_paths_in_all_their_forms(monkeypatch, path, glob, listed):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    inputs = ShardInputs.parse(path)
    assert inputs.glob == glob
    inputs.check([listed])
    assert inputs.shard_name(listed) == "0"


def test_a_directory_named_dbfs_is_no_mount_elsewhere(monkeypatch):
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    assert ShardInputs.parse("/dbfs/mnt").glob == "/dbfs/mnt"


def test_object_stores_resolve_under_hadoops_names_too():
    filesystem, path = resolve("gcs://bucket/some key/x.tar")
    assert (filesystem.type_name, path) == ("gcs", "bucket/some key/x.tar")


@pytest.mark.parametrize(
    "url",
    [
        "wasbs://container@account.blob.core.windows.net/a/b.tar",
        "wasb://container@account.blob.core.windows.net/a/b.tar",
        "abfss://container@account.dfs.core.windows.net/a/b.tar",
        "abfss://container@account.blob.core.windows.net/a/b.tar",
    ],
)
def test_azures_container_is_part_of_the_path(url):
    filesystem, path = resolve(url)
    assert (filesystem.type_name, path) == ("abfs", "container/a/b.tar")


def test_hdfs_without_a_namenode_is_the_configured_one(monkeypatch):
    made = []
    monkeypatch.setattr(
        fs, "HadoopFileSystem", lambda *args, **options: made.append((args, options))
    )
    assert resolve("hdfs:///data/x.tar")[1] == "/data/x.tar"
    assert made == [(("default",), {"port": 0})]
    _filesystem.cache_clear()


def test_an_unknown_filesystem_is_refused():
    with pytest.raises(InputError, match="ftp://host"):
        resolve("ftp://host/x.tar")
