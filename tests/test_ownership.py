"""Nothing is overwritten or deleted that spark_nsfw did not write."""

import hashlib
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_nsfw.cli import main
from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.files import write_file
from spark_nsfw.ownership import delete_our_files, refuse_overlap
from spark_nsfw.use.export_output import new_file


def listing(directory):
    """Everything below a directory: a file's hash and time of change, a directory's name."""
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        if path.is_file()
        else "directory"
        for path in directory.rglob("*")
    }


def write_files(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}")


# --- Where an output may be -----------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "how"),
    [
        ("data/shards", "is"),
        ("data/shards/", "is"),
        ("data/../data/shards", "is"),
        ("data/shards/clean", "is in"),
        ("data/link/clean", "is in"),
        ("data", "holds"),
        (".", "holds"),
    ],
)
def test_an_output_that_overlaps_what_is_read_is_refused(tmp_path, output, how):
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to("shards")
    place = str(tmp_path / "data" / "shards")
    with pytest.raises(InputError, match=f"{how} the input {place}"):
        refuse_overlap(f"{tmp_path}/{output}", ["/elsewhere", place])


@pytest.mark.parametrize("output", ["data/shards2", "data/shard", "clean"])
def test_neighbours_do_not_overlap(tmp_path, output):
    refuse_overlap(str(tmp_path / output), [str(tmp_path / "data" / "shards")])


def test_an_output_overlaps_on_an_object_store_under_any_of_its_names(s3):
    with pytest.raises(InputError, match="is in"):
        refuse_overlap(f"{s3.url}/shards/clean", [f"s3a://{s3.name}/shards/"])
    refuse_overlap(f"{s3.url}/shards2", [f"s3a://{s3.name}/shards/"])


# --- Deleting and writing -------------------------------------------------------------


def test_only_our_files_are_deleted_and_only_empty_directories(tmp_path):
    write_files(tmp_path, "a/ours", "a/b/ours", "c/ours", "c/theirs", "d/e/theirs")
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    delete_our_files(str(tmp_path), lambda name: name.endswith("/ours"))
    kept = {"c", "c/theirs", "d", "d/e", "d/e/theirs"}
    assert listing(tmp_path) == {name: before[name] for name in kept}
    delete_our_files(str(tmp_path / "a"), lambda name: True)  # which is gone


def test_only_our_objects_are_deleted(s3):
    for name in ("x/a/ours", "x/b/ours", "x/b/theirs", "y/a/ours", "z"):
        s3.put(name, b"content")
    for directory in ("x", "y", "none"):
        delete_our_files(f"{s3.url}/{directory}", lambda name: name.endswith("ours"))
    assert [name for name in s3.names() if not name.endswith("/")] == ["x/b/theirs", "z"]
    assert not any(name.startswith("y/") for name in s3.names())


def test_a_file_is_replaced_whole(tmp_path):
    write_files(tmp_path, "file")
    write_file(str(tmp_path / "file"), b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"new"}
    with pytest.raises(StorageError, match="file/none"):
        write_file(str(tmp_path / "file" / "none"), b"new")


def test_what_cannot_be_written_changes_nothing(tmp_path):
    write_files(tmp_path, "directory/file")
    before = listing(tmp_path)
    with pytest.raises(StorageError):
        write_file(str(tmp_path / "directory"), b"new")
    assert listing(tmp_path) == before


def test_an_object_is_replaced_whole(s3):
    for content in (b"old", b"new"):
        write_file(f"{s3.url}/dir/file", content)
    assert s3.files() == {"dir/file": b"new"}


def test_an_exception_publishes_nothing_on_an_object_store(s3):
    s3.put("out/00000.tar", b"what was there")
    with (
        pytest.raises(RuntimeError),
        new_file(f"{s3.url}/out/00000.tar", f"{s3.url}/out") as file,
    ):
        file.write(b"half")
        raise RuntimeError
    assert s3.files() == {"out/00000.tar": b"what was there"}
    with new_file(f"{s3.url}/out/00000.tar", f"{s3.url}/out") as file:
        file.write(b"whole")
    assert s3.files() == {"out/00000.tar": b"whole"}


