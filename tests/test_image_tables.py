"""Parquet files with images: which column, which key, what a row becomes."""

import datetime
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring import run_into

from examples.photographs import write_shard
from spark_nsfw import SampleOptions, Scorer, iter_sample_batches, storage
from spark_nsfw.errors import InputError, NothingToReadError, StorageError
from spark_nsfw.read import image_tables
from spark_nsfw.read.image_tables import ParquetSource
from spark_nsfw.read.inputs import INPUT_FORMATS, InputOptions, open_source
from spark_nsfw.storage import RetryingFile


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows_of(source):
    """Every row with its image, as a dict."""
    found = []
    for unit in source.units():
        for rows, images in source.read(unit, source.schema()):
            assert rows.schema.equals(source.schema())
            assert len(images) == rows.num_rows
            found += [row | {"image": i} for row, i in zip(rows.to_pylist(), images, strict=True)]
    return found


HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


# Images


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary(3)])
def test_images_may_be_bytes(tmp_path, type_):
    write(tmp_path / "a.parquet", jpg=pa.array([b"one", None, b"two"], type_))
    rows = rows_of(ParquetSource.open(tmp_path))
    assert [row["image"] for row in rows] == [b"one", None, b"two"]
    assert [row["status"] for row in rows] == ["ok", "image_missing", "ok"]
    assert [row["error_message"] for row in rows] == [None, "the row has no image", None]
    assert [(row["shard"], row["key"]) for row in rows] == [("a", "0"), ("a", "1"), ("a", "2")]


def test_images_may_be_hugging_faces(tmp_path):
    (tmp_path / "beside.jpg").write_bytes(b"from a file")
    images = [
        {"bytes": b"held", "path": "nowhere.jpg"},
        {"bytes": None, "path": "beside.jpg"},
        {"bytes": None, "path": str(tmp_path / "beside.jpg")},
        {"bytes": None, "path": "nowhere.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": None},
    ]
    write(tmp_path / "a.parquet", image=pa.array(images, HUGGING_FACE))
    rows = rows_of(ParquetSource.open(tmp_path))
    held = [b"held", b"from a file", b"from a file", None, None, None, b""]
    assert [row["image"] for row in rows] == held
    missing = [row["key"] for row in rows if row["status"] == "image_missing"]
    assert missing == ["3", "4", "5"]
    assert rows[3]["error_message"].startswith(f"{tmp_path}/nowhere.jpg does not exist")


def test_what_lies_below_a_null_is_not_read(tmp_path):
    held = [pa.array([b"stale", b"x"]), pa.array(["a.jpg", None])]
    mask = pa.array([True, False])
    images = pa.StructArray.from_arrays(held, fields=[*HUGGING_FACE], mask=mask)
    source = ParquetSource.open(write(tmp_path / "a.parquet", image=images))
    found = list(source._images(images, source.units()[0]))
    assert [image.content for image in found] == [None, b"x"]


def test_a_struct_without_paths_is_taken(tmp_path):
    type_ = pa.struct([("bytes", pa.binary())])
    write(tmp_path / "a.parquet", image=pa.array([{"bytes": b"x"}], type_))
    assert [row["image"] for row in rows_of(ParquetSource.open(tmp_path))] == [b"x"]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_images_may_be_paths_if_the_column_is_named(tmp_path, type_):
    (tmp_path / "a.jpg").write_bytes(b"here")
    paths = ["a.jpg", f"file://{tmp_path}/a.jpg", "b.jpg", None, ""]
    write(tmp_path / "t.parquet", file=pa.array(paths, type_))
    with pytest.raises(InputError, match=r"no column of images; there are file .*--image-column"):
        ParquetSource.open(tmp_path)
    rows = rows_of(ParquetSource.open(tmp_path, image_column="file"))
    assert [row["image"] for row in rows] == [b"here", b"here", None, None, None]
    assert {row["status"] for row in rows[2:]} == {"image_missing"}


