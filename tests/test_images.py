"""Where images lie in their shards, and reading one of them by that."""

import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_samples import described

from examples.photographs import damaged_samples, write_shard
from spark_nsfw import SampleOptions, iter_sample_batches, read_image
from spark_nsfw.errors import InputError, ShardUnreadableError, StorageError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.storage import RetryingFile
from spark_nsfw.use import thumbnails as thumbnails_module
from spark_nsfw.use.thumbnails import iter_thumbnails, refuse_none, samples_by_unit, thumbnails


def rows_of(directory, *names, **options):
    shards = [(str(directory / f"{name}.tar"), name) for name in names]
    batches = iter_sample_batches(shards, SampleOptions(**options))
    return pa.Table.from_batches(batches).to_pylist()


def locations(row):
    return row["image_offset"], row["image_num_bytes"]


@pytest.fixture
def tars(tmp_path, jpegs):
    """Images under short, long and foreign keys, and beside them what is no image."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    samples = [
        ("a", [("json", b"{}"), ("jpg", jpegs[0]), ("txt", b"cat")]),
        ("folder/b", [("seg.png", b"x"), ("png", jpegs[1]), ("jpg", jpegs[2])]),
        ("k" * 200, [("jpg", jpegs[3])]),
        ("ключ", [("JPG", jpegs[4])]),
        ("text", [("txt", b"no image")]),
        ("broken", [("jpg", b"this is no image")]),
        ("empty", [("jpg", b"")]),
    ]
    write_shard(tmp_path / "in" / "deep" / "00.tar", samples)
    return tmp_path / "in"


def test_images_are_read_by_the_place_that_a_row_tells(tars, jpegs):
    rows = {row["key"]: row for row in rows_of(tars, "deep/00")}
    expected = {
        "a": jpegs[0], "folder/b": jpegs[2], "k" * 200: jpegs[3], "ключ": jpegs[4],
        "broken": b"this is no image", "empty": b"",
    }  # fmt: skip
    for key, image in expected.items():
        assert read_image(rows[key], tars) == image
        assert rows[key]["image_num_bytes"] == len(image)
    assert locations(rows["text"]) == (None, None)
    with tarfile.open(tars / "deep" / "00.tar") as archive:
        offsets = {member.offset_data for member in archive if not member.name.endswith("txt")}
    assert {row["image_offset"] for row in rows.values()} - {None} < offsets


def test_the_places_are_those_of_the_images_in_order_of_preference(tars, jpegs):
    (row,) = [
        row
        for row in rows_of(tars, "deep/00", image_extensions=("png", "jpg"))
        if row["key"] == "folder/b"
    ]
    assert read_image(row, tars) == jpegs[1]


def test_rows_without_images_tell_their_places_too(tars):
    with_images, without = (rows_of(tars, "deep/00", images=i) for i in (True, False))
    assert [*map(locations, without)] == [*map(locations, with_images)]


def test_a_larger_image_than_is_read_has_a_place(tars, jpegs):
    row = rows_of(tars, "deep/00", max_image_bytes=len(jpegs[0]) - 1)[0]
    assert (row["key"], row["status"], row["image"]) == ("a", "member_oversized", None)
    assert read_image(row, tars) == jpegs[0]


def test_what_is_not_there_whole_has_no_place(tmp_path, jpegs):
    path = tmp_path / "s.tar"
    write_shard(path, [("a", [("jpg", jpegs[0])]), ("b", [("jpg", jpegs[1])])])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
    rows = rows_of(tmp_path, "s")
    assert [(row["key"], row["image_offset"] is None) for row in rows] == [
        ("a", False), ("b", False), ("c", True),
    ]  # fmt: skip
    cut = rows[1]["image_offset"] + len(jpegs[1]) - 1
    path.write_bytes(path.read_bytes()[:cut])
    first, second, shard = rows_of(tmp_path, "s")
    assert read_image(first, tmp_path) == jpegs[0]
    assert (second["status"], locations(second)) == ("member_truncated", (None, None))
    assert (shard["key"], locations(shard)) == (None, (None, None))


def test_an_image_at_the_very_end_of_a_file_is_read(tmp_path, jpegs):
    path = tmp_path / "s.tar"
    write_shard(path, [("a", [("jpg", jpegs[0])])])
    (row,) = rows_of(tmp_path, "s")
    path.write_bytes(path.read_bytes()[: 512 + len(jpegs[0])])
    assert read_image(row, tmp_path) == jpegs[0]


def test_of_two_members_with_one_extension_the_first_is_told(tmp_path, jpegs):
    write_shard(tmp_path / "s.tar", [("a", [("jpg", jpegs[0]), ("jpg", jpegs[1])])])
    (row,) = rows_of(tmp_path, "s")
    assert row["status"] == "member_duplicated"
    assert read_image(row, tmp_path) == jpegs[0]


def test_rows_of_spark_pandas_and_parquet_are_taken(spark, tars, tmp_path, jpegs):
    from spark_nsfw import read_webdataset

    frame = read_webdataset(spark, tars)
    assert read_image(frame.where("key = 'a'").first(), tars) == jpegs[0]
    table = frame.drop("image").toPandas()
    assert table["image_offset"].dtype == np.float64  # one is null
    for _, row in table[table["key"] == "folder/b"].iterrows():
        assert read_image(row, [tars]) == jpegs[2]
    (row,) = table[table["key"] == "text"].to_dict("records")
    with pytest.raises(InputError, match="deep/00/text has no image in its shard: image_missing"):
        read_image(row, tars)
    nullable = table.convert_dtypes()
    assert nullable["image_offset"].dtype == pd.Int64Dtype()
    with pytest.raises(InputError, match="no image in its shard"):
        read_image(nullable[nullable["key"] == "text"].iloc[0], tars)


@pytest.mark.parametrize("lacking", ["shard", "key", "image_offset", "image_num_bytes"])
def test_a_row_that_lacks_a_column_is_refused(tars, lacking):
    row = rows_of(tars, "deep/00")[0]
    del row[lacking]
    with pytest.raises(InputError, match=f"the row has no {lacking}: `spark-nsfw score`"):
        read_image(row, tars)


def test_another_place_than_that_of_the_shards_is_refused(tars, tmp_path):
    row = rows_of(tars, "deep/00")[0]
    with pytest.raises(InputError, match=r"deep/deep/00.tar does not exist: give what was scored"):
        read_image(row, tars / "deep")


@pytest.mark.parametrize("change", ["shorter", "other size", "other key", "no header", "gone"])
def test_a_shard_that_has_changed_since_is_told(tars, jpegs, change):
    path = tars / "deep" / "00.tar"
    row = rows_of(tars, "deep/00")[0]
    samples = [("a", [("json", b"{}"), ("jpg", jpegs[0])])]
    if change == "shorter":
        samples = [("a", [("json", b"{}")])]
    elif change == "other size":
        samples = [("a", [("json", b"{}"), ("jpg", jpegs[0] + b"x")])]
    elif change == "other key":
        samples = [("aa", [("json", b"{}"), ("jpg", jpegs[0])])]
    elif change == "no header":
        samples = [("a", [("jpg", bytes(1_000_000))])]
    write_shard(path, samples)
    if change == "gone":
        assert read_image(row, tars) == jpegs[0]
        path.unlink()
    error = InputError if change == "gone" else ShardUnreadableError
    message = "does not exist" if change == "gone" else r"has changed since it was scored"
    with pytest.raises(error, match=message):
        read_image(row, tars)


def test_offsets_outside_of_the_shard_are_told(tars):
    row = rows_of(tars, "deep/00")[0]
    size = (tars / "deep" / "00.tar").stat().st_size
    for offset in (-512, 0, 511, size - 1, size, 2**40):
        with pytest.raises(ShardUnreadableError, match="changed since"):
            read_image(row | {"image_offset": offset}, tars)


# Names → places


@pytest.mark.parametrize(
    ("inputs", "name", "place"),
    [
        (["/in"], "a/b", "/in/a/b.tar"),
        (["/in/a/b.tar"], "b", "/in/a/b.tar"),
        (["/in/*/{0..9}.tar"], "a/1", "/in/a/1.tar"),
        (["s3a://bucket/in"], "00", "s3a://bucket/in/00.tar"),
        (["s3a://bucket"], "00", "s3a://bucket/00.tar"),
        (["file:/in"], "00", "/in/00.tar"),
    ],
)
def test_the_place_of_a_shard_follows_from_its_name(inputs, name, place):
    found = ShardInputs.parse(inputs)
    assert found.place_of(name) == place
    assert found.shard_name(place) == name


def test_of_several_roots_the_one_that_has_the_shard_is_taken(tmp_path, jpegs):
    for place in ("one/a.tar", "two/b.tar", "two/deep/c.tar"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_shard(tmp_path / place, [("k", [("jpg", jpegs[0])])])
    inputs = ShardInputs.parse([tmp_path / "one", tmp_path / "two", tmp_path / "two" / "deep"])
    for unit in inputs.list_units():
        assert inputs.place_of(unit.name) == unit.place
    assert [unit.name for unit in inputs.list_units()] == ["a", "b", "c"]
    # Nobody has it: whichever is named does not exist.
    assert inputs.place_of("d").endswith("/d.tar")
    # It would be shard c, since names begin below the longest root.
    assert inputs.place_of("deep/c") != str(tmp_path / "two" / "deep" / "c.tar")


# Schemas


def test_a_source_tells_places_unless_an_output_goes_without(tmp_path):
    write_shard(tmp_path / "s.tar", described({"width": 1}))
    source = ShardSource(ShardInputs.parse(tmp_path))
    places = ["image_offset", "image_num_bytes"]
    ours = ["shard", "key", "width", "status", "error_message"]
    assert source.schema().names == [*ours[:3], "extra_json", *places, *ours[3:]]
    width = pa.field("width", pa.int64())
    old = source.schema([width])
    assert old.names == ours
    own = [width, *(pa.field(name, pa.int64()) for name in places)]
    new = source.schema(own)
    assert new.names == [*ours[:3], *places, *ours[3:]]
    (unit,) = source.units()
    for schema in (old, new):
        ((rows, _),) = source.read(unit, schema)
        assert rows.schema.equals(schema)
    assert rows["image_offset"].to_pylist() == [512]


def test_a_datasets_own_column_of_that_name_gets_a_prefix(tmp_path):
    write_shard(tmp_path / "s.tar", described({"image_offset": 7}))
    source = ShardSource(ShardInputs.parse(tmp_path))
    ((rows, _),) = source.read(source.units()[0], source.schema())
    assert rows["source_image_offset"].to_pylist() == [7]
    assert rows["image_offset"].to_pylist() == [512]


# Contact sheets

SHARDS = ShardSource(ShardInputs.parse("/nowhere"))


def thumbs(url, samples):
    return iter_thumbnails(("s", url, samples), SHARDS)


@pytest.fixture
def requests(monkeypatch):
    """Offset and length of every read of a `RetryingFile`."""
    asked = []

    def read_at(self, offset, length, original=RetryingFile.read_at):
        asked.append((offset, length))
        return original(self, offset, length)

    monkeypatch.setattr(RetryingFile, "read_at", read_at)
    return asked


def test_thumbnails_take_one_read_each_and_no_walk(tars, requests, monkeypatch):
    monkeypatch.setattr(thumbnails_module, "iter_runs", None)
    rows = [row for row in rows_of(tars, "deep/00") if row["status"] == "ok"][:4]
    samples = [(row["key"], *locations(row)) for row in rows]
    found = dict(thumbs(str(tars / "deep" / "00.tar"), samples))
    assert list(found) == [row["key"] for row in rows]
    assert requests == [(offset - 512, size + 512) for _, offset, size in samples]


def test_thumbnails_are_the_same_whether_places_are_known_or_wrong(tars):
    url = str(tars / "deep" / "00.tar")
    rows = [row for row in rows_of(tars, "deep/00") if row["image"]][:4]
    known = [(row["key"], *locations(row)) for row in rows]
    expected = dict(thumbs(url, known))
    assert len(expected) == 4
    assert dict(thumbs(url, [(key, None, None) for key, _, _ in known])) == expected
    wrong = [known[0], (known[1][0], 512, 7), *known[2:]]
    assert dict(thumbs(url, wrong)) == expected
    both = [*known, ("nobody", 512, 7), ("no one", None, None)]
    assert dict(thumbs(url, both)) == expected


def test_an_image_that_cannot_be_decoded_has_no_thumbnail(tmp_path):
    write_shard(tmp_path / "s.tar", damaged_samples())
    rows = rows_of(tmp_path, "s")
    samples = [(row["key"], *locations(row)) for row in rows if row["image_offset"] is not None]
    url = str(tmp_path / "s.tar")
    found = dict(thumbs(url, samples))
    assert found == dict(thumbs(url, [(key, None, None) for key, _, _ in samples]))
    assert 0 < len(found) < len(samples)


def test_a_shard_that_is_gone_has_no_thumbnails(tmp_path):
    samples = [("a", 512, 10), ("b", None, None)]
    assert thumbnails([("s", str(tmp_path / "s.tar"), samples)], SHARDS) == {}


def test_samples_go_with_their_places_by_shard(tars):
    source = ShardSource(ShardInputs.parse(tars))
    samples = [("deep/00", "a"), ("deep/00", "b"), ("deep/00", "a")]
    ((shard, url, found),) = samples_by_unit(samples, source, {("deep/00", "a"): (1024, 9)})
    assert (shard, url) == ("deep/00", str(tars / "deep" / "00.tar"))
    assert found == [("a", 1024, 9), ("b", None, None)]


def test_an_input_with_none_of_the_images_is_refused(tars):
    source = ShardSource(ShardInputs.parse(tars))
    units = samples_by_unit([("01", "a"), ("deep/00", "a")], source, {})
    drawn = thumbnails(units, source)
    assert [*drawn] == [("deep/00", "a")]
    refuse_none(drawn, units)
    refuse_none({}, [])
    with pytest.raises(InputError, match=r"such as a of .*/01\.tar: is that what was scored"):
        refuse_none(thumbnails(units[:1], source), units[:1])


def test_a_store_that_cannot_be_read_now_is_told(tars, monkeypatch):
    row = rows_of(tars, "deep/00")[0]
    monkeypatch.setattr("spark_nsfw.storage.RETRY_SECONDS", ())

    def fail(self, offset, length):
        raise StorageError("a bad moment")

    monkeypatch.setattr(RetryingFile, "read_at", fail)
    with pytest.raises(StorageError, match="a bad moment"):
        read_image(row, tars)