# --- The commands, before Spark starts ------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with shards, metadata of them and other people's files, and no Spark."""
    write_files(tmp_path, "shards/00000.tar", "thesis/thesis.tex", "page.html", "empty.html")
    (tmp_path / "empty.html").write_bytes(b"")
    note = {"inputs": {"filesystem": "", "roots": [f"{tmp_path}/shards/"]}}
    columns = [("key", pa.string()), ("image_embedding", pa.list_(pa.float32()))]
    schema = pa.schema(columns, {"spark_nsfw": json.dumps(note)})
    for shard in ("__schema__", "00000"):
        (tmp_path / "metadata" / f"shard={shard}").mkdir(parents=True)
        path = tmp_path / "metadata" / f"shard={shard}" / "part-0.parquet"
        rows = [] if shard == "__schema__" else [{"key": "0", "image_embedding": [0.0] * 768}]
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    monkeypatch.chdir(tmp_path)
    for name in ("active_or_local_session", "start_session"):
        monkeypatch.setattr(f"spark_nsfw.spark.session.{name}", _no_spark)
    return tmp_path


def _no_spark(**_):
    raise SparkStartedError


class SparkStartedError(Exception):
    pass


@pytest.mark.parametrize(
    "output",
    ["shards", "shards/clean", "metadata", "metadata/clean", ".", "thesis", "page.html"],
)
def test_export_and_classify_refuse_a_wrong_output(data, capsys, output):
    before = listing(data)
    export = ["export", "metadata", output, "--shards", "shards", "--where", "true"]
    assert main(export) == 2
    assert "give a directory of its own" in capsys.readouterr().err
    if not output.startswith("shards"):
        assert main(["classify", "metadata", output]) == 2
        assert "give a directory of its own" in capsys.readouterr().err
    assert listing(data) == before


def test_export_and_classify_go_on_with_a_right_output(data, detector_path):
    (data / "empty").mkdir()
    for output in ("new", "empty"):
        with pytest.raises(SparkStartedError):
            main(["export", "metadata", output, "--shards", "shards", "--where", "true"])
        with pytest.raises(SparkStartedError):
            main(["classify", "metadata", output, "--nsfw-checkpoint", detector_path])


@pytest.mark.parametrize("content", ['{"mine": 1}', "no JSON", ""])
def test_a_plan_that_is_not_ours_is_refused(data, capsys, content):
    write_files(data, "out/_spark_nsfw/plan.json")
    (data / "out" / "_spark_nsfw" / "plan.json").write_text(content)
    before = listing(data)
    assert main(["export", "metadata", "out", "--shards", "shards", "--where", "true"]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert listing(data) == before


def test_export_refuses_another_commands_output(data, capsys):
    write_files(data, "out/_spark_nsfw/summary.json")
    assert main(["export", "metadata", "out", "--shards", "shards", "--where", "true"]) == 2
    assert "has summary.json in it" in capsys.readouterr().err


def test_shards_of_another_root_are_refused_unless_they_were_moved(data, capsys):
    os.rename("shards", "moved")
    command = ["export", "metadata", "out", "--where", "true", "--shards", "moved"]
    before = listing(data)
    assert main(command) == 2
    error = capsys.readouterr().err
    for part in (f"{data}/shards/", f"{data}/moved/", "--allow-moved"):
        assert part in error
    assert listing(data) == before
    with pytest.raises(SparkStartedError):
        main([*command, "--allow-moved"])
    os.symlink("moved", "shards")  # the old name for the same place
    with pytest.raises(SparkStartedError):
        main(command)


@pytest.mark.parametrize("note", [{}, {"inputs": {"kind": "embeddings", "roots": ["/x/"]}}])
def test_metadata_that_does_not_say_which_shards_it_is_of_is_accepted(data, note):
    schema = pa.schema([("key", pa.string())], {"spark_nsfw": json.dumps(note)})
    for path in data.glob("metadata/*/*.parquet"):
        pq.write_table(schema.empty_table(), path)
    with pytest.raises(SparkStartedError):
        main(["export", "metadata", "out", "--where", "true", "--shards", "shards"])


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("page.html", "is no report"),
        ("empty.html", "is no report"),
        ("thesis", "is not a file"),
        ("nowhere/report.html", "create it first"),
        ("metadata/report.html", "is in the input"),
        ("metadata/shard=00000/part-0.parquet", "is in the input"),
        ("shards/report.html", "is in the input"),
        ("shards/00000.tar", "is in the input"),
    ],
)
def test_report_refuses_a_wrong_file(data, capsys, output, reason):
    before = listing(data)
    assert main(["report", "metadata", "-o", output, "--shards", "shards"]) == 2
    assert reason in capsys.readouterr().err
    assert listing(data) == before


def test_inspect_writes_nothing(data, capsys):
    before = listing(data)
    assert main(["inspect", "metadata"]) == 0
    assert main(["inspect", "thesis"]) == 2
    assert main(["inspect", "nowhere"]) == 2
    assert listing(data) == before