def test_images_at_the_limit_are_read_and_larger_ones_are_not(tmp_path):
    (tmp_path / "five.jpg").write_bytes(b"12345")
    (tmp_path / "six.jpg").write_bytes(b"123456")
    images = [
        {"bytes": b"12345"}, {"bytes": b"123456"}, {"path": "five.jpg"}, {"path": "six.jpg"},
    ]  # fmt: skip
    write(tmp_path / "a.parquet", image=pa.array(images, HUGGING_FACE))
    rows = rows_of(ParquetSource.open(tmp_path, max_image_bytes=5))
    assert [row["status"] for row in rows] == ["ok", "member_oversized"] * 2
    assert [row["image"] for row in rows] == [b"12345", None] * 2
    assert "6 bytes, the limit is 5" in rows[1]["error_message"]


def test_a_file_of_a_row_that_cannot_be_read_now_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"x")
    write(tmp_path / "a.parquet", image=pa.array([{"path": "a.jpg"}], HUGGING_FACE))
    source = ParquetSource.open(tmp_path)
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    original = RetryingFile.read_at

    def fail(self, offset, length):
        if self.url.endswith(".jpg"):
            raise StorageError("a bad moment")
        return original(self, offset, length)

    monkeypatch.setattr(RetryingFile, "read_at", fail)
    with pytest.raises(StorageError, match="a bad moment"):
        rows_of(source)


# Which column


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"jpg": b"", "sha": b""}, "jpg"),
        ({"IMAGE": b"", "mask": b""}, "IMAGE"),
        ({"photo": b"", "name": "x"}, "photo"),
    ],
)
def test_of_several_columns_the_one_with_an_images_name_is_taken(tmp_path, columns, chosen):
    write(tmp_path / "a.parquet", **{name: [value] for name, value in columns.items()})
    assert ParquetSource.open(tmp_path).image_column == chosen


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": b"", "jpg": b""}, {}, r"image and jpg could each be the images; choose with"),
        ({"one": b"", "two": b""}, {}, r"one and two could each be the images"),
        ({"url": ""}, {}, r"no column of images; there are url \(string\)"),
        ({"a": b""}, {"image_column": "b"}, r"no column 'b' for --image-column; there are a"),
        ({"a": 1}, {"image_column": "a"}, r"column 'a' is int64; images are binary, struct"),
        ({"a": [b""]}, {}, r"no column of images; there are a \(list"),
        ({"a": b""}, {"id_col": "b"}, r"no column 'b' for --id-col \(id_col\); there are a"),
        ({"a": b""}, {"columns": ["b", "c"]}, r"no column b, c; there are a"),
    ],
)
def test_columns_that_cannot_be_are_refused(tmp_path, columns, options, message):
    write(tmp_path / "a.parquet", **{name: [value] for name, value in columns.items()})
    with pytest.raises(InputError, match=message):
        ParquetSource.open(tmp_path, **options)


def test_two_columns_of_images_are_told_apart_by_name(tmp_path):
    write(tmp_path / "a.parquet", image=[b"1"], jpg=[b"2"])
    source = ParquetSource.open(tmp_path, image_column="jpg")
    (row,) = rows_of(source)
    assert (row["image"], row["key"]) == (b"2", "0")
    assert source.schema().field("source_image").type == pa.binary()
    assert row["source_image"] == b"1"


# Keys and the dataset's own columns


@pytest.mark.parametrize(
    ("ids", "keys"), [(["a", None, "c"], ["a", "#1", "c"]), ([7, 8, None], ["7", "8", "#2"])]
)
def test_keys_are_ids_or_the_numbers_of_rows(tmp_path, ids, keys):
    write(tmp_path / "a.parquet", jpg=[b""] * 3, uid=ids)
    named = rows_of(ParquetSource.open(tmp_path, id_col="uid"))
    assert [row["key"] for row in named] == keys
    assert [row["uid"] for row in named] == ids
    assert [row["key"] for row in rows_of(ParquetSource.open(tmp_path))] == ["0", "1", "2"]
    write(tmp_path / "a.parquet", jpg=[b""] * 3, key=ids)
    rows = rows_of(ParquetSource.open(tmp_path))
    assert [row["key"] for row in rows] == keys
    assert "source_key" not in rows[0]


