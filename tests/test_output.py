"""The output is the record: what is planted in it, and who may write and delete there."""

import copy
import hashlib
import json
import os
import shutil
import threading
import time

import pyarrow.parquet as pq
import pytest
from scoring import score_into
from test_job import arguments
from test_spark import collected

from examples.photographs import write_photograph_shards
from spark_nsfw import ImageTextPairDataset, read_webdataset
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError, JobError, StorageError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.read.source import Unit
from spark_nsfw.spark.committer import committer_of
from spark_nsfw.spark.output import ParquetOutput
from spark_nsfw.use.metadata import MetadataFiles, refuse_names, refuse_place

OTHER_WRITE = "00000000-1111-2222-3333-444444444444"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("in")
    write_photograph_shards(directory, num_shards=4, samples_per_shard=3)
    return directory


def score(spark, inputs, output, embedder, **options):
    return score_into(spark, str(inputs), output, embedder, report=lambda _: None, plan="fused",
                      **options)  # fmt: skip


@pytest.fixture(scope="module")
def finished(spark, inputs, detector_path, tmp_path_factory):
    from spark_nsfw import NsfwClassifier, TimmImageEmbedder

    output = tmp_path_factory.mktemp("finished") / "out"
    embedder = TimmImageEmbedder(
        "test_vit2",
        batch_size=8,
        embedding_size=768,
        classifiers=[NsfwClassifier(model_path=detector_path)],
    )
    score(spark, inputs, output, embedder)
    rows = collected(spark.read.parquet(str(output)))
    assert len(rows) == 12
    return output, rows


@pytest.fixture
def output(finished, tmp_path):
    """A copy of a finished output."""
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


def data_file(output, shard):
    (file,) = (output / f"shard={shard}").glob("part-*.parquet")
    return file


def all_rows(spark, output):
    """Every row, also where a unit has several files: a row that is there twice is seen."""
    return collected(spark.read.parquet(str(output)))


def lose(output, shard):
    shutil.rmtree(output / f"shard={shard}")


# --- What makes a unit done -----------------------------------------------------------


def test_an_empty_partition_is_not_done(spark, inputs, finished, output, embedder):
    for file in (output / "shard=00001").iterdir():
        file.unlink()
    assert MetadataFiles(str(output)).done() == {"00000", "00002", "00003"}
    score(spark, inputs, output, embedder)
    assert all_rows(spark, output) == finished[1]


@pytest.mark.parametrize("name", ["part-00000-x.zstd.parquet", "_part.parquet", ".part.parquet"])
def test_files_that_are_empty_or_hidden_do_not_make_a_unit_done(
    spark, inputs, finished, output, embedder, name
):
    content = data_file(output, "00001").read_bytes()
    lose(output, "00001")
    (output / "shard=00001").mkdir()
    (output / "shard=00001" / name).write_bytes(b"" if name[0] == "p" else content)
    score(spark, inputs, output, embedder)
    assert all_rows(spark, output) == finished[1]


def test_of_two_writes_of_a_unit_one_stays(spark, inputs, finished, output, embedder):
    file = data_file(output, "00001")
    second = file.with_name(f"part-00000-{OTHER_WRITE}.c000.zstd.parquet")
    shutil.copyfile(file, second)
    kept, doubled = sorted([file.name, second.name])
    file.with_name(f".{doubled}.crc").write_bytes(b"of an output that 0.1.0 wrote")
    score(spark, inputs, output, embedder)
    assert [f.name for f in (output / "shard=00001").glob("part-*")] == [kept]
    assert all_rows(spark, output) == finished[1]
    assert {file.name for file in (output / "shard=00001").iterdir()} == {kept}


def test_a_double_that_another_run_deletes_meanwhile_is_no_error(output, finished, monkeypatch):
    file = data_file(output, "00001")
    second = file.with_name(f"part-00000-{OTHER_WRITE}.c000.zstd.parquet")
    shutil.copyfile(file, second)
    look, deleted = MetadataFiles._is_set_aside, []

    def delete_then_look(files, name):
        if not deleted:
            deleted.append(max(file, second))
            deleted[0].unlink()
        return look(files, name)

    monkeypatch.setattr(MetadataFiles, "_is_set_aside", delete_then_look)
    assert len(MetadataFiles(str(output)).done()) == 4
    assert min(file, second).exists()

    def vanish(files, name):
        raise FileNotFoundError(name)

    shutil.copyfile(min(file, second), deleted[0])
    monkeypatch.setattr(MetadataFiles, "_is_set_aside", vanish)
    with pytest.raises(StorageError, match="its files keep vanishing"):
        MetadataFiles(str(output)).done()


