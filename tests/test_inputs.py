import os
import random
import re
import time

import pytest
from pyarrow import fs

from spark_nsfw.errors import InputError, NothingToReadError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.patterns import PathPattern, expand_braces, expand_ranges
from spark_nsfw.storage import _filesystem, resolve


@pytest.fixture
def files(tmp_path):
    """Makes empty files below a directory."""

    def touch(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(tmp_path)

    return touch


def names_of(*patterns):
    return [unit.name for unit in ShardInputs.parse(patterns).list_units()]


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


def test_a_unit_has_its_path_and_when_it_changed(files, tmp_path):
    root = files("b/1.tar", "a/2.tar")
    os.utime(tmp_path / "a/2.tar", (1_700_000_000, 1_700_000_000))
    first, second = ShardInputs.parse(root).list_units()
    assert (first.name, first.place) == ("a/2", f"{root}/a/2.tar")
    assert first.modified_seconds == 1_700_000_000
    assert second.name == "b/1"
    assert abs(second.modified_seconds - time.time()) < 60


def test_what_is_hidden_or_no_tar_is_not_listed(files):
    root = files(
        "0.tar", "day=1/1.tar", "_day=2/2.tar", "_x/3.tar", ".x/4.tar", "a/_y/5.tar", "_6.tar",
        ".7.tar", "8.tgz", "9.tar.part", "a/10.TAR", "a.tar/11",
    )  # fmt: skip
    assert names_of(root) == ["0", "_day=2/2", "day=1/1"]
    assert names_of(f"{root}/**/*.tar") == ["0", "_day=2/2", "day=1/1"]
    assert names_of(f"{root}/_6.tar") == ["_6"]  # named, it is read


def test_links_are_followed_and_circles_end(files, tmp_path):
    root = files("a/0.tar", "elsewhere/b/1.tar")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "over").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "nowhere.tar").symlink_to("/nonexistent.tar")
    assert names_of(f"{root}/a") == ["0", "over/b/1"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", ["0", "1"]),
        ("*", ["0", "1", "a/0", "a/b/2", "c/part-007-x", "c/part-008-y"]),
        ("*/0.tar", ["a/0"]),
        ("**/0.tar", ["0", "a/0"]),
        ("a/**", ["0", "b/2"]),
        ("?/b", ["a/b/2"]),
        ("[!a]", ["c/part-007-x", "c/part-008-y"]),
        ("[^a]/*8*", ["c/part-008-y"]),
        ("{0..1}.tar", ["0", "1"]),
        ("{a,c}/*", ["a/0", "a/b/2", "c/part-007-x", "c/part-008-y"]),
        ("{a/b,c}/*.tar", ["a/b/2", "c/part-007-x", "c/part-008-y"]),
        ("c/part-{007..008}-*.tar", ["part-007-x", "part-008-y"]),
        ("{[ab],c}/p*", ["c/part-007-x", "c/part-008-y"]),  # one alternative is enough
        ("{a/{0..0},c/part-00{7..8}*}*", ["a/0", "c/part-007-x", "c/part-008-y"]),
        ("{a,zz}/0.tar", ["a/0"]),
    ],
)
def test_globs(files, pattern, expected):
    root = files("0.tar", "1.tar", "a/0.tar", "a/b/2.tar", "c/part-007-x.tar", "c/part-008-y.tar")
    assert names_of(f"{root}/{pattern}") == expected


def test_a_shard_that_two_inputs_name_is_one(files):
    root = files("a/0.tar", "a/1.tar")
    assert names_of(f"{root}/a", f"{root}/a/0.tar", f"{root}/a/*.tar") == ["0", "1"]