def test_numbers_of_rows_go_on_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tables, "_BATCH_ROWS", 3)
    write(tmp_path / "a.parquet", jpg=[b""] * 7)
    assert [row["key"] for row in rows_of(ParquetSource.open(tmp_path))] == [*"0123456"]


def test_own_columns_go_along_in_types_that_spark_has(tmp_path):
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    write(
        tmp_path / "a.parquet",
        jpg=[b""], width=pa.array([3], pa.uint16()), status=["s"], image_offset=[5],
        when=pa.array([when], pa.timestamp("ns", tz="UTC")), tags=[["x", None]],
    )  # fmt: skip
    source = ParquetSource.open(tmp_path)
    assert source.schema().names == [
        "shard", "key", "width", "source_status", "source_image_offset", "when", "tags",
        "status", "error_message",
    ]  # fmt: skip
    (row,) = rows_of(source)
    assert source.schema().field("width").type == pa.int32()
    assert (row["width"], row["source_status"], row["source_image_offset"]) == (3, "s", 5)
    assert (row["when"], row["tags"]) == (when, ["x", None])
    assert ParquetSource.open(tmp_path, columns=()).schema().names == [
        "shard", "key", "status", "error_message",
    ]  # fmt: skip
    few = ParquetSource.open(tmp_path, columns=["tags", "width"])
    assert few.schema().names == ["shard", "key", "width", "tags", "status", "error_message"]


def test_files_with_other_columns_and_types_have_a_schema_in_common(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b"1"], n=pa.array([1], pa.int32()))
    write(tmp_path / "b.parquet", jpg=[b"2"], n=pa.array([2**40]), more=["x"])
    rows = rows_of(ParquetSource.open(tmp_path))
    assert [(row["n"], row["more"]) for row in rows] == [(1, None), (2**40, "x")]
    write(tmp_path / "c.parquet", jpg=[b"3"], n=["text"])
    with pytest.raises(
        InputError, match=r"column 'n' is int.* in .*\.parquet and string in .*c\.p"
    ):
        ParquetSource.open(tmp_path)


def test_an_output_that_was_begun_settles_the_columns(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b"1"], old=[1])
    source = ParquetSource.open(tmp_path)
    schema = source.schema([pa.field("old", pa.int64()), pa.field("gone", pa.string())])
    assert schema.names == ["shard", "key", "old", "gone", "status", "error_message"]
    ((rows, _),) = source.read(source.units()[0], schema)
    assert rows.to_pylist()[0]["old"] == 1
    assert rows.to_pylist()[0]["gone"] is None


def test_columns_of_one_name_are_refused(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b""], url=["u"], URL=["U"])
    with pytest.raises(InputError, match=r"columns url and URL would have one name.*--columns"):
        ParquetSource.open(tmp_path)
    assert ParquetSource.open(tmp_path, columns=["URL"]).columns == {"URL": "URL"}
    write(tmp_path / "a.parquet", jpg=[b""], status=["u"], source_status=["U"])
    with pytest.raises(InputError, match=r"columns status and source_status would have one name"):
        ParquetSource.open(tmp_path)


def test_times_of_day_are_text(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b""], at=pa.array([3_600_001], pa.time32("ms")))
    (row,) = rows_of(ParquetSource.open(tmp_path))
    assert row["at"] == "01:00:00.001"


@pytest.mark.parametrize("ids", [[b"\xff\x00"], [["x"]], [None]])
def test_what_can_be_no_key_is_refused_or_not_taken(tmp_path, ids):
    write(tmp_path / "a.parquet", jpg=[b""], key=ids)
    source = ParquetSource.open(tmp_path, image_column="jpg")
    (row,) = rows_of(source)
    assert (row["key"], row["source_key"]) == ("0", ids[0])
    with pytest.raises(InputError, match=r"column 'key' is .*, and keys are text or numbers"):
        ParquetSource.open(tmp_path, image_column="jpg", id_col="key")


