"""Which shards an input names: directories, tars, globs and ranges, in real directories."""

import fnmatch
import itertools
import os
import random
import re
import time

import pytest
from pyarrow import fs

from spark_nsfw.errors import InputError, NothingToReadError, StorageError
from spark_nsfw.files import write_file
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.patterns import expand_ranges
from spark_nsfw.storage import _filesystem, resolve


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


def plant(directory, names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found_in(directory, *patterns):
    """The shards below a directory that patterns name, by their path in it."""
    inputs = ShardInputs.parse([f"{directory}/{pattern}" for pattern in patterns])
    return [unit.place.removeprefix(f"{directory}/") for unit in inputs.list_units()]


def test_a_unit_has_its_shards_name_place_and_age(tmp_path):
    plant(tmp_path, ["b/1.tar", "a.tar", "b/no.txt"])
    units = ShardInputs.parse(tmp_path).list_units()
    assert [(unit.name, unit.place) for unit in units] == [
        ("a", f"{tmp_path}/a.tar"),
        ("b/1", f"{tmp_path}/b/1.tar"),
    ]
    assert all(abs(unit.modified_seconds - time.time()) < 60 for unit in units)


def test_two_inputs_that_give_two_shards_one_name_are_refused_with_both_paths(tmp_path):
    plant(tmp_path, ["a/0.tar", "b/0.tar"])
    with pytest.raises(InputError, match=r"/a/0\.tar and .*/b/0\.tar would both be shard '0'"):
        found_in(tmp_path, "a", "b")


def test_one_input_above_both_keeps_them_apart(tmp_path):
    plant(tmp_path, ["a/0.tar", "b/0.tar"])
    units = ShardInputs.parse(tmp_path).list_units()
    assert [unit.name for unit in units] == ["a/0", "b/0"]


def test_a_shard_that_two_inputs_name_is_one(tmp_path):
    plant(tmp_path, ["a/0.tar", "a/1.tar"])
    assert found_in(tmp_path, "a/0.tar", "a", "a/{0..1}.tar", "a/*.tar") == ["a/0.tar", "a/1.tar"]


@pytest.mark.parametrize(
    "pattern", ["1.tar", "empty", "x*.tar", "{x,y}.tar", "0.txt", "0.tar/x", "none/*.tar", "*/*"]
)
def test_an_input_without_shards_is_refused(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    plant(tmp_path, ["0.tar", "0.txt"])
    with pytest.raises(NothingToReadError, match="does not exist, or has no shard"):
        found_in(tmp_path, "0.tar", pattern)


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [("{0..3}.tar", "2.tar"), ("{0..1}/x.tar", "1/x.tar"), ("{0..1}", "1"), ("{0,1}{0..1}*", "?1")],
)
def test_the_missing_one_of_a_range_is_named(tmp_path, pattern, missing):
    plant(tmp_path, ["0.tar", "1.tar", "3.tar", "0/x.tar", "00.tar"])
    name = missing.replace("?", "{0,1}")
    with pytest.raises(NothingToReadError, match=f"/{re.escape(name)}.* does not exist"):
        found_in(tmp_path, pattern)


def test_a_braces_alternative_may_be_missing(tmp_path):
    plant(tmp_path, ["a/0.tar"])
    assert found_in(tmp_path, "{a,b}/*.tar") == ["a/0.tar"]


def test_inputs_on_two_filesystems_are_refused():
    with pytest.raises(InputError, match="several filesystems"):
        ShardInputs.parse(["/a", "s3a://bucket/b"])
    assert ShardInputs.parse(["s3a://bucket", "s3a://bucket/a/b.tar"]).filesystem == "s3a://bucket"


def test_no_input_is_refused():
    with pytest.raises(InputError, match="no input"):
        ShardInputs.parse([])


def test_a_bucket_is_its_root_directory():
    inputs = ShardInputs.parse("s3a://bucket")
    assert (inputs.patterns, inputs.filesystem, inputs.roots) == (
        ("s3a://bucket/",),
        "s3a://bucket",
        ("/",),
    )


@pytest.mark.parametrize("pattern", ["{5..3}.tar", "{0..1}/{10..9}", "x{007..006}y"])
def test_a_range_that_runs_backwards_is_refused(pattern):
    with pytest.raises(InputError, match="backwards"):
        list(expand_ranges(pattern))
    with pytest.raises(InputError, match="backwards"):
        ShardInputs.parse(pattern)


def test_braces_expand_as_in_webdataset():
    from webdataset.shardlists import expand_urls

    for pattern in [
        "a/{000..011}.tar", "{0..1}/{8..9}.tar", "plain.tar", "x{007..007}", "{8..11}", "{00..9}",
        "s3://b/{0..1}.tar", "$HOME/{0..1}",
    ]:  # fmt: skip
        assert list(expand_ranges(pattern)) == expand_urls(pattern), pattern


def test_braces_without_a_range_are_left_alone():
    assert list(expand_ranges("{a,b}/{0..1}.tar")) == ["{a,b}/0.tar", "{a,b}/1.tar"]


NAMES = ["a.tar", "b.tar", "c.tar", "A.tar", "ab.tar", "d/a.tar", "d/e/a.tar", "f/e/b.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[!a].tar", ["A.tar", "b.tar", "c.tar"]),
        ("[^a].tar", ["A.tar", "b.tar", "c.tar"]),
        ("[a-b].tar", ["a.tar", "b.tar"]),
        ("?.tar", ["A.tar", "a.tar", "b.tar", "c.tar"]),
        ("*.tar", ["A.tar", "a.tar", "ab.tar", "b.tar", "c.tar"]),
        ("{a,b}.tar", ["a.tar", "b.tar"]),
        ("{a,d/e/a}.tar", ["a.tar", "d/e/a.tar"]),
        ("{d,f/e}/*.tar", ["d/a.tar", "f/e/b.tar"]),
        ("{d/e,f/e}", ["d/e/a.tar", "f/e/b.tar"]),
        ("d", ["d/a.tar", "d/e/a.tar"]),
        ("d/", ["d/a.tar", "d/e/a.tar"]),
        ("[df]", ["d/a.tar", "d/e/a.tar", "f/e/b.tar"]),
        ("*/e", ["d/e/a.tar", "f/e/b.tar"]),
        ("*/e/", ["d/e/a.tar", "f/e/b.tar"]),
        ("*/*.tar", ["d/a.tar"]),
        ("**/a.tar", ["a.tar", "d/a.tar", "d/e/a.tar"]),
        ("d/**/a.tar", ["d/a.tar", "d/e/a.tar"]),
        ("**/e/*.tar", ["d/e/a.tar", "f/e/b.tar"]),
        ("d/**", ["d/a.tar", "d/e/a.tar"]),
    ],
)  # fmt: skip
def test_globs(tmp_path, pattern, expected):
    plant(tmp_path, NAMES)
    assert sorted(found_in(tmp_path, pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "listed"),
    [
        ("*.tar", [""]),
        ("a/*.tar", ["a"]),
        ("b{1..2}/*.tar", ["", "b1", "b2"]),
        ("[ab]*/*.tar", ["", "a", "b1", "b2"]),
        ("{a,b1/x}/*.tar", ["", "a", "b1", "b1/x"]),
        ("b*", ["", "b1", "b1/x", "b2", "b2/x"]),
        ("b1/**/*.tar", ["b1", "b1/x"]),
    ],
)
def test_directories_that_cannot_hold_a_shard_are_not_listed(
    tmp_path, monkeypatch, pattern, listed
):
    """They may be huge, or closed to us."""
    plant(tmp_path, [f"{d}/x.tar" for d in ["a", "b1", "b2", "b1/x", "b2/x", "c", "c/y"]])
    plant(tmp_path, ["x.tar", "b1/x/y.tar"])
    seen = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    found_in(tmp_path, pattern)
    monkeypatch.undo()
    assert sorted(os.path.relpath(path, tmp_path).replace(".", "") for path in seen) == listed