def test_a_task_that_ran_twice_under_two_numbers_is_seen(output, finished):
    file = data_file(output, "00001")
    split = int(file.name.split("-")[1])
    again = file.with_name(file.name.replace(f"part-{split:05d}", f"part-{split + 70:05d}"))
    shutil.copyfile(file, again)
    assert len(MetadataFiles(str(output)).done()) == 4
    assert file.exists()
    assert not again.exists()


def split_file(file, cut, second_name):
    table = pq.read_table(file, partitioning=None)
    pq.write_table(table.slice(cut), file.with_name(second_name))
    pq.write_table(table.slice(0, cut), file)


def test_pieces_of_one_write_belong_together(spark, finished, output):
    """What a session's maxRecordsPerFile cut, and what several tasks of one write left."""
    cut = data_file(output, "00001")
    split_file(cut, 1, cut.name.replace(".c000.", ".c001."))
    tasks = data_file(output, "00002")
    number = tasks.name.split("-")[1]
    split_file(tasks, 2, tasks.name.replace(f"part-{number}", "part-00099"))
    assert len(MetadataFiles(str(output)).done()) == 4
    assert all_rows(spark, output) == finished[1]


def test_pieces_that_share_a_key_or_a_row_of_the_shard_are_not_copies(output):
    """A repeated key, or a row that stands for the shard, may be in both."""
    file = data_file(output, "00001")
    table = pq.read_table(file, partitioning=None)
    keys = table["key"].to_pylist()
    number = file.name.split("-")[1]
    second = file.with_name(file.name.replace(f"part-{number}", "part-00099"))
    pq.write_table(table.set_column(0, "key", [[keys[0], None, "other"]]), second)
    assert len(MetadataFiles(str(output)).done()) == 4
    assert second.exists()


def test_that_a_unit_crashed_gives_way_to_its_rows(spark, finished, output):
    file = data_file(output, "00001")
    table = pq.read_table(file, partitioning=None).slice(0, 1)
    position = table.schema.get_field_index("status")
    crashed = file.with_name(f"part-00000-{OTHER_WRITE}.c000.zstd.parquet")
    pq.write_table(table.set_column(position, "status", [["shard_crashed"]]), crashed)
    assert min(file.name, crashed.name) == crashed.name
    assert len(MetadataFiles(str(output)).done()) == 4
    assert not crashed.exists()
    assert all_rows(spark, output) == finished[1]


def test_rows_without_what_made_them_are_not_gone_on_with(spark, inputs, output, embedder):
    """As an --overwrite leaves them that was killed while it deleted."""
    lose(output, "__schema__")
    with pytest.raises(JobError, match="has rows, but not the partition shard=__schema__"):
        score(spark, inputs, output, embedder)
    assert len(MetadataFiles(str(output)).done()) == 4


def test_the_columns_are_deleted_last(output, monkeypatch):
    def delete_no_rows(urls):
        assert not any("__schema__" in url for url in urls)
        raise StorageError("no permission")

    monkeypatch.setattr("spark_nsfw.use.metadata.delete_files", delete_no_rows)
    with pytest.raises(StorageError):
        MetadataFiles(str(output)).delete()
    assert MetadataFiles(str(output)).is_begun


def test_two_writes_that_were_made_in_different_ways_are_refused(output):
    file = data_file(output, "00001")
    table = pq.read_table(file, partitioning=None)
    key = b"org.apache.spark.sql.parquet.row.metadata"
    other = table.schema.metadata[key].replace(b"decode=fast", b"decode=exact")
    assert other != table.schema.metadata[key]
    second = file.with_name(f"part-00000-{OTHER_WRITE}.c000.zstd.parquet")
    pq.write_table(table.replace_schema_metadata({key: other}), second)
    with pytest.raises(JobError, match="'00001' has rows of two runs with different") as refused:
        MetadataFiles(str(output)).done()
    assert file.name in str(refused.value)
    assert second.name in str(refused.value)
    assert file.exists()
    assert second.exists()