def test_a_key_that_some_files_lack_is_not_taken_unless_it_is_asked_for(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b""], key=["x"])
    write(tmp_path / "b.parquet", jpg=[b""])
    assert [row["key"] for row in rows_of(ParquetSource.open(tmp_path))] == ["0", "0"]
    rows = rows_of(ParquetSource.open(tmp_path, id_col="key"))
    assert [row["status"] for row in rows] == ["ok", "shard_unreadable"]


def test_what_is_noted_is_what_was_asked_for(tmp_path):
    write(tmp_path / "a.parquet", jpg=[b""], x=[1], y=[2])
    before = ParquetSource.open(tmp_path).describe()
    write(tmp_path / "0.parquet", jpg=[b""], z=[1], y=[2], x=[3])
    assert ParquetSource.open(tmp_path).describe() == before
    few = ParquetSource.open(tmp_path, columns=["y", "x"]).describe()
    assert few["rows"]["columns"] == ["x", "y"]
    assert ParquetSource.open(tmp_path, columns=["x", "y"]).describe() == few != before


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_batches_are_cut_by_their_images_bytes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(image_tables, "_BATCH_BYTES", 10)
    monkeypatch.setattr(image_tables, "_batch_rows", lambda parquet: 256)
    for index in range(7):
        (tmp_path / f"{index}.jpg").write_bytes(bytes([index]) * 4)
    images = [
        {"path": f"{i}.jpg"} if kind == "paths" else {"bytes": bytes([i]) * 4} for i in range(7)
    ]
    write(tmp_path / "a.parquet", image=pa.array(images, HUGGING_FACE), n=[*range(7)])
    source = ParquetSource.open(tmp_path)
    (unit,) = source.units()
    batches = list(source.read(unit, source.schema()))
    assert [rows.num_rows for rows, _ in batches] == [3, 3, 1]
    found = [
        row | {"image": i}
        for rows, of in batches
        for row, i in zip(rows.to_pylist(), of, strict=True)
    ]
    assert [(row["key"], row["n"], row["image"]) for row in found] == [
        (str(i), i, bytes([i]) * 4) for i in range(7)
    ]


# Files


def test_files_are_units_below_the_root(tmp_path):
    for name in ("train/0.parquet", "test/0.parquet", "_hidden/0.parquet", "x.txt.parquet"):
        write(tmp_path / name, jpg=[b""])
    source = ParquetSource.open(tmp_path)
    assert [unit.name for unit in source.units()] == ["test/0", "train/0", "x.txt"]
    assert ParquetSource.open(f"{tmp_path}/t*/*.parquet").units()[0].name == "test/0"
    (unit,) = ParquetSource.open(tmp_path / "train" / "0.parquet").units()
    assert (unit.name, unit.num_bytes) == ("0", (tmp_path / "train/0.parquet").stat().st_size)
    with pytest.raises(NothingToReadError, match=r"has no \*\.parquet in it"):
        ParquetSource.open(tmp_path / "nothing")


def test_a_damaged_file_is_a_row_beside_those_of_the_others(tmp_path):
    whole = write(tmp_path / "whole.parquet", jpg=[b"1"])
    write(tmp_path / "empty.parquet", jpg=pa.array([], pa.binary()))
    write(tmp_path / "other.parquet", text=["x"])
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-5])
    rows = {row["shard"]: row for row in rows_of(ParquetSource.open(tmp_path))}
    statuses = {shard: (row["status"], row["key"]) for shard, row in rows.items()}
    assert statuses == {
        "whole": ("ok", "0"), "empty": ("shard_empty", None), "other": ("shard_unreadable", None),
        "zero": ("shard_unreadable", None), "cut": ("shard_unreadable", None),
    }  # fmt: skip
    assert "it has no column jpg" in rows["other"]["error_message"]
    assert "cut.parquet: " in rows["cut"]["error_message"]
    for name in ("whole", "empty", "other"):
        (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(InputError, match="none of its Parquet files can be read"):
        ParquetSource.open(tmp_path)


def test_rows_before_the_damage_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tables, "_BATCH_ROWS", 1)
    path = tmp_path / "a.parquet"
    images = [np.random.default_rng(i).bytes(50_000) for i in range(4)]
    options = {"row_group_size": 1, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.table({"jpg": images}), path, **options)
    content = bytearray(path.read_bytes())
    place = content.index(images[2][:100])
    content[place] ^= 1
    path.write_bytes(content)
    rows = rows_of(ParquetSource.open(tmp_path))
    assert [row["status"] for row in rows] == ["ok", "ok", "shard_unreadable"]
    assert [row["image"] for row in rows[:2]] == images[:2]