def test_hidden_files_and_directories_hold_no_shard(tmp_path):
    plant(tmp_path, ["a.tar", ".b.tar", "_c.tar", "_d/x.tar", ".e/x.tar", "_f=1/x.tar", "g/_h.tar"])
    for pattern in ("", "**/*.tar", "{*,*/*}.tar"):
        assert found_in(tmp_path, pattern) == ["_f=1/x.tar", "a.tar"]
    with pytest.raises(NothingToReadError):
        found_in(tmp_path, "_d*")


def test_a_hidden_place_can_be_the_input_itself(tmp_path):
    plant(tmp_path, ["_d/x.tar"])
    assert found_in(tmp_path, "_d") == found_in(tmp_path, "_d/*.tar") == ["_d/x.tar"]


def test_links_to_directories_are_followed_and_loops_end(tmp_path):
    plant(tmp_path, ["real/0.tar", "elsewhere/1.tar"])
    (tmp_path / "real" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "gone.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "input").symlink_to(tmp_path / "real")
    assert found_in(tmp_path, "input") == ["input/0.tar", "input/link/1.tar"]


def test_an_input_that_cannot_be_listed_now_is_not_missing(s3):
    s3.proxy.fail("", "", times=None, status=403)
    for pattern in (s3.url, f"{s3.url}/x.tar", f"{s3.url}/*.tar"):
        with pytest.raises(StorageError):
            ShardInputs.parse(pattern).list_units()


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_a_bucket_is_listed_like_a_directory(s3, scheme):
    for name in ("a.tar", "d/b.tar", "d/_x/c.tar", ".d/x.tar", "d/_y=1/z.tar", "no.txt"):
        write_file(f"{s3.url}/{name}", b"")
    root = s3.url.replace("s3:", f"{scheme}:")
    for pattern in (root, f"{root}/"):
        units = ShardInputs.parse(pattern).list_units()
        assert [(unit.name, unit.place) for unit in units] == [
            (name, f"{root}/{name}.tar") for name in ("a", "d/_y=1/z", "d/b")
        ]
    (unit,) = ShardInputs.parse(f"{root}/d/{{b,c}}.tar").list_units()
    assert (unit.name, unit.place) == ("b", f"{root}/d/b.tar")
    (unit,) = ShardInputs.parse(f"{root}/d/b.tar").list_units()
    assert (unit.name, unit.place) == ("b", f"{root}/d/b.tar")
    with pytest.raises(NothingToReadError):
        ShardInputs.parse(f"{root}/none").list_units()
    with pytest.raises(NothingToReadError, match=r"/c\.tar"):
        ShardInputs.parse(f"{root}/d/c.tar").list_units()


@pytest.mark.parametrize(
    ("pattern", "output", "covered"),
    [
        ("/in", "/in", True),
        ("/in", "/in/", True),
        ("/in/", "/in/out", True),
        ("/in", "/", True),
        ("/in/deep", "/in", True),
        ("/in", "/input", False),
        ("/in", "/out", False),
        ("/in", "file:/in/out", True),
        ("file:///in", "/in/out", True),
        ("/in/0.tar", "/in", True),
        ("/in/0.tar", "/in/out", False),
        ("/in/0.tar", "/in/0.tar", True),
        ("/in/*.tar", "/in", True),
        ("/in/*.tar", "/in/out", False),
        ("/in/**/*.tar", "/in/out", True),
        ("/in/*/*.tar", "/in/out", True),
        ("/in/*", "/in/out", True),
        ("/in/a*/*.tar", "/in/out", False),
        ("/in/{a,out}/*.tar", "/in/out", True),
        ("/in/{0..3}", "/in/3", True),
        ("/in/{0..3}", "/in/4", False),
        ("/in/{0..3}.tar", "/in/out", False),
        ("s3://b/in", "s3://b/in/out", True),
        ("s3a://b/in", "s3://b/in/out", True),
        ("s3://b/in/*", "s3a://b/in/out", True),
        ("s3a://b", "s3://b/out", True),
        ("s3a://b/in", "s3a://b", True),
        ("s3a://b/in", "s3a://b/out", False),
        ("s3a://b", "s3a://c/out", False),
        ("s3a://b/in", "/in/out", False),
        ("/in", "s3a://b/in/out", False),
        ("/in/*/*.tar", "s3a://b/in/out", False),
    ],
)
def test_an_output_among_the_inputs_is_seen(pattern, output, covered):
    assert ShardInputs.parse(pattern).covers(output) is covered


def test_an_output_behind_a_link_is_seen(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for pattern in ("in", "in/*/*.tar", "in/a", "link", "link/*/*.tar"):
        inputs = ShardInputs.parse(tmp_path / pattern)
        for output in ("in/a", "link/a", "in", "link"):
            assert inputs.covers(str(tmp_path / output)), (pattern, output)
    assert not ShardInputs.parse(tmp_path / "in" / "*.tar").covers(str(tmp_path / "link" / "a"))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("{00000..09999}.tar", "{:05}.tar"), ("{00000..09999}/*.tar", "{:05}/x.tar")],
)
def test_ten_thousand_shards(tmp_path, pattern, name):
    names = [name.format(number) for number in range(10_000)]
    plant(tmp_path, [*names, "10000.tar", "10000/x.tar"])
    started = time.perf_counter()
    assert found_in(tmp_path, pattern) == names
    print(f"{pattern}: {time.perf_counter() - started:.2f} s")


