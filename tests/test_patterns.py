"""Patterns that stand for ten thousand names, and what their braces mean."""

import random
import time

import pytest

from spark_nsfw.errors import InputError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.patterns import PathPattern, expand_braces, expand_ranges


@pytest.mark.parametrize(
    "pattern",
    ["a/{000..011}.tar", "{0..1}/{8..9}.tar", "plain.tar", "{08..101}", "{0..9..4}", "{a..c}",
     "{a,b}/{0..1}.tar", "{a,{3..5}}x", "{x}"],
)  # fmt: skip
def test_all_braces_expand_as_in_webdataset(pattern):
    from webdataset.shardlists import expand_urls

    assert expand_braces(pattern) == expand_urls(pattern)


@pytest.mark.parametrize("pattern", ["{5..3}", "{9..1..2}", "{a,{2..1}}"])
def test_a_range_that_runs_backwards_is_refused(pattern):
    for expand in (expand_braces, expand_ranges, PathPattern, ShardInputs.parse):
        with pytest.raises(InputError, match="backwards"):
            expand(pattern)


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
    assert time.process_time() - started < 5  # pattern by pattern it takes minutes


def test_ten_thousand_named_shards_are_looked_up_in_no_time(tmp_path):
    paths = [tmp_path / f"{number:05}.tar" for number in range(10_000)]
    for path in paths:
        path.touch()
    started = time.process_time()
    assert len(ShardInputs.parse(paths).list_units()) == 10_000
    assert time.process_time() - started < 5


def test_ranges_match_what_they_expand_to_and_nothing_else():
    pattern = "{0..2}/{08..11}/x{a,b}.tar"
    expanded = set(expand_braces(pattern))
    wanted = PathPattern(pattern)
    names = [*expanded, "3/08/xa.tar", "0/8/xa.tar", "0/12/xa.tar", "0/08/xc.tar", "0/08/xa.tar2"]
    random.Random(0).shuffle(names)
    assert {name for name in names if wanted.matches(name)} == expanded
    assert all(wanted.matches(f"{name}/below/it.tar") for name in expanded)


def test_each_name_of_a_range_is_asked_for_and_one_alternative_is_enough():
    wanted = PathPattern("{0..1}/{8..9}/x{a,b}.tar")
    matched = set().union(*map(wanted.matches, ["0/8/xa.tar", "0/9/xb.tar", "1/8/xb.tar"]))
    assert wanted.first_missing(matched) == "1/9/x{a,b}.tar"
    assert wanted.first_missing(matched | wanted.matches("1/9/xa.tar")) is None


def test_alternatives_may_have_slashes_and_ranges():
    wanted = PathPattern("{a/b,c}/{1..2}.tar")
    matched = wanted.matches("a/b/1.tar") | wanted.matches("c/1.tar")
    assert wanted.first_missing(matched) == "{a/b,c}/2.tar"
    assert wanted.first_missing(matched | wanted.matches("c/2.tar")) is None
    assert not wanted.matches("a/1.tar")


@pytest.mark.parametrize(
    ("pattern", "directory", "expected"),
    [
        ("*.tar", "", True),
        ("*.tar", "a", False),  # no name of a directory ends so
        ("*/0*.tar", "out", True),  # an export could write 00000.tar there
        ("*/*.tar", "out/deep", False),
        ("a/**/x.tar", "a/b/c", True),
        ("a/**/x.tar", "b", False),
        ("{00..09}/*.tar", "10", False),
        ("{00..09}", "09/deep", True),
        ("{a/b,c}/*.tar", "a", True),
        ("{a/b,c}/*.tar", "a/c", False),
    ],
)
def test_which_directories_could_hold_a_match(pattern, directory, expected):
    assert PathPattern(pattern).may_match_below(directory) is expected