def test_a_file_that_is_gone_is_no_damage(tmp_path):
    path = write(tmp_path / "a.parquet", jpg=[b"1"])
    source = ParquetSource.open(tmp_path)
    (unit,) = source.units()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(source.read(unit, source.schema()))


def test_a_row_group_of_any_size_passes_through_little_memory(tmp_path):
    images = [bytes([i]) * 4_000_000 for i in range(60)]
    # A page is read whole, as long as whoever wrote it made it.
    options = {"compression": "none", "write_batch_size": 2}
    pq.write_table(pa.table({"jpg": images}), tmp_path / "a.parquet", **options)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    del images
    source = ParquetSource.open(tmp_path)
    (unit,) = source.units()
    before, peak, python = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for rows, _ in source.read(unit, source.schema()):
        assert rows.num_rows <= 8  # of 4 MB each, 32 MiB
        peak = max(peak, pa.total_allocated_bytes() - before)
        python = max(python, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert peak + python < 120e6


# Formats


def test_what_lies_there_says_the_format(tmp_path, jpegs):
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    assert open_source(tmp_path).describe()["inputs"]["kind"] == "files"
    write(tmp_path / "a.parquet", jpg=[jpegs[0]])
    assert open_source(tmp_path).describe()["inputs"]["kind"] == "parquet"
    write(tmp_path / "a.parquet", url=["a.jpg"])  # beside files it only tells of them
    assert open_source(tmp_path).describe()["inputs"]["kind"] == "files"
    (tmp_path / "a.parquet").write_bytes(b"")
    assert open_source(tmp_path).describe()["inputs"]["kind"] == "files"
    write(tmp_path / "a.parquet", jpg=[jpegs[0]])
    assert open_source(f"{tmp_path}/*.jpg").describe()["inputs"]["kind"] == "files"
    write_shard(tmp_path / "deep" / "a.tar", [("k", [("jpg", jpegs[0])])])
    assert open_source(tmp_path).describe()["inputs"]["kind"] == "webdataset"
    for format_ in INPUT_FORMATS:
        source = open_source(tmp_path, InputOptions(format=format_))
        assert source.describe()["inputs"]["kind"] == format_
    with pytest.raises(
        NothingToReadError, match=r"nothing does not exist, or has no shard \(\*\.t"
    ):
        open_source(tmp_path / "nothing")


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.zst"])
def test_compressed_shards_are_not_passed_over(tmp_path, jpegs, suffix):
    (tmp_path / f"b.{suffix}").write_bytes(b"")
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=rf"b\.{suffix} is compressed, .*: decompress it"):
        open_source(tmp_path)
    write_shard(tmp_path / "a.tar", [("k", [("jpg", jpegs[0])])])
    told = []
    assert len(open_source(tmp_path, tell=told.append).units()) == 1
    (line,) = told
    expected = (
        f"reading as --input-format webdataset; passed over: {tmp_path}/b.{suffix} and 1 more"
    )
    assert line == expected


def test_a_table_without_images_alone_is_refused(tmp_path):
    write(tmp_path / "b.parquet", url=["a.jpg"])
    with pytest.raises(InputError, match="no column of images; there are url"):
        open_source(tmp_path)


def test_files_that_are_passed_over_are_told(tmp_path, jpegs):
    told = []
    (tmp_path / "a.jpg").write_bytes(b"")
    open_source(tmp_path, tell=told.append)
    write(tmp_path / "b.parquet", url=["a.jpg"])
    open_source(tmp_path, tell=told.append)
    assert told == []
    write(tmp_path / "b.parquet", image=jpegs[:1])
    open_source(tmp_path, tell=told.append)
    assert told == [f"reading as --input-format parquet; passed over: {tmp_path}/a.jpg"]