def naive_matches(pattern, path):
    """The definition, by trying: a pattern names a path itself or a directory above it."""
    parts = path.split("/")
    return any(
        naive_segments(pattern.split("/"), parts[:length]) for length in range(1, len(parts) + 1)
    )


def naive_segments(patterns, names):
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(naive_segments(patterns[1:], names[start:]) for start in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and (
        naive_segments(patterns[1:], names[1:])
    )  # fmt: skip


def naive_alternatives(pattern):
    """Every choice of every pair of braces, which do not nest here."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [
        piece.split(",") if position % 2 else [piece] for position, piece in enumerate(pieces)
    ]
    return ["".join(choice) for choice in itertools.product(*choices)]


@pytest.mark.parametrize("seed", range(60))
def test_random_globs_name_what_trying_each_path_says(tmp_path, seed):
    rng = random.Random(seed)
    segments = ["a", "b", "ab", "1", "a.b", "c d", "ü", "x+", "(y)", "a,b", "$"]
    names = set()
    for _ in range(25):
        depth = rng.randint(0, 3)
        folders = [rng.choice(segments) + "0" for _ in range(depth)]
        names.add("/".join([*folders, rng.choice(segments) + ".tar"]))
    plant(tmp_path, names)
    globs = [
        "a*", "?", "*", "[ab]*", "[!a]*", "{a,b}*", "*b*", "{ab,1}0", "{a0,b0/ab0}", "[a-c]?",
        "*0", "x+*", "(y)*", "{a,b}.tar", "*.tar", "**",
    ]  # fmt: skip
    for _ in range(25):
        pattern = "/".join(rng.choice(globs) for _ in range(rng.randint(1, 4)))
        if pattern.endswith("**"):
            continue
        expected = {
            name
            for name in names
            if any(naive_matches(glob, name) for glob in naive_alternatives(pattern))
        }
        try:
            found = set(found_in(tmp_path, pattern))
        except NothingToReadError:
            found = set()
        assert found == expected, pattern


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
    ("path", "kept", "listed"),
    [
        ("/dbfs/mnt/in/*.tar", "dbfs:/mnt/in/*.tar", "dbfs:/mnt/in/0.tar"),
        ("dbfs:/mnt/in", "dbfs:/mnt/in", "dbfs:/mnt/in/0.tar"),
        ("/Volumes/main/in", "/Volumes/main/in", "dbfs:/Volumes/main/in/0.tar"),
    ],
)
def test_databricks_paths_in_all_their_forms(monkeypatch, path, kept, listed):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    inputs = ShardInputs.parse(path)
    assert inputs.patterns == (kept,)
    assert inputs.shard_name(listed) == "0"
    for output in ("/dbfs/mnt/in", "dbfs:/mnt/in"):
        assert inputs.covers(output) is ("mnt" in path)


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