def test_a_dead_runs_temporary_files_become_no_rows(spark, inputs, finished, output, embedder):
    task = output / "_temporary" / "0" / "task_202611242132113586170679952820195_0000_m_000002"
    shutil.copytree(output / "shard=00001", task / "shard=00001")
    lose(output, "00001")
    score(spark, inputs, output, embedder)
    assert all_rows(spark, output) == finished[1]
    assert task.is_dir()  # another run may be writing there
    assert [path.name for path in (output / "_temporary").iterdir()] == ["0"]


def test_a_session_that_cuts_files_cuts_no_unit(spark, inputs, finished, embedder, tmp_path):
    option = "spark.sql.files.maxRecordsPerFile"
    before = spark.conf.get(option)
    spark.conf.set(option, 2)
    try:
        score(spark, inputs, tmp_path / "out", embedder)
    finally:
        spark.conf.set(option, before)
    for shard in range(4):
        assert data_file(tmp_path / "out", f"0000{shard}").stat().st_size
    assert all_rows(spark, tmp_path / "out") == finished[1]


def test_embeddings_are_written_without_dictionaries(spark, tmp_path):
    rows = [("s", "ok", [0.5, 0.25]) for _ in range(2000)]  # so alike that Parquet would use one
    schema = "shard string, status string, image_embedding array<float>"
    ParquetOutput(spark, str(tmp_path / "out")).append(
        spark.createDataFrame(rows, schema).coalesce(1)
    )
    (path,) = (tmp_path / "out").glob("shard=s/*.parquet")
    columns = pq.read_metadata(path).row_group(0)
    dictionary = {
        column.path_in_schema: any("DICTIONARY" in encoding for encoding in column.encodings)
        for column in map(columns.column, range(columns.num_columns))
    }
    assert dictionary == {"status": True, "image_embedding.list.element": False}


def test_many_units_in_one_task_stay_whole_and_in_order(spark, embedder, tmp_path, monkeypatch):
    """More units than a task keeps files open for go to more tasks."""
    monkeypatch.setattr("spark_nsfw.spark.loop._TASKS_PER_SLOT", 0.5)
    monkeypatch.setattr("spark_nsfw.spark.output._MAX_UNITS_PER_TASK", 3)
    write_photograph_shards(tmp_path / "in", num_shards=9, samples_per_shard=4)
    score(spark, tmp_path / "in", tmp_path / "out", embedder)
    for shard in range(9):
        keys = pq.read_table(data_file(tmp_path / "out", f"0000{shard}"), partitioning=None)["key"]
        assert keys.to_pylist() == [f"0000{shard}000{i}" for i in range(4)]


def test_a_dataset_of_many_shards_is_sliced_into_more_tasks(spark, inputs, embedder, monkeypatch):
    monkeypatch.setattr("spark_nsfw.dataset._TASKS", 2)
    dataset = ImageTextPairDataset.from_webdataset(str(inputs), spark=spark)
    assert dataset.metadata.rdd.getNumPartitions() == 2
    monkeypatch.setattr("spark_nsfw.spark.output._MAX_UNITS_PER_TASK", 1)
    for rows in (dataset.metadata, embedder(dataset).metadata):
        assert rows.rdd.getNumPartitions() == 4


def test_a_run_lists_its_input_once(spark, inputs, embedder, tmp_path, monkeypatch):
    listed, list_units = [], ShardInputs.list_units
    monkeypatch.setattr(
        ShardInputs, "list_units", lambda given: listed.append(given) or list_units(given)
    )
    score(spark, inputs, tmp_path / "out", embedder)
    assert len(listed) == 1
    read_webdataset(spark, str(inputs))
    assert len(listed) == 2
    assert ImageTextPairDataset.from_webdataset(str(inputs), spark=spark).metadata.columns
    assert len(listed) == 3


# --- Outputs of version 0.1.0 ---------------------------------------------------------