def test_what_a_name_tells_is_not_looked_for(tmp_path, jpegs):
    write_shard(tmp_path / "00.tar", [("k", [("jpg", jpegs[0])])])
    with pytest.raises(NothingToReadError, match=r"01\.tar does not exist"):
        open_source(f"{tmp_path}/{{00..01}}.tar").units()
    with pytest.raises(NothingToReadError, match=r"nothere does not exist, or has no shard"):
        open_source([tmp_path, tmp_path / "nothere"])


@pytest.mark.parametrize(
    ("format_", "options", "flag"),
    [
        ("webdataset", {"image_column": "x"}, "--image-column"),
        ("parquet", {"captions": True}, "--captions"),
        ("files", {"image_column": "x"}, "--image-column"),
        ("files", {"id_col": "x"}, "--id-col"),
        ("files", {"columns": ["x"]}, "--columns"),
        ("files", {"captions": True}, "--captions"),
    ],
)
def test_options_of_another_format_are_refused(tmp_path, format_, options, flag):
    with pytest.raises(InputError, match=f"{flag} is not for --input-format {format_}"):
        open_source(tmp_path, InputOptions(format=format_, **options))


def test_the_command_knows_the_formats():
    from spark_nsfw.cli import _parser

    for format_ in INPUT_FORMATS:
        _parser().parse_args(["score", "in", "out", "--input-format", format_])


# Runs


@pytest.mark.parametrize("plan", ["dataframe", "fused"])
def test_a_table_gets_the_scores_of_a_shard_with_its_images(spark, tmp_path, embedder, jpegs, plan):
    for part in (0, 1):
        images = [{"bytes": jpeg} for jpeg in jpegs[5 * part : 5 * part + 5]]
        write(
            tmp_path / "in" / f"{part}.parquet",
            image=pa.array([*images, None, {"bytes": b"no image"}], HUGGING_FACE),
            label=[*"abcde", "f", "g"],
        )
    output = tmp_path / "out"
    summary = run_into(spark, open_source(tmp_path / "in"), output, embedder, plan=plan)
    assert summary.num_by_status == {"ok": 10, "image_missing": 2, "image_undecodable": 2}
    write_shard(tmp_path / "s.tar", [(str(i), [("jpg", jpegs[i])]) for i in range(10)])
    samples = iter_sample_batches([(str(tmp_path / "s.tar"), "s")], SampleOptions())
    expected = [row for batch in Scorer(embedder).score(samples) for row in batch.to_pylist()]
    found = spark.read.parquet(str(output)).where("status = 'ok'").orderBy("shard", "key").collect()
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours["shard"], ours["key"]) == (str(number // 5), str(number % 5))
        assert ours["label"] == "abcde"[number % 5]
        assert ours["nsfw_score"] == theirs["nsfw_score"]
        assert ours["image_embedding"] == theirs["image_embedding"]


def test_new_files_of_a_table_are_scored_by_the_next_run(spark, tmp_path, embedder, jpegs):
    write(tmp_path / "in" / "a.parquet", image=jpegs[:2])
    source = open_source(tmp_path / "in")
    assert run_into(spark, source, tmp_path / "out", embedder).num_new_images == 2
    write(tmp_path / "in" / "b.parquet", image=jpegs[2:5])
    assert run_into(spark, source, tmp_path / "out", embedder).num_new_images == 3
    assert run_into(spark, source, tmp_path / "out", embedder).num_new_images == 0


def test_a_table_of_another_column_is_another_output(spark, tmp_path, embedder, jpegs):
    from spark_nsfw.errors import JobError

    write(tmp_path / "in" / "a.parquet", one=jpegs[:1], two=jpegs[1:2])
    one, two = (
        ParquetSource.open(tmp_path / "in", image_column=n, columns=()) for n in ("one", "two")
    )
    run_into(spark, one, tmp_path / "out", embedder)
    with pytest.raises(JobError, match="image_column"):
        run_into(spark, two, tmp_path / "out", embedder)
