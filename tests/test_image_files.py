"""Folders of image files: the units, reading them, and what later runs make of new files."""

import os
import threading
import time

import pytest
from scoring import run_into

from examples.photographs import write_shard
from spark_nsfw import storage
from spark_nsfw.errors import InputError, NothingToReadError, StorageError
from spark_nsfw.files import FileEntry
from spark_nsfw.read import image_files
from spark_nsfw.read.image_files import FilesSource, _parts, read_files
from spark_nsfw.read.source import GrowingSource
from spark_nsfw.storage import RetryingFile
from spark_nsfw.use.metadata import MetadataFiles


def write(directory, *names, content=b"x"):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def members(source):
    """Directory of each unit → its files; a directory that has several parts would fail."""
    found = {}
    for unit in source.units():
        directory = unit.name.rpartition("@")[0]
        assert directory not in found
        found[directory] = list(unit.members)
    return found


# Units


def test_a_unit_is_a_directory_that_has_images(tmp_path):
    write(tmp_path, "top.jpg", "cats/b.JPG", "cats/a.png", "cats/deep/c.webp", "cats/notes.txt")
    write(tmp_path, ".hidden/x.jpg", "cats/.x.jpg", "_out/y.jpg", "cats/_z.jpg", "dogs/list.csv")
    source = FilesSource.of(tmp_path)
    assert members(source) == {"": ["top.jpg"], "cats": ["a.png", "b.JPG"], "cats/deep": ["c.webp"]}
    assert [unit.place for unit in source.units()] == [
        str(tmp_path), str(tmp_path / "cats/deep"), str(tmp_path / "cats"),
    ]  # fmt: skip
    assert isinstance(source, GrowingSource)


def test_globs_and_single_files_are_taken(tmp_path):
    write(tmp_path, "a/1.jpg", "a/2.png", "b/3.jpg", "c/4.jpg")
    assert members(FilesSource.of(f"{tmp_path}/[ab]/*.jpg")) == {"a": ["1.jpg"], "b": ["3.jpg"]}
    assert members(FilesSource.of(tmp_path / "c" / "4.jpg")) == {"": ["4.jpg"]}
    assert members(FilesSource.of(tmp_path, ["png"])) == {"a": ["2.png"]}
    with pytest.raises(NothingToReadError, match=r"has no \*\.gif, \*\.GIF"):
        FilesSource.of(tmp_path, ["gif"]).units()