def test_two_inputs_that_give_two_shards_one_name_are_refused_with_both_paths(files):
    root = files("a/0.tar", "b/0.tar")
    with pytest.raises(InputError, match=f"{root}/a/0.tar and {root}/b/0.tar would both be"):
        names_of(f"{root}/a", f"{root}/b")
    assert names_of(root) == ["a/0", "b/0"]  # one input above both keeps them apart


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ("1.tar", "1.tar"),
        ("empty", "empty"),
        ("{0..1}.tar", "1.tar"),
        ("x*.tar", "x*.tar"),
        ("{x,y}.tar", "{x,y}.tar"),
        ("{0,x}{7..8}.tar", "{0,x}7.tar"),
        ("{a,x}/{7..8}", "{a,x}/7"),
        ("{a/8,x}/{0..1}.tar", "{a/8,x}/0.tar"),
        ("a/{7..9}/*.tar", "a/7/*.tar"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_an_input_without_shards_is_refused(files, tmp_path, pattern, missing):
    root = files("0.tar", "a/8/x.tar", "notes.txt")
    (tmp_path / "empty").mkdir()
    message = re.escape(f"{root}/{missing} does not exist, or has no shard (*.tar) in it")
    for patterns in ([pattern, "0.tar"], [pattern]):
        with pytest.raises(NothingToReadError, match=message):
            names_of(*(f"{root}/{each}" for each in patterns))


def test_inputs_on_two_filesystems_are_refused():
    with pytest.raises(InputError, match="several filesystems"):
        ShardInputs.parse(["/a", "s3a://bucket/b"])


def test_a_bucket_is_its_root_directory():
    inputs = ShardInputs.parse("s3a://bucket")
    assert (inputs.filesystem, inputs.roots) == ("s3a://bucket", ("/",))
    assert ShardInputs.parse(["s3a://bucket", "s3a://bucket/a/b.tar"]).filesystem == "s3a://bucket"


@pytest.mark.parametrize("pattern", ["{5..3}.tar", "a/{0..1}/{00010..00009}.tar", "{9..1..2}"])
def test_a_range_that_runs_backwards_is_refused(pattern):
    with pytest.raises(InputError, match="backwards"):
        expand_braces(pattern)
    with pytest.raises(InputError, match="backwards"):
        ShardInputs.parse(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["a/{000..011}.tar", "{0..1}/{8..9}.tar", "plain.tar", "x{007..007}", "{08..101}", "{0..9..4}",
     "{a,b}/{0..1}.tar", "{a,{3..5}}x", "{x}", "{a..c}"],
)  # fmt: skip
def test_braces_expand_as_in_webdataset(pattern):
    from webdataset.shardlists import expand_urls

    assert expand_braces(pattern) == expand_urls(pattern)


@pytest.mark.parametrize("name", ["{00000000..99999999}.tar", "{0000..9999}{0000..9999}"])
def test_a_range_that_no_memory_holds_is_refused(name):
    with pytest.raises(InputError, match="stands for more than 1,000,000 names"):
        PathPattern(f"a/{name}")


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("{00000..09999}.tar", [f"{n:05}.tar" for n in range(10_000)]),
        ("*/{0000..0999}.tar", [f"d{n % 10}/{n // 10:04}.tar" for n in range(10_000)]),
        ("{0000..9999}/*.tar", [f"{n:04}/x.tar" for n in range(10_000)]),
        ("part-{0000..9999}-*.tar", [f"part-{n:04}-uuid.tar" for n in range(10_000)]),
        ("{000..099}/{000..099}.tar", [f"{n // 100:03}/{n % 100:03}.tar" for n in range(10_000)]),
        (f"{{{','.join(f'n{n}' for n in range(10_000))}}}", [f"n{n}" for n in range(10_000)]),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_ten_thousand_names_are_matched_in_no_time(pattern, paths):
    started = time.process_time()
    wanted = PathPattern(pattern)
    matched = [wanted.matches(path) for path in paths]
    assert all(len(each) == 1 for each in matched)
    assert wanted.first_missing(set().union(*matched)) is None
    assert not wanted.matches(paths[0] + "x")
    assert time.process_time() - started < 5  # name against name it takes minutes


def test_ranges_match_what_they_expand_to_and_nothing_else():
    pattern = "{0..2}/{08..11}/x{a,b}.tar"
    expanded = set(expand_braces(pattern))
    wanted = PathPattern(pattern)
    names = [*expanded, "3/08/xa.tar", "0/8/xa.tar", "0/12/xa.tar", "0/08/xc.tar", "0/08/xa.tar2"]
    random.Random(0).shuffle(names)
    assert {name for name in names if wanted.matches(name)} == expanded
    ranges = set().union(*map(wanted.matches, names))
    assert ranges == set(expand_ranges(pattern))
    assert wanted.first_missing(ranges) is None
    assert wanted.first_missing(ranges - {"1/09/x{a,b}.tar"}) == "1/09/x{a,b}.tar"
    assert all(wanted.matches(f"{name}/below/it.tar") for name in expanded)


@pytest.mark.parametrize(
    ("pattern", "output", "covered"),
    [
        ("in", "in", True),
        ("in/", "in/out", True),
        ("in", ".", True),
        ("in", "in2", False),
        ("in", "out", False),
        ("in/0.tar", "in", True),
        ("in/0.tar", "in/0.tar", True),
        ("in/0.tar", "in/out", False),
        ("in/*.tar", "in/out", False),
        ("in/*.tar", "in", True),
        ("in/*", "in/out", True),
        ("in/*/*.tar", "in/out", True),
        ("in/*/0*.tar", "in/out", True),  # an export could write 00000.tar there
        ("in/*/*.tar", "in/out/deep", False),
        ("in/**/*.tar", "in/out/deep", True),
        ("in/{a,b}/*.tar", "in/out", False),
        ("in/{a,b}/*.tar", "in/b", True),
        ("in/{00..09}", "in/10", False),
        ("in/{00..09}", "in/09/deep", True),
        ("link/*/*.tar", "in/out", True),
        ("in/*/*.tar", "link/out", True),
        ("link", "in/out", True),
    ],
)
def test_which_outputs_would_be_input(files, tmp_path, pattern, output, covered):
    root = files("in/0.tar")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for before in ("", "file:", "file://"):
        inputs = ShardInputs.parse(f"{root}/{pattern}")
        assert inputs.covers(f"{before}{root}/{output}") is covered
        assert inputs.covers(f"{before}{root}/{output}/") is covered


@pytest.mark.parametrize(
    ("pattern", "covered"), [("*/*.tar", True), ("", True), ("*.tar", False), ("x", False)]
)
def test_a_bucket_is_one_place_under_both_schemes(pattern, covered):
    inputs = ShardInputs.parse(f"s3a://bucket/in/{pattern}")
    assert inputs.covers("s3://bucket/in/out/") is covered
    assert not inputs.covers("s3://another/in/out/")


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
    ("path", "pattern", "listed"),
    [
        ("/dbfs/mnt/in/*.tar", "dbfs:/mnt/in/*.tar", "dbfs:/mnt/in/0.tar"),
        ("dbfs:/mnt/in", "dbfs:/mnt/in", "dbfs:/mnt/in/0.tar"),
        ("/Volumes/main/in", "/Volumes/main/in", "dbfs:/Volumes/main/in/0.tar"),
    ],
)
def test_databricks_paths_in_all_their_forms(monkeypatch, path, pattern, listed):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    inputs = ShardInputs.parse(path)
    assert inputs.patterns == (pattern,)
    assert inputs.shard_name(listed) == "0"


def test_a_directory_named_dbfs_is_no_mount_elsewhere(monkeypatch):
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    assert ShardInputs.parse("/dbfs/mnt").patterns == ("/dbfs/mnt",)


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