def test_an_output_of_version_0_1_0_is_continued(spark, inputs, finished, output, embedder):
    """No kind of input in its note, its columns in a file of Spark's, and a checkpoint."""
    schema = data_file(output, "__schema__")
    footer = pq.read_metadata(schema).metadata
    key = b"org.apache.spark.sql.parquet.row.metadata"
    spark_schema = json.loads(footer[key])
    for field in spark_schema["fields"]:
        if "spark_nsfw" in field["metadata"]:
            note = json.loads(field["metadata"]["spark_nsfw"])
            note["version"] = "0.1.0"
            del note["inputs"]["kind"]
            field["metadata"]["spark_nsfw"] = json.dumps(note)
    table = pq.read_table(schema, partitioning=None)
    schema.unlink()
    pq.write_table(
        table.replace_schema_metadata({key: json.dumps(spark_schema)}),
        schema.with_name(f"part-00000-{OTHER_WRITE}-c000.zstd.parquet"),
    )
    checkpoint = output / "_spark_nsfw" / "checkpoint" / "offsets"
    checkpoint.mkdir(parents=True)
    (checkpoint / "0").write_text("damaged")
    (output / "_SUCCESS").write_text("")
    lose(output, "00002")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("part-*.parquet")}
    score(spark, inputs, output, embedder)
    assert all_rows(spark, output) == finished[1]
    assert before.items() <= {p: p.stat().st_mtime_ns for p in output.rglob("part-*")}.items()


def drop(output, *names):
    """Take columns out of every file of an output."""
    key = b"org.apache.spark.sql.parquet.row.metadata"
    for file in output.rglob("part-*.parquet"):
        table = pq.read_table(file, partitioning=None).drop_columns([*names])
        schema = json.loads(table.schema.metadata[key])
        schema["fields"] = [field for field in schema["fields"] if field["name"] not in names]
        metadata = table.schema.metadata | {key: json.dumps(schema)}
        pq.write_table(table.replace_schema_metadata(metadata), file)
        file.with_name(f".{file.name}.crc").unlink(missing_ok=True)


def test_an_output_without_the_places_of_images_is_continued_without(
    spark, inputs, finished, output, embedder
):
    places = ("image_offset", "image_num_bytes")
    drop(output, *places)
    before = all_rows(spark, output)
    assert len(before) == 12 and not any({*places} & {*row} for row in before)
    lose(output, "00002")
    score(spark, inputs, output, embedder)
    assert not {*places} & {*pq.read_schema(data_file(output, "00002")).names}
    assert all_rows(spark, output) == before


# --- Two runs at once -----------------------------------------------------------------


@pytest.mark.parametrize("delay_seconds", [0, 0.3, 1, 2])
def test_two_runs_side_by_side_cost_work_and_no_rows(
    spark, inputs, finished, embedder, tmp_path, delay_seconds
):
    errors = []

    def run(delay):
        time.sleep(delay)
        try:
            score(spark, inputs, tmp_path / "out", embedder, shards_per_wave=2)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=[delay]) for delay in (0, delay_seconds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all_rows(spark, tmp_path / "out") == finished[1]


def decoding_exactly(embedder):
    other = copy.copy(embedder)
    other.decode = "exact"
    return other


def test_of_two_runs_that_begin_at_once_only_one_begins(
    spark, inputs, embedder, tmp_path, monkeypatch
):
    """One settles the columns while the other, with other options, begins and ends."""
    schema, output = ShardSource.schema, tmp_path / "out"

    def let_another_begin(source, own=None, units=None):
        monkeypatch.setattr(ShardSource, "schema", schema)
        score(spark, inputs, output, decoding_exactly(embedder))
        return schema(source, own, units)

    monkeypatch.setattr(ShardSource, "schema", let_another_begin)
    with pytest.raises(JobError, match=r"decode=exact.*, is now .*decode=fast"):
        score(spark, inputs, output, embedder)
    assert "decode=exact" in json.dumps(MetadataFiles(str(output)).note())
    assert len(all_rows(spark, output)) == 12


def test_a_run_notices_that_another_has_begun_its_output_anew(
    spark, inputs, output, embedder, tmp_path
):
    score(spark, inputs, tmp_path / "other", decoding_exactly(embedder))
    for shard in range(4):
        lose(output, f"0000{shard}")
    lines = []

    def report(line):
        lines.append(line)
        lose(output, "__schema__")
        shutil.copytree(tmp_path / "other" / "shard=__schema__", output / "shard=__schema__")

    with pytest.raises(JobError, match=r"decode=exact.*, is now .*decode=fast"):
        score_into(spark, str(inputs), output, embedder, report=report, shards_per_wave=1,
                   plan="fused")  # fmt: skip
    assert len(lines) == 1
    assert MetadataFiles(str(output)).done() == {"00000"}


# --- Places that are refused ----------------------------------------------------------


def contents(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def home(tmp_path, inputs):
    """A directory of a user's: shards, pictures, notes."""
    shutil.copytree(inputs, tmp_path / "shards" / "deep")
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(b"a picture of mine")
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("shards", "shards"),
        ("shards", "shards/"),
        ("shards", "shards/../shards"),
        ("shards", "shards/new"),
        ("shards/deep", "shards"),
        ("shards/deep/*.tar", "shards/deep"),
        ("shards/*/*.tar", "shards"),
        ("shards/*", "shards/deep/new"),
        ("shards/deep/{00000..00003}.tar", "."),
        ("shards/deep", "pictures"),
        ("shards/deep", "file"),
    ],
)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite", "--yes"]], ids=["", "overwrite"])
def test_score_touches_nothing_where_it_must_not_write(
    home, detector_path, monkeypatch, capsys, given, output, overwrite
):
    monkeypatch.chdir(home)
    monkeypatch.setattr(  # refused before Spark starts
        "spark_nsfw.spark.session.start_session", lambda **_: pytest.fail("Spark started")
    )
    before = contents(home)
    assert main(["score", *arguments(given, output, detector_path), *overwrite]) == 2
    assert "give a directory of its own" in capsys.readouterr().err
    assert contents(home) == before