def test_two_directories_of_one_name_are_refused(tmp_path):
    write(tmp_path, "one/cats/a.jpg", "two/cats/b.jpg")
    source = FilesSource.of([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(InputError, match="would both be directory 'cats'"):
        source.units()


def test_a_unit_knows_its_bytes_and_when_it_changed(tmp_path):
    write(tmp_path, "a.jpg", content=b"123")
    write(tmp_path, "b.jpg", content=b"4567")
    (unit,) = FilesSource.of(tmp_path).units()
    assert unit.num_bytes == 7
    latest = max(path.stat().st_mtime for path in tmp_path.iterdir())
    assert unit.modified_seconds == pytest.approx(latest)


def entries(number):
    return {f"{i:07}.jpg": FileEntry("", 1, 0.0) for i in range(number)}


@pytest.mark.parametrize(("files", "parts"), [(1, 1), (1000, 1), (1001, 2), (2001, 4), (8000, 8)])
def test_large_directories_are_cut_into_parts(files, parts):
    found = list(_parts(entries(files)))
    assert len(found) == parts
    names = [name for part in found for name in part]
    assert sorted(names) == sorted(entries(files))
    assert len({*names}) == files
    assert all([*part] == sorted(part) for part in found)
    assert max(map(len, found)) < 1.3 * files / parts + 1


def test_a_file_stays_in_its_part_as_others_come(monkeypatch):
    few, many = (list(_parts(entries(number))) for number in (5000, 6000))
    assert len(few) == len(many) == 8
    for before, after in zip(few, many, strict=True):
        assert {*before} <= {*after}


# What is left to do


def keys_never(names):
    assert not list(names)
    return {}


def test_nothing_is_asked_of_an_output_that_has_none_or_all_of_it(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    source = FilesSource.of(tmp_path)
    units = source.units()
    for done in (set(), {units[0].name}, {unit.name for unit in units}, {"other@123"}):
        assert source.remaining(units, done, keys_never) == (units, [])


def test_files_that_came_later_are_a_unit_of_their_own(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    source = FilesSource.of(tmp_path)
    first = {unit.name: set(unit.members) for unit in source.units()}
    write(tmp_path, "a/0.jpg", "a/3.jpg")
    asked = []

    def keys(names):
        asked.extend(names)
        return {name: first[name] for name in names}

    units, doubled = source.remaining(source.units(), first, keys)
    assert doubled == []
    assert [name.rpartition("@")[0] for name in asked] == ["a"]
    (new,) = [unit for unit in units if unit.name not in first]
    assert (new.place, new.members) == (str(tmp_path / "a"), ("0.jpg", "3.jpg"))
    # The same files are the same unit, whoever looks.
    assert source.remaining(source.units(), first, keys)[0] == units
    done = first | {new.name: set(new.members)}
    again, doubled = source.remaining(source.units(), done, lambda names: done)
    assert [unit for unit in again if unit.name not in done] == []
    assert doubled == []


def test_files_that_are_gone_change_nothing(tmp_path):
    write(tmp_path, "a/1.jpg", "a/2.jpg")
    source = FilesSource.of(tmp_path)
    (unit,) = source.units()
    (tmp_path / "a" / "2.jpg").unlink()
    keys = {unit.name: {"1.jpg", "2.jpg"}}
    assert source.remaining(source.units(), keys, lambda names: keys) == ([], [])


def test_parts_that_are_cut_anew_keep_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_FILES_PER_UNIT", 8)
    source = FilesSource.of(tmp_path)
    write(tmp_path, *(f"{i}.jpg" for i in range(8)))
    (whole,) = source.units()
    write(tmp_path, *(f"{i}.jpg" for i in range(8, 40)))
    planned = source.units()
    assert len(planned) == 8
    done = {whole.name: {*whole.members}}
    units, doubled = source.remaining(planned, done, lambda names: done)
    left = [name for unit in units for name in unit.members]
    assert sorted(left) == sorted(f"{i}.jpg" for i in range(8, 40))
    assert (len({unit.name for unit in units}), doubled) == (len(units), [])


def test_of_units_with_files_in_common_the_larger_stays_whoever_looks(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg")
    source = FilesSource.of(tmp_path)
    (both,) = source.units()
    write(tmp_path, "3.jpg")
    (three,) = source.units()
    keys = {unit.name: {*unit.members} for unit in (both, three)}
    # A run saw two files, another one three at the same time.
    units, doubled = source.remaining([three], keys, lambda names: keys)
    assert [unit for unit in units if unit.name not in keys] == []
    assert doubled == [both.name]
    # So it is for one that sees a fourth.
    write(tmp_path, "4.jpg")
    units, doubled = source.remaining(source.units(), keys, lambda names: keys)
    assert doubled == [both.name]
    assert [unit.members for unit in units if unit.name not in keys] == [("4.jpg",)]


def test_a_unit_with_files_of_its_own_goes_when_another_has_them_too(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    source = FilesSource.of(tmp_path)
    keys = {"@aaaaaaaaaaaa": {"1.jpg", "2.jpg"}, "@bbbbbbbbbbbb": {"2.jpg", "3.jpg"}}
    units, doubled = source.remaining(source.units(), keys, lambda names: keys)
    assert doubled == []
    assert [unit.members for unit in units] == [("3.jpg",)]
    keys |= {units[0].name: {"3.jpg"}}
    units, doubled = source.remaining(source.units(), keys, lambda names: keys)
    assert (units, doubled) == ([], ["@bbbbbbbbbbbb"])


def test_rows_of_files_that_are_gone_are_never_given_up(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg")  # and no 3.jpg any more
    source = FilesSource.of(tmp_path)
    keys = {"@aaaaaaaaaaaa": {"1.jpg", "2.jpg"}, "@bbbbbbbbbbbb": {"1.jpg", "3.jpg"}}
    assert source.remaining(source.units(), keys, lambda names: keys) == ([], [])
    # Nor are their neighbours scored again, whose rows stay with them.
    write(tmp_path, "5.jpg")
    keys["@bbbbbbbbbbbb"] |= {"5.jpg"}
    keys["@aaaaaaaaaaaa"] |= {"6.jpg", "7.jpg"}
    assert source.remaining(source.units(), keys, lambda names: keys) == ([], [])


def test_a_unit_that_was_set_aside_gives_way_once_its_folder_is_planned_anew(tmp_path):
    write(tmp_path, "1.jpg")
    source = FilesSource.of(tmp_path)
    (crashed,) = source.units()
    assert source.remaining([crashed], {crashed.name}, keys_never) == ([crashed], [])
    write(tmp_path, "2.jpg")
    keys = {crashed.name: set()}
    units, doubled = source.remaining(source.units(), keys, lambda names: keys)
    assert [unit.members for unit in units] == [("1.jpg", "2.jpg")]
    assert doubled == [crashed.name]


def test_rows_do_not_give_way_to_a_unit_that_was_set_aside(tmp_path):
    write(tmp_path, "1.jpg", "2.jpg")
    source = FilesSource.of(tmp_path)
    (two,) = source.units()
    write(tmp_path, "3.jpg")
    (crashed,) = source.units()
    keys = {two.name: {"1.jpg", "2.jpg"}, crashed.name: set()}
    assert source.remaining([crashed], keys, lambda names: keys) == ([], [])


def test_new_files_of_a_large_folder_are_few_units(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_FILES_PER_UNIT", 8)
    write(tmp_path, *(f"{i}.jpg" for i in range(64)))
    source = FilesSource.of(tmp_path)
    keys = {unit.name: {*unit.members} for unit in source.units()}
    assert len(keys) == 8
    write(tmp_path, *(f"new{i}.jpg" for i in range(8)))
    units, _ = source.remaining(source.units(), keys, lambda names: keys)
    (new,) = [unit for unit in units if unit.name not in keys]
    assert len(new.members) == 8


def test_files_that_are_being_written_are_not_there_yet(tmp_path):
    write(tmp_path, "old.jpg", "new.jpg")
    source = FilesSource.of(tmp_path, settle_seconds=30)
    with pytest.raises(NothingToReadError, match="no file has settled yet"):
        source.units()
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "old.jpg", (hour_ago, hour_ago))
    (unit,) = source.units()
    assert unit.members == ("old.jpg",)
    assert unit.modified_seconds == pytest.approx(hour_ago)


def test_the_folder_of_a_unit_is_found_below_several_roots(tmp_path):
    write(tmp_path, "A/cats/1.jpg", "B/dogs/2.jpg", "B/dogs/big/3.jpg")
    source = FilesSource.of([tmp_path / "A", tmp_path / "B"])
    for unit in source.units():
        assert source.unit_named(unit.name).place == unit.place
    assert len(source.units()) == 3


# Reading


def test_files_are_read_in_order_with_what_is_wrong(tmp_path):
    write(tmp_path, "five", content=b"12345")
    write(tmp_path, "six", content=b"123456")
    write(tmp_path, "empty", content=b"")
    urls = [f"{tmp_path}/{name}" for name in ("six", "five", "none", "empty")] + [
        None,
        f"{tmp_path}",
    ]
    found = list(read_files(urls, max_bytes=5))
    assert [file.content for file in found] == [None, b"12345", None, b"", None, None]
    assert [file.status.value for file in found] == [
        "member_oversized", "ok", "image_missing", "ok", "image_missing", "image_missing",
    ]  # fmt: skip
    assert found[0].error_message == f"{tmp_path}/six has 6 bytes, the limit is 5"
    assert found[2].error_message.startswith(f"{tmp_path}/none does not exist")
    assert list(read_files([])) == []


@pytest.mark.parametrize("number", [1, 31, 32, 33, 100])
def test_some_files_are_read_ahead_and_no_more(tmp_path, monkeypatch, number):
    write(tmp_path, "a", content=b"x")
    opened, lock = [], threading.Lock()

    def init(self, url, original=RetryingFile.__init__):
        with lock:
            opened.append(url)
        original(self, url)

    monkeypatch.setattr(RetryingFile, "__init__", init)
    found = read_files(f"{tmp_path}/a" for _ in range(number))
    assert next(found).content == b"x"
    deadline = time.monotonic() + 10
    while len(opened) < min(number, 32) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(opened) == min(number, 32)
    assert len(list(found)) == number - 1
    assert len(opened) == number


def test_a_file_that_cannot_be_read_now_is_no_row(tmp_path, monkeypatch):
    write(tmp_path, "a.jpg")
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())

    def fail(self, offset, length):
        raise StorageError("a bad moment")

    monkeypatch.setattr(RetryingFile, "read_at", fail)
    source = FilesSource.of(tmp_path)
    with pytest.raises(StorageError, match="a bad moment"):
        list(source.read(source.units()[0], source.schema()))


def test_batches_are_bounded_in_rows_and_bytes(tmp_path, monkeypatch):
    write(tmp_path, *(f"{i:03}.jpg" for i in range(10)), content=b"12345")
    source = FilesSource.of(tmp_path)
    (unit,) = source.units()

    def sizes():
        batches = list(source.read(unit, source.schema()))
        assert [key for rows, _ in batches for key in rows["key"].to_pylist()] == [*unit.members]
        assert all(len(images) == rows.num_rows for rows, images in batches)
        return [rows.num_rows for rows, _ in batches]

    assert sizes() == [10]
    monkeypatch.setattr(image_files, "_BATCH_ROWS", 4)
    assert sizes() == [4, 4, 2]
    monkeypatch.setattr(image_files, "_BATCH_BYTES", 15)
    assert sizes() == [3, 3, 3, 1]


def test_a_file_that_vanished_is_a_row_and_a_folder_that_vanished_is_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(image_files, "_BATCH_ROWS", 2)
    write(tmp_path, *(f"{i}.jpg" for i in range(6)))
    source = FilesSource.of(tmp_path)
    (unit,) = source.units()
    for name in ("0.jpg", "1.jpg", "2.jpg", "4.jpg"):
        (tmp_path / name).unlink()
    batches = list(source.read(unit, source.schema()))
    keys = [key for rows, _ in batches for key in rows["key"].to_pylist()]
    assert keys == [*unit.members]  # as its name says: were one back, nobody would look for it
    statuses = [status for rows, _ in batches for status in rows["status"].to_pylist()]
    assert statuses == [*["image_missing"] * 3, "ok", "image_missing", "ok"]
    for name in ("3.jpg", "5.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="has none of its 6 files any more"):
        next(source.read(unit, source.schema()))


@pytest.mark.parametrize("url", ["http://h/x.jpg", "12:30.jpg", "x" * 300, "a\0b", "nowhere:/x"])
def test_what_can_be_no_file_is_missing(url):
    (found,) = read_files([url])
    assert (found.content, found.status.value) == (None, "image_missing")
    assert url[:5] in found.error_message or "\0" in url


def test_names_that_are_not_utf8_are_names_all_the_same(tmp_path):
    odd = os.fsdecode(b"\xff \xe4.jpg")
    write(tmp_path, "a b@c/x y.jpg", f"a b@c/{odd}", "ü/ж.jpg")
    source = FilesSource.of(tmp_path)
    keys = {}
    for unit in source.units():
        ((rows, images),) = source.read(unit, source.schema())
        keys[unit.name] = rows["key"].to_pylist()
        read = [b"x" if "\\x" not in key else None for key in keys[unit.name]]
        assert images == read
        for key, message in zip(keys[unit.name], rows["error_message"].to_pylist(), strict=True):
            assert (message is None) == ("\\x" not in key)
            assert message is None or message.endswith(
                r"\xff \xe4.jpg is no name in UTF-8: rename the file"
            )
    assert [*keys.values()] == [["x y.jpg", r"\xff \xe4.jpg"], ["ж.jpg"]]
    assert [name.rpartition("@")[0] for name in keys] == ["a b@c", "ü"]
    write(tmp_path, "a b@c/z.jpg")
    done = {name: {*of} for name, of in keys.items()}
    units, _ = source.remaining(source.units(), done, lambda names: done)
    assert [unit.members for unit in units if unit.name not in done] == [("z.jpg",)]
    (tmp_path / os.fsdecode(b"d\xff")).mkdir()
    write(tmp_path, os.fsdecode(b"d\xff/1.jpg"))
    with pytest.raises(InputError, match=r"d\\xff is no name in UTF-8: rename this folder"):
        source.units()


def test_files_of_a_bucket_are_read(s3, jpegs):
    for key in ("in/a/1.jpg", "in/2.jpg"):
        s3.put(key, jpegs[0])
    source = FilesSource.of(f"{s3.url}/in")
    found = [
        (unit.name.rpartition("@")[0], *rows["key"].to_pylist(), *images)
        for unit in source.units()
        for rows, images in source.read(unit, source.schema())
    ]
    assert found == [("", "2.jpg", jpegs[0]), ("a", "1.jpg", jpegs[0])]


# Runs


@pytest.fixture
def folder(tmp_path, jpegs):
    for i, jpeg in enumerate(jpegs[:9]):
        write(tmp_path / "in", f"{'cats' if i % 2 else 'dogs/big'}/{i}.jpg", content=jpeg)
    write(tmp_path / "in", "cats/broken.png", content=b"no image")
    return tmp_path / "in"


def scores(spark, output):
    """Path → row, of every row: one that is there twice is told."""
    rows = [row.asDict() for row in spark.read.parquet(str(output)).collect()]
    found = {f"{row['shard'].rpartition('@')[0]}/{row['key']}": row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("plan", ["dataframe", "fused"])
def test_a_folder_gets_the_scores_of_a_shard_with_its_files(
    spark, folder, tmp_path, embedder, jpegs, plan
):
    summary = run_into(spark, FilesSource.of(folder), tmp_path / "out", embedder, plan=plan)
    assert summary.num_by_status == {"ok": 9, "image_undecodable": 1}
    found = scores(spark, tmp_path / "out")
    assert {*found} == {f"{p.parent.relative_to(folder)}/{p.name}" for p in folder.rglob("*.*g")}
    write_shard(tmp_path / "s.tar", [(str(i), [("jpg", jpegs[i])]) for i in range(9)])
    from spark_nsfw import SampleOptions, Scorer, iter_sample_batches

    samples = iter_sample_batches([(str(tmp_path / "s.tar"), "s")], SampleOptions())
    expected = [row for batch in Scorer(embedder).score(samples) for row in batch.to_pylist()]
    for row in expected:
        (ours,) = [each for path, each in found.items() if path.endswith(f"/{row['key']}.jpg")]
        assert ours["nsfw_score"] == row["nsfw_score"]
        assert ours["image_embedding"] == row["image_embedding"]


def test_new_files_are_scored_by_the_next_run_and_old_ones_are_not(
    spark, folder, tmp_path, embedder, jpegs
):
    output, source = tmp_path / "out", FilesSource.of(folder)
    run_into(spark, source, output, embedder)
    before = scores(spark, output)
    assert run_into(spark, source, output, embedder).num_new_images == 0
    write(folder, "cats/10.jpg", "new/11.jpg", content=jpegs[10])
    summary = run_into(spark, source, output, embedder)
    assert (summary.num_new_images, summary.num_samples) == (2, 12)
    after = scores(spark, output)
    assert {path: after[path] for path in before} == before
    assert {*after} - {*before} == {"cats/10.jpg", "new/11.jpg"}
    assert run_into(spark, source, output, embedder).num_new_images == 0


def test_a_unit_whose_rows_are_deleted_is_scored_again(spark, folder, tmp_path, embedder):
    output, source = tmp_path / "out", FilesSource.of(folder)
    run_into(spark, source, output, embedder)
    before = scores(spark, output)
    files = MetadataFiles.at(str(output))
    (name,) = [name for name in files.done() if name.startswith("dogs")]
    files.forget([name])
    assert run_into(spark, source, output, embedder).num_new_images == 5
    assert scores(spark, output) == before


def test_rows_that_two_runs_made_of_one_file_are_there_once_in_the_end(
    spark, folder, tmp_path, embedder, jpegs
):
    output, source = tmp_path / "out", FilesSource.of(folder)
    run_into(spark, source, output, embedder)

    class Blind(FilesSource):
        """As a run that saw the new file before the output had the others."""

        def remaining(self, units, done, keys_of):
            return list(units), []

    write(folder, "cats/10.jpg", content=jpegs[10])
    run_into(spark, Blind(source.inputs), output, embedder)
    assert spark.read.parquet(str(output)).count() == 10 + 6
    summary = run_into(spark, source, output, embedder)
    assert (summary.num_new_images, summary.num_samples) == (0, 11)
    assert len(scores(spark, output)) == 11


def test_folders_and_shards_do_not_mix(spark, folder, tmp_path, embedder):
    from spark_nsfw.errors import JobError
    from spark_nsfw.read.inputs import open_source

    run_into(spark, FilesSource.of(folder), tmp_path / "out", embedder)
    write_shard(folder / "s.tar", [("a", [("jpg", b"x")])])
    with pytest.raises(
        JobError, match=r"was made from files, and this input is webdataset \(--input-format\)"
    ):
        run_into(spark, open_source(folder), tmp_path / "out", embedder)


# What is made of the rows


def test_the_report_shows_files_and_tables(spark, folder, tmp_path, embedder, jpegs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spark_nsfw.cli import main
    from spark_nsfw.read.inputs import open_source

    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"jpg": [*jpegs[:9], b"no image"]}), tmp_path / "table" / "0.parquet")
    for place in (folder, tmp_path / "table"):
        output, page = tmp_path / f"out-{place.name}", tmp_path / f"{place.name}.html"
        run_into(spark, open_source(place), output, embedder)
        write(folder, "cats/later.jpg", content=jpegs[10])  # the unit has another name by now
        command = ["report", str(output), "-o", str(page), "--shards", str(place)]
        assert main(command) == 0
        from spark_nsfw.spark.report import collect_report

        data = collect_report(spark, str(output), source=open_source(place))
        assert len(data.thumbnails) == 8  # all are in one band
        assert all(each.jpeg is not None for each in data.thumbnails)
        assert page.read_text("utf-8").count('<img alt="sample') == 8


def test_another_folder_than_that_of_the_rows_has_no_images(
    spark, folder, tmp_path, embedder, capsys
):
    from spark_nsfw.cli import main

    run_into(spark, FilesSource.of(folder), tmp_path / "out", embedder)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "a.jpg")
    page = tmp_path / "page.html"
    command = [
        "report",
        str(tmp_path / "out"),
        "-o",
        str(page),
        "--shards",
        str(tmp_path / "other"),
    ]
    assert main(command) == 2
    assert "none of the images could be read" in capsys.readouterr().err
    assert not page.exists()


def test_an_export_of_files_is_refused_in_a_line(spark, folder, tmp_path, embedder, capsys):
    from spark_nsfw.cli import main

    run_into(spark, FilesSource.of(folder), tmp_path / "out", embedder)
    command = ["export", str(tmp_path / "out"), str(tmp_path / "clean"), "--shards", str(folder)]
    assert main([*command, "--where", "nsfw_score < 0.5"]) == 2
    assert "was made from files, and export copies samples of shards" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize("kind", ["files", "parquet"])
def test_a_dataset_of_files_or_a_table(spark, folder, tmp_path, embedder, jpegs, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spark_nsfw import ImageTextPairDataset

    if kind == "files":
        dataset = ImageTextPairDataset.from_files(folder, spark=spark)
    else:
        (tmp_path / "t").mkdir()
        pq.write_table(
            pa.table({"jpg": jpegs[:9], "uid": [*"abcdefghi"]}), tmp_path / "t/0.parquet"
        )
        dataset = ImageTextPairDataset.from_parquet(tmp_path / "t", id_col="uid", spark=spark)
    scored = embedder(dataset)
    expected = scored.metadata.where("status = 'ok'").select("key", "nsfw_score").collect()
    assert len(expected) == 9
    scored.save_metadata(str(tmp_path / "out"))
    saved = spark.read.parquet(str(tmp_path / "out")).where("status = 'ok'")
    assert sorted(saved.select("key", "nsfw_score").collect()) == sorted(expected)
    with pytest.raises(InputError, match="without a path is for datasets of shards"):
        scored.save_metadata()
    with pytest.raises(InputError, match="to_webdataset is for datasets of shards"):
        scored.to_webdataset(str(tmp_path / "clean"), "is_safe")
    with pytest.raises(NothingToReadError):
        ImageTextPairDataset.from_files(tmp_path / "nowhere", spark=spark)


def test_the_command_scores_a_folder_and_waits_for_one(spark, folder, tmp_path, detector_path):
    from spark_nsfw.cli import main

    options = ["--model=test_vit", "--embedding-size=768", "--no-pretrained",
               f"--detector=laion={detector_path}"]  # fmt: skip
    assert main(["score", str(folder), str(tmp_path / "out"), *options]) == 0
    assert len(scores(spark, tmp_path / "out")) == 10
    refused = ["score", str(folder), str(tmp_path / "other"), *options, "--captions"]
    assert main(refused) == 2