def test_overwrite_deletes_what_runs_wrote_and_nothing_else(
    spark, inputs, output, detector_path, capsys
):
    (output / "notes.txt").write_text("mine")
    before = contents(output)
    given = ["score", *arguments(inputs, output, detector_path), "--overwrite", "--yes"]
    assert main(given) == 2
    assert "did not write, such as notes.txt: nothing is deleted" in capsys.readouterr().err
    assert contents(output) == before
    (output / "notes.txt").unlink()
    (output / ".DS_Store").write_text("the file manager's")
    (output / "shard=00000" / "._mine").write_text("the file manager's")
    stale = output / "_temporary" / "7" / "_temporary" / "attempt_1" / "shard=00001"
    stale.mkdir(parents=True)
    (stale / "part-00000-x.parquet").write_text("")
    assert main(given) == 0
    assert (output / ".DS_Store").exists()
    assert (output / "shard=00000" / "._mine").exists()
    assert not stale.exists()


@pytest.mark.parametrize("given", ["typo", "{00000..00009}.tar"])
def test_overwrite_deletes_nothing_where_there_is_nothing_to_score(
    spark, inputs, output, detector_path, given
):
    before = contents(output)
    arguments_ = arguments(inputs / given, output, detector_path)
    assert main(["score", *arguments_, "--overwrite", "--yes"]) == 2
    assert contents(output) == before


def test_deleting_leaves_no_empty_directories(output):
    MetadataFiles(str(output)).delete()
    assert not output.exists()


def test_links_are_not_followed_when_deleting(output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "part-00000-x.parquet").write_text("mine")
    os.symlink(tmp_path / "elsewhere", output / "shard=linked")
    with pytest.raises(InputError, match="shard=linked"):
        MetadataFiles(str(output)).delete()
    assert (tmp_path / "elsewhere" / "part-00000-x.parquet").exists()
    assert len(MetadataFiles(str(output)).done()) == 4


def test_a_run_that_was_killed_while_it_began_is_no_foreign_directory(
    spark, inputs, finished, embedder, tmp_path
):
    partition = tmp_path / "out" / "shard=__schema__"
    partition.mkdir(parents=True)
    (partition / f".part-00000-schema.zstd.parquet.{OTHER_WRITE}").write_bytes(b"PAR1")
    score(spark, inputs, tmp_path / "out", embedder)
    assert all_rows(spark, tmp_path / "out") == finished[1]


def test_names_that_no_output_can_hold_are_refused(tmp_path, monkeypatch):
    longest = "x" * (255 - len("shard="))
    refuse_names([Unit(longest, "/a.tar"), Unit("A", "/A.tar"), Unit("a", "/a")], str(tmp_path))
    for name in (longest + "x", "#" * 84):  # '#' is escaped as %23
        with pytest.raises(InputError, match=r"/in/long\.tar: its partition"):
            refuse_names([Unit(name, "/in/long.tar")], str(tmp_path))
    refuse_names([Unit("dots.", "/dots")], str(tmp_path))
    with pytest.raises(InputError, match="dots: Azure takes no directory"):
        refuse_names([Unit("dots.", "/dots")], "abfss://c@a.dfs.core.windows.net/out")
    monkeypatch.setattr("spark_nsfw.use.metadata.ignores_case", lambda url: True)
    with pytest.raises(InputError, match=r"/A\.tar and /a\.tar would be one partition"):
        refuse_names([Unit("A", "/A.tar"), Unit("a", "/a.tar")], str(tmp_path))


@pytest.mark.parametrize(
    ("given", "output", "refused"),
    [
        ("s3a://bucket/in", "s3://bucket/in/", True),
        ("s3a://bucket/in", "s3a://bucket/in/out", True),
        ("s3a://bucket/in", "s3a://bucket", True),
        ("s3://bucket", "s3a://bucket/out", True),
        ("s3a://bucket/in/*.tar", "s3a://bucket/in", True),
        ("s3a://bucket/{00..09}.tar", "s3a://bucket/out", False),
        ("s3a://bucket/in", "s3a://bucket/in2", False),
        ("s3a://bucket/in", "s3a://other/in", False),
    ],
)
def test_places_on_object_stores(given, output, refused):
    assert ShardSource(ShardInputs.parse(given)).covers(output) is refused


def test_a_directory_without_visible_files_is_a_fresh_one(tmp_path, inputs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitkeep").write_text("")
    refuse_place(str(tmp_path / "out"), ShardSource(ShardInputs.parse(inputs)))


# --- How a store takes files ----------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "hdfs://namenode", "s3a://bucket", "abfss://c@a"])
def test_without_the_cloud_module_tasks_move_their_own_files(spark, scheme):
    committer = committer_of(spark, f"{scheme}/out")
    assert committer.options["mapreduce.fileoutputcommitter.algorithm.version"] == "2"
    assert committer.options["mapreduce.fileoutputcommitter.cleanup.skipped"] == "true"
    assert committer.options["maxRecordsPerFile"] == "0"
    assert committer.settings == {}


@pytest.mark.parametrize(
    ("output", "name", "factory"),
    [
        ("s3a://b/out", "magic", "org.apache.hadoop.fs.s3a.commit.S3ACommitterFactory"),
        ("abfss://c@a/out", "manifest",
         "org.apache.hadoop.fs.azurebfs.commit.AzureManifestCommitterFactory"),
        ("gs://b/out", "manifest",
         "org.apache.hadoop.mapreduce.lib.output.committer.manifest.ManifestCommitterFactory"),
    ],
)  # fmt: skip
def test_with_the_cloud_module_stores_commit_in_their_own_way(
    spark, monkeypatch, output, name, factory
):
    monkeypatch.setattr("spark_nsfw.spark.committer._has_class", lambda jvm, name: True)
    committer = committer_of(spark, output)
    assert name in committer.name
    assert factory in committer.options.values()
    assert committer.settings["spark.sql.sources.commitProtocolClass"].endswith(
        "PathOutputCommitProtocol"
    )
    local = committer_of(spark, "/out")
    assert local.options["mapreduce.fileoutputcommitter.algorithm.version"] == "2"


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("org.apache.hadoop.fs.s3a.S3AFileSystem", "S3A's magic committer"),
        ("com.amazon.ws.emr.hadoop.fs.EmrFileSystem", "Hadoop's file committer, algorithm 2"),
    ],
)
def test_s3_on_emr_is_not_always_s3a(spark, monkeypatch, caplog, implementation, name):
    monkeypatch.setattr("spark_nsfw.spark.committer._has_class", lambda jvm, name: True)
    spark.conf.set("fs.s3.impl", implementation)
    try:
        assert committer_of(spark, "s3://bucket/out").name == name
        assert committer_of(spark, "s3a://bucket/out").name == "S3A's magic committer"
    finally:
        spark.conf.unset("fs.s3.impl")
    assert caplog.messages == []  # EMRFS copies nothing


def test_a_committer_that_may_delete_the_output_is_refused(spark):
    settings = {
        "fs.s3a.committer.name": "partitioned",
        "fs.s3a.committer.staging.conflict-mode": "replace",
    }
    for name, value in settings.items():
        spark.conf.set(name, value)
    try:
        with pytest.raises(InputError, match="conflict-mode is 'replace'"):
            ParquetOutput(spark, "s3a://bucket/out")
    finally:
        for name in settings:
            spark.conf.unset(name)
