"""Clean shards: the selected samples' bytes, once each, whatever happens on the way."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset.tariterators as reference
from pyspark.sql import functions as F
from scoring import score_into
from test_ownership import listing, write_files

from examples.photographs import encode, photographs, write_photograph_shards, write_shard
from spark_nsfw import (
    AestheticClassifier,
    ImageClassifier,
    ImageTextPairDataset,
    NsfwClassifier,
    TimmImageEmbedder,
)
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError, JobError, StorageError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.spark.export import export_metadata
from spark_nsfw.spark.output import ParquetOutput
from spark_nsfw.use import tar_writer
from spark_nsfw.use.regroup import ExportOptions, OutputShard, Piece, plan_shards
from spark_nsfw.use.tar_writer import write_output_shard


def samples_of(path):
    """Key → content by extension, as the webdataset package reads it."""
    with open(path, "rb") as stream:
        files = reference.tar_file_expander([{"url": str(path), "stream": stream}])
        found = {}
        for sample in reference.group_by_keys(files):
            assert sample["__key__"] not in found
            found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


# --- The plan -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_regrouped_shards_hold_every_row_once_and_are_full(size):
    counts = {"c": 5, "a": 3, "b": 0, "d/e": 11}
    shards = plan_shards(counts, ExportOptions(samples_per_shard=size))
    rows = [(p.shard, row) for s in shards for p in s.pieces for row in range(p.start, p.stop)]
    assert rows == [(shard, row) for shard in ("a", "c", "d/e") for row in range(counts[shard])]
    assert [s.num_samples for s in shards[:-1]] == [size] * (len(shards) - 1)
    assert 1 <= shards[-1].num_samples <= size
    assert [s.name for s in shards] == [f"{i:05}" for i in range(len(shards))]


def test_shards_that_are_not_regrouped_keep_their_names():
    shards = plan_shards({"b": 2, "a/1": 1, "none": 0}, ExportOptions())
    assert [(s.name, s.pieces) for s in shards] == [
        ("a/1", (Piece("a/1", 0, 1),)),
        ("b", (Piece("b", 0, 2),)),
    ]


@pytest.mark.parametrize(
    ("options", "shard", "position", "key"),
    [
        ({"samples_per_shard": 10_000}, 42, 31, "000420031"),
        ({"samples_per_shard": 10_001}, 42, 31, "0004200031"),
        ({"samples_per_shard": 100, "shard_digits": 3}, 7, 99, "00799"),
        ({"samples_per_shard": 1}, 12, 0, "00012"),
    ],
)
def test_new_keys_are_nemo_curators(options, shard, position, key):
    assert ExportOptions(renumber=True, **options).new_key(shard, position) == key


@pytest.mark.parametrize("bad", [{"samples_per_shard": 0}, {"renumber": True}, {"shard_digits": 0}])
def test_options_that_cannot_work_are_refused(bad):
    with pytest.raises(InputError):
        ExportOptions(**bad)


def test_more_shards_than_digits_are_refused():
    with pytest.raises(InputError, match="101 shards of 1 samples"):
        plan_shards({"a": 101}, ExportOptions(samples_per_shard=1, shard_digits=2))


# --- One output shard -----------------------------------------------------------------


def write_tar(path, members, **options):
    """Members are names with a content, or headers for what has none."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(content), 1234567, 0o640
            archive.addfile(info, io.BytesIO(content))
    return path


def export_one(tmp_path, keys, statuses=None, options=None, piece=None, shards=("s",)):
    """Export from the tars ``s.tar`` … of a folder the rows with these keys."""
    options = options or ExportOptions()
    table = pa.table(
        {
            "key": keys, "status": statuses or ["ok"] * len(keys), "width": range(len(keys)),
            tar_writer.KEPT: [True] * len(keys),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "selection.parquet")
    pieces = [piece or Piece(shard, 0, len(keys)) for shard in shards]
    shard = OutputShard("00000", 0, tuple(pieces))
    return write_output_shard(
        shard,
        {name: str(tmp_path / f"{name}.tar") for name in shards},
        {name: [str(tmp_path / "selection.parquet")] for name in shards},
        str(tmp_path / "out"),
        options,
        {"spark_nsfw": "{}"},
    )


@pytest.mark.parametrize(
    "tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_a_tar_that_is_kept_whole_is_the_same_file(tmp_path, tar_format):
    long = "d" * 90 if tar_format == tarfile.USTAR_FORMAT else "d" * 90 + "/" + "ü" * 80
    members = [(f"{k}.{e}", (k + e).encode() * n) for k in ("a", "b/c", long)
               for e, n in (("jpg", 400), ("SEG.png", 7), ("txt", 0))]  # fmt: skip
    source = write_tar(tmp_path / "s.tar", members, format=tar_format)
    written = export_one(tmp_path, ["a", "b/c", long])
    copied = tmp_path / "out" / "00000.tar"
    assert copied.read_bytes() == source.read_bytes()
    assert (written.num_samples, written.num_bytes) == (3, source.stat().st_size)
    assert written.problems == []


def test_what_is_not_selected_is_left_out_with_all_its_members(tmp_path):
    members = [(f"{k}.{e}", (k + e).encode()) for k in "abcde" for e in ("jpg", "txt", "json", "x")]
    write_tar(tmp_path / "s.tar", members)
    written = export_one(tmp_path, ["b", "e"])
    assert samples_of(tmp_path / "out" / "00000.tar") == {
        k: {e: (k + e).encode() for e in ("jpg", "txt", "json", "x")} for k in "be"
    }
    sidecar = pd.read_parquet(tmp_path / "out" / "00000.parquet")
    assert sidecar.to_dict("list") == {
        "shard": ["00000"] * 2, "key": ["b", "e"], "status": ["ok"] * 2, "width": [0, 1],
    }  # fmt: skip
    assert written.num_samples == 2


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_new_keys_change_names_and_nothing_else(tmp_path, tar_format):
    long = "d" * 90 + "/" + "ü" * 80
    members = [("a.jpg", b"1" * 600), ("a.SEG.png", b"2"), (f"{long}.jpg", b"3")]
    write_tar(tmp_path / "s.tar", members, format=tar_format)
    options = ExportOptions(samples_per_shard=100, renumber=True)
    export_one(tmp_path, ["a", long], options=options)
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        found = [(m.name, archive.extractfile(m).read(), m.mtime, m.mode) for m in archive]
    names = ["0000000.jpg", "0000000.SEG.png", "0000001.jpg"]
    assert found == [
        (name, content, 1234567, 0o640) for name, (_, content) in zip(names, members, strict=True)
    ]
    sidecar = pd.read_parquet(tmp_path / "out" / "00000.parquet")
    assert sidecar["key"].tolist() == ["0000000", "0000001"]
    assert sidecar["source_key"].tolist() == ["a", long]
    assert sidecar["source_shard"].tolist() == ["s", "s"]


def test_a_piece_takes_its_rows_only(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{k}.jpg", k.encode()) for k in "abcdef"])
    export_one(tmp_path, list("abdf"), piece=Piece("s", 1, 3))
    assert list(samples_of(tmp_path / "out" / "00000.tar")) == ["b", "d"]


def test_links_and_folders_do_not_get_in_the_way(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("dir", "a.jpg", "dir2", "a.lnk", "a.txt"):
            info = tarfile.TarInfo(name)
            if name.startswith("dir"):
                info.type = tarfile.DIRTYPE
            elif name == "a.lnk":
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
            else:
                info.size = 3
            archive.addfile(info, io.BytesIO(b"123"))
    export_one(tmp_path, ["a"])
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert [(m.name, m.linkname) for m in archive] == [
            ("a.jpg", ""), ("a.lnk", "elsewhere"), ("a.txt", ""),
        ]  # fmt: skip


def test_of_a_tar_that_is_cut_the_whole_samples_are_exported(tmp_path):
    path = write_tar(
        tmp_path / "s.tar", [(f"{k}.{e}", b"x" * 1000) for k in "abc" for e in ("jpg", "txt")]
    )
    path.write_bytes(path.read_bytes()[: 5 * 1536 + 700])  # inside c.txt
    written = export_one(tmp_path, list("abc"))
    assert list(samples_of(tmp_path / "out" / "00000.tar")) == ["a", "b"]
    assert written.problems == ["s: c.txt is cut off, or a sparse file"]
    assert pd.read_parquet(tmp_path / "out" / "00000.parquet")["key"].tolist() == ["a", "b"]


@pytest.mark.parametrize("cut", [2 * 1536, 2 * 1536 + 100])
def test_a_sample_before_the_cut_is_whole(tmp_path, cut):
    path = write_tar(tmp_path / "s.tar", [(f"{k}.jpg", b"x" * 1000) for k in "abc"])
    path.write_bytes(path.read_bytes()[:cut])
    written = export_one(tmp_path, list("abc"))
    assert list(samples_of(tmp_path / "out" / "00000.tar")) == ["a", "b"]
    (problem,) = written.problems
    assert problem.startswith("s: 1 selected samples are not in it, such as 'c' (")


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200])
def test_a_shard_that_is_no_tar_any_more_is_told(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    written = export_one(tmp_path, ["a", "b"])
    assert written.num_samples == 0
    assert "2 selected samples are not in it" in written.problems[0]
    assert samples_of(tmp_path / "out" / "00000.tar") == {}


def test_a_shard_that_cannot_be_opened_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        export_one(tmp_path, ["a"])
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


#: A file of 4 KiB that answers every read with an error.
UNREADABLE = Path("/sys/class/net/lo/speed")
needs_unreadable = pytest.mark.skipif(not UNREADABLE.exists(), reason=f"needs {UNREADABLE}")


@needs_unreadable
def test_a_shard_that_cannot_be_read_now_is_no_damaged_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("spark_nsfw.storage.RETRY_SECONDS", (0.01,))
    (tmp_path / "s.tar").symlink_to(UNREADABLE)
    with pytest.raises(StorageError, match=r"s\.tar cannot be read now, after 2 tries"):
        export_one(tmp_path, ["a"])
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_shard_that_becomes_unreadable_leaves_nothing_in_an_object_store(
    tmp_path,
    s3,
    monkeypatch,
    name,
):
    members = [("a.jpg", b"1" * 9_000_000), ("b.jpg", b"2" * 9_000_000)]
    s3.put("in/s.tar", write_tar(tmp_path / "s.tar", members).read_bytes())
    selection = pa.table({"key": [name], "status": ["ok"], tar_writer.KEPT: [True]})
    pq.write_table(selection, tmp_path / "selection.parquet")
    shard = OutputShard("00000", 0, (Piece("s", 0, 1),))
    given = (
        shard, {"s": f"{s3.url}/in/s.tar"}, {"s": [str(tmp_path / "selection.parquet")]},
        f"{s3.url}/out", ExportOptions(), {},
    )  # fmt: skip
    copy = tar_writer._TarWriter.copy

    def copy_and_lose(tar, source, member, new_name):
        s3.delete("in/s.tar")
        copy(tar, source, member, new_name)

    with monkeypatch.context() as patch:
        patch.setattr(tar_writer._TarWriter, "copy", copy_and_lose)
        with pytest.raises(StorageError, match=r"in/s\.tar vanished while it was read"):
            write_output_shard(*given)
    assert s3.files() == {}
    s3.put("in/s.tar", (tmp_path / "s.tar").read_bytes())
    assert write_output_shard(*given).num_samples == 1
    assert list(s3.files()) == ["in/s.tar", "out/00000.parquet", "out/00000.tar"]


def test_what_a_kill_leaves_is_under_no_final_name(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.jpg", b"x" * 3_000_000)])
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from spark_nsfw.use import tar_writer
from test_export import export_one
tar_writer._TarWriter.finish = lambda tar: os.kill(os.getpid(), signal.SIGKILL)
export_one(Path({str(tmp_path)!r}), ["a"])
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {path.parent.as_posix() for path in left} == {"_spark_nsfw/partial"}
    assert sum((tmp_path / "out" / path).stat().st_size for path in left) > 2_000_000
    export_one(tmp_path, ["a"])
    assert (tmp_path / "out" / "00000.tar").read_bytes() == (tmp_path / "s.tar").read_bytes()


def test_a_member_of_any_size_passes_through_little_memory(tmp_path):
    import tracemalloc

    write_tar(tmp_path / "s.tar", [("a.mp4", bytes(90_000_000)), ("a.txt", b"1")])
    tracemalloc.start()
    export_one(tmp_path, ["a"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out" / "00000.tar").read_bytes() == (tmp_path / "s.tar").read_bytes()
    assert peak < 10_000_000


def test_a_repeated_key_stays_the_sample_that_it_was(tmp_path):
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("c.jpg", b"4"), ("a.jpg", b"5")]
    write_tar(tmp_path / "s.tar", members)
    statuses = ["ok", "key_repeated", "ok", "key_repeated"]
    written = export_one(tmp_path, ["a", "a", "c", "a"], statuses)
    assert samples_of(tmp_path / "out" / "00000.tar") == {"a": {"jpg": b"1"}, "c": {"jpg": b"4"}}
    assert ["a second sample 'a' is left out" in problem for problem in written.problems] == [
        True
    ] * 2
    renumbered = ExportOptions(samples_per_shard=10, renumber=True)
    export_one(tmp_path, ["a", "a", "c", "a"], statuses, renumbered)
    assert [m["jpg"] for m in samples_of(tmp_path / "out" / "00000.tar").values()] == [
        b"1", b"3", b"4", b"5",
    ]  # fmt: skip
    # The first one was not selected: its bytes are not taken for those of the second.
    export_one(tmp_path, ["a", "c"], ["key_repeated", "ok"])
    assert samples_of(tmp_path / "out" / "00000.tar") == {"a": {"jpg": b"3"}, "c": {"jpg": b"4"}}


def test_one_key_in_two_shards_is_refused_with_both_named(tmp_path):
    for name in "st":
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", name.encode())])
    options = ExportOptions(samples_per_shard=10)
    with pytest.raises(JobError, match="shards s and t both have a sample 'a'"):
        export_one(tmp_path, ["a"], options=options, shards="st")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []
    export_one(tmp_path, ["a"], options=ExportOptions(10, renumber=True), shards="st")
    assert [m["jpg"] for m in samples_of(tmp_path / "out" / "00000.tar").values()] == [b"s", b"t"]


# --- The command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(spark, shards, detector_path, tmp_path_factory):
    """The metadata of the damaged and whole shards, and its rows."""
    output = tmp_path_factory.mktemp("scored") / "metadata"
    embedder = TimmImageEmbedder(
        "test_vit2", embedding_size=768, classifiers=[NsfwClassifier(model_path=detector_path)]
    )
    score_into(spark, str(shards), output, embedder, plan="fused")
    return output, pd.read_parquet(output).astype({"shard": str})


@pytest.fixture(scope="module")
def threshold(scored):
    return float(scored[1]["nsfw_score"].median())


def command(scored, output, shards, *options):
    return ["export", str(scored[0]), str(output), "--shards", str(shards), *options]


def originals(shards):
    """(shard, key) → content by extension of every sample of the input that can be read."""
    found = {}
    for path in sorted(shards.rglob("*.tar")):
        name = path.relative_to(shards).with_suffix("").as_posix()
        if name == "00003":  # cut off
            continue
        for key, members in samples_of(path).items() if name != "odd/00000" else []:
            found[name, key] = members
    return found


def test_clean_shards_have_the_bytes_of_what_was_selected(
    spark, scored, shards, threshold, tmp_path, capsys
):
    where = f"nsfw_score < {threshold} and shard not like 'odd/%' and shard != '00003'"
    assert main(command(scored, tmp_path / "out", shards, "--where", where)) == 0
    _, frame = scored
    kept = frame[
        (frame["nsfw_score"] < threshold) & frame["shard"].isin(["00000", "00001", "00002"])
    ]
    expected = {
        identity: originals(shards)[identity]
        for identity in kept[["shard", "key"]].itertuples(index=False, name=None)
    }
    assert 5 < len(expected) < 33
    found = {
        (path.stem, key): members
        for path in (tmp_path / "out").glob("*.tar")
        for key, members in samples_of(path).items()
    }
    assert found == expected
    for path in (tmp_path / "out").glob("*.tar"):
        sidecar = pd.read_parquet(path.with_suffix(".parquet"))
        assert sidecar["key"].tolist() == list(samples_of(path))
        assert {*frame.columns} - {*sidecar.columns} == {"image_offset", "image_num_bytes"}
        rows = frame[frame["shard"] == path.stem].set_index("key").loc[sidecar["key"]]
        assert sidecar["nsfw_score"].tolist() == rows["nsfw_score"].tolist()
        assert np.array_equal(
            np.stack(sidecar["image_embedding"]), np.stack(rows["image_embedding"])
        )
    out = capsys.readouterr().out
    assert f"{len(expected)} of {len(frame) - 1} samples" in out
    assert "image_undecodable               3" in out
    assert "shard_truncated                 1" in out
    left = sorted(p.name for p in (tmp_path / "out" / "_spark_nsfw").iterdir())
    assert left == ["plan.json"]


def test_a_predicate_may_use_any_score_column(
    spark, shards, detector_path, aesthetic_path, tmp_path
):
    embedder = TimmImageEmbedder(
        "test_vit2",
        embedding_size=768,
        classifiers=[
            NsfwClassifier(model_path=detector_path),
            AestheticClassifier(model_path=aesthetic_path),
        ],
    )
    tar = shards / "00000.tar"
    score_into(spark, str(tar), tmp_path / "metadata", embedder, plan="fused")
    frame = pd.read_parquet(tmp_path / "metadata")
    least, most = frame["aesthetic_score"].median(), frame["nsfw_score"].quantile(0.9)
    where = f"aesthetic_score >= {least} and nsfw_score < {most}"
    scored = (tmp_path / "metadata", frame)
    assert main(command(scored, tmp_path / "out", tar, "--where", where)) == 0
    kept = frame[(frame["aesthetic_score"] >= least) & (frame["nsfw_score"] < most)]
    assert 0 < len(kept) < len(frame)
    assert list(samples_of(tmp_path / "out" / "00000.tar")) == kept["key"].tolist()
    sidecar = pd.read_parquet(tmp_path / "out" / "00000.parquet")
    assert sidecar["aesthetic_score"].tolist() == kept["aesthetic_score"].tolist()


def test_the_output_is_a_dataset_whose_sidecar_rows_stay_with_their_samples(
    spark, scored, shards, tmp_path, embedder
):
    # New keys of the old ones' form: a sample's JSON names the new key of another sample.
    regroup = ["--samples-per-shard=2000", "--renumber", "--where=nsfw_score >= 0"]
    assert main(command(scored, tmp_path / "out", shards, *regroup)) == 0
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "out"))
    columns = ["key", "status", "source_shard", "source_key", "nsfw_score"]
    found = embedder(dataset).metadata.select(columns).toPandas()
    assert set(found["status"]) == {"ok"}
    assert found["key"].tolist() == [f"{i:09}" for i in range(len(found))]
    before = scored[1].dropna(subset="nsfw_score").set_index(["shard", "key"])["nsfw_score"]
    after = found.set_index(["source_shard", "source_key"])["nsfw_score"]
    assert after.to_dict() == before.to_dict()
    assert (found["key"] != found["source_key"]).sum() > 20


def test_a_run_that_was_stopped_goes_on(spark, scored, shards, tmp_path, monkeypatch, capsys):
    arguments = command(scored, tmp_path / "out", shards, "--where=nsfw_score >= 0")
    assert main(command(scored, tmp_path / "whole", shards, "--where=nsfw_score >= 0")) == 0
    with monkeypatch.context() as patch:  # stopped after the first shard
        patch.setattr("spark_nsfw.spark.export.write_output_shard", None)
        assert main(arguments) == 1
    assert "Run again to resume" in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("*.tar")) == []
    whole = {p.relative_to(tmp_path / "whole"): p for p in (tmp_path / "whole").rglob("*.tar")}
    first = tmp_path / "out" / "00000.tar"
    first.write_bytes(b"as if an earlier run had finished it")
    shutil.copyfile(tmp_path / "whole" / "00000.parquet", tmp_path / "out" / "00000.parquet")
    half = tmp_path / "out" / "00001.tar"  # as after a kill between the tar and its sidecar
    half.write_bytes(b"x")
    assert main(arguments) == 0
    assert first.read_bytes() == b"as if an earlier run had finished it"
    again = {p.relative_to(tmp_path / "out"): p for p in (tmp_path / "out").rglob("*.tar")}
    assert again.keys() == whole.keys()
    for name in again.keys() - {first.relative_to(tmp_path / "out")}:
        assert again[name].read_bytes() == whole[name].read_bytes()

    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert main(arguments) == 0  # finished: nothing is written again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == times
    half.unlink()
    assert main(arguments) == 1
    assert "00001.tar is gone" in capsys.readouterr().err


def test_what_a_run_selected_that_was_stopped_before_its_plan_is_forgotten(
    spark, scored, shards, tmp_path, monkeypatch, capsys
):
    everything, nothing = "--where=nsfw_score >= 0", "--where=nsfw_score > 2"
    with monkeypatch.context() as patch:
        patch.setattr("spark_nsfw.spark.export.plan_shards", None)  # before the plan stands
        with pytest.raises(TypeError):
            main(command(scored, tmp_path / "out", shards, everything))
    assert list((tmp_path / "out").rglob("shard=00000/*.parquet"))
    assert main(command(scored, tmp_path / "out", shards, nothing)) == 0
    assert list((tmp_path / "out").rglob("*.tar")) == []


def test_files_of_others_outlive_an_export(spark, scored, shards, tmp_path, monkeypatch):
    arguments = command(scored, tmp_path / "out", shards, "--where=nsfw_score >= 0")
    foreign = ("selection/notes", "selection/part-0.parquet", "partial/notes")
    names = {f"_spark_nsfw/{name}" for name in foreign}

    def foreign_files():
        return {name: found for name, found in listing(tmp_path / "out").items() if name in names}

    with monkeypatch.context() as patch:  # before the plan stands
        patch.setattr("spark_nsfw.spark.export.plan_shards", None)
        with pytest.raises(TypeError):
            main(arguments)
    write_files(tmp_path / "out", *names)
    before = foreign_files()
    with monkeypatch.context() as patch:
        patch.setattr("spark_nsfw.spark.export.write_output_shard", None)
        assert main(arguments) == 1
    assert foreign_files() == before
    names |= {"readme", "_spark_nsfw/notes", "_spark_nsfw/more/notes"}
    write_files(tmp_path / "out", *names - set(before))
    (selection,) = (tmp_path / "out" / "_spark_nsfw" / "selection").glob("*/shard=00000")
    names.add(f"{selection.relative_to(tmp_path / 'out')}/notes")
    (selection / "notes").write_text("mine")
    before = foreign_files()
    assert len(before) == len(names)
    assert main(arguments) == 0
    left = (tmp_path / "out" / "_spark_nsfw").rglob("*")
    left = {path.relative_to(tmp_path / "out").as_posix() for path in left if path.is_file()}
    assert left == {"_spark_nsfw/plan.json", *names - {"readme"}}
    assert main(arguments) == 0
    assert foreign_files() == before


@needs_unreadable
def test_a_shard_that_cannot_be_read_now_stops_the_export(
    spark, scored, shards, tmp_path, threshold, capsys
):
    shutil.copytree(shards, tmp_path / "in")
    shard = tmp_path / "in" / "00001.tar"
    shard.unlink()
    shard.symlink_to(UNREADABLE)
    arguments = command(
        scored, tmp_path / "out", tmp_path / "in", "--where=nsfw_score >= 0", "--allow-moved"
    )
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "00001.tar cannot be read now" in error
    assert "Run again to resume" in error
    assert not (tmp_path / "out" / "00001.tar").exists()
    shard.unlink()
    shutil.copyfile(shards / "00001.tar", shard)
    assert main(arguments) == 0
    assert (tmp_path / "out" / "00001.tar").read_bytes() == shard.read_bytes()


def test_samples_that_are_not_in_the_shards_are_exit_status_1(
    spark, scored, shards, tmp_path, capsys
):
    shutil.copytree(shards, tmp_path / "in")
    whole = list(samples_of(shards / "00001.tar").items())
    members = [
        (f"{key}.{e}", content) for key, sample in whole[:-3] for e, content in sample.items()
    ]
    write_tar(tmp_path / "in" / "00001.tar", members)
    arguments = command(
        scored, tmp_path / "out", tmp_path / "in", "--where=nsfw_score >= 0", "--allow-moved"
    )
    assert main(arguments) == 1
    found = capsys.readouterr()
    assert "could not be copied             3" in found.out
    assert found.err.count("\n") == 1
    assert "3 of the chosen samples" in found.err
    assert f"00001: 3 selected samples are not in it, such as {whole[-3][0]!r}" in found.err
    assert "export into another directory" in found.err
    assert samples_of(tmp_path / "out" / "00001.tar") == dict(whole[:-3])
    assert (tmp_path / "out" / "00002.tar").read_bytes() == (shards / "00002.tar").read_bytes()

    assert main(arguments) == 1  # it still is so
    number = len(whole)
    assert f"00001.tar has {number - 3} of {number} selected samples" in capsys.readouterr().err


def test_another_export_into_the_same_output_is_refused(spark, scored, shards, tmp_path, capsys):
    assert main(command(scored, tmp_path / "out", shards, "--where=nsfw_score >= 0")) == 0
    assert main(command(scored, tmp_path / "out", shards, "--where=nsfw_score >= 1")) == 1
    error = capsys.readouterr().err
    assert 'where was "nsfw_score >= 0", is now "nsfw_score >= 1"' in error
    changed = tmp_path / "metadata"
    shutil.copytree(scored[0], changed)
    shutil.rmtree(changed / "shard=00001")
    other = (changed, scored[1])
    assert main(command(other, tmp_path / "out", shards, "--where=nsfw_score >= 0")) == 1
    assert "metadata.num_files was" in capsys.readouterr().err


def test_metadata_that_was_replaced_under_its_name_is_another_export(
    spark, scored, shards, tmp_path, capsys
):
    arguments = command(scored, tmp_path / "out", shards, "--where=nsfw_score >= 0")
    assert main(arguments) == 0
    copied = shutil.copytree(scored[0], tmp_path / "metadata")  # with the times of the originals
    arguments[1] = str(copied)
    assert main(arguments) == 0
    (path,) = copied.glob("shard=00001/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table, path)
    capsys.readouterr()
    assert main(arguments) == 1
    assert "input_files_sha256 was" in capsys.readouterr().err


def test_rows_are_counted_without_observe_which_rapids_cannot_plan(
    spark, scored, shards, tmp_path, monkeypatch
):
    plans, append = [], ParquetOutput.append

    def write(output, rows):
        plans.append(plan_text(rows))
        append(output, rows)

    monkeypatch.setattr(ParquetOutput, "append", write)
    inputs = ShardInputs.parse(str(shards))
    where = "nsfw_score >= 0"
    summary = export_metadata(spark, str(scored[0]), str(tmp_path / "out"), inputs, where)
    assert ["CollectMetrics" in plan for plan in plans] == [False]
    observed = spark.range(1).observe("count", F.count("id"))
    assert "CollectMetrics" in plan_text(observed)
    statuses = scored[1]["status"]
    assert summary.num_rows == statuses.value_counts().to_dict()
    assert summary.num_selected == {"ok": (statuses == "ok").sum()}


def plan_text(rows):
    text = io.StringIO()
    with redirect_stdout(text):
        rows.explain(mode="extended")
    return text.getvalue()


def test_unscored_samples_are_kept_on_request(spark, scored, shards, tmp_path, capsys):
    options = ["--where=nsfw_score > 2", "--keep-unscored", "--columns=width"]
    assert main(command(scored, tmp_path / "out", shards, *options)) == 0
    samples = {s.key: s for s in iter_samples(str(tmp_path / "out" / "odd" / "00000.tar"))}
    assert samples["not_an_image"].members == {"jpg": b"<html>404 Not Found</html>"}
    assert samples["two_images"].status == "member_duplicated"
    assert set(samples) >= {"cut_in_half", "empty_file", "caption_only", "too_many_pixels"}
    sidecar = pd.read_parquet(tmp_path / "out" / "odd" / "00000.parquet")
    assert sidecar.columns.tolist() == ["shard", "key", "width", "status", "error_message"]
    out = capsys.readouterr().out
    assert "could not be copied             1" in out  # the one that its shard's end cut off
    assert "00003: " in out


def test_an_empty_selection_writes_no_shard(spark, scored, shards, tmp_path, capsys):
    assert main(command(scored, tmp_path / "out", shards, "--where=false")) == 0
    assert "no sample was selected" in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("*.tar")) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--where=no_such_column < 1"], "no_such_column"),
        (["--where=nsfw_score <"], "nsfw_score <"),
        (["--where=nsfw_score"], "nsfw_score"),
        (["--where=true", "--columns=depth"], "no column depth"),
        (["--where=true", "--renumber"], "set --samples-per-shard"),
        (["--where=true", "--samples-per-shard=3", "--renumber", "--old-id-col=width"], "width"),
        (["--where=true", "--samples-per-shard=1", "--shard-digits=1"], "cannot be numbered"),
    ],
)
def test_what_cannot_work_is_exit_status_2(spark, scored, shards, tmp_path, capsys, options, named):
    assert main(command(scored, tmp_path / "out", shards, *options)) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tar"))


def test_places_that_cannot_be_right_are_refused(spark, scored, shards, tmp_path, capsys):
    for output in (shards, shards / "clean", scored[0], scored[0] / "clean"):
        assert main(command(scored, output, shards, "--where=true")) == 2
        assert "the input" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert main(command(scored, tmp_path / "full", shards, "--where=true")) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert main(command(scored, tmp_path / "out", shards / "odd", "--where=true")) == 2
    assert "give the input that was scored" in capsys.readouterr().err
    nothing = (tmp_path / "nothing", None)
    assert main(command(nothing, tmp_path / "out", shards, "--where=true")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_one_key_in_two_shards_is_refused_by_the_command(spark, tmp_path, embedder):
    picture = encode(next(photographs()))
    for name in ("a", "b"):
        write_shard(tmp_path / "in" / f"{name}.tar", [("same", [("jpg", picture)])])
    inputs = ShardInputs.parse(str(tmp_path / "in"))
    score_into(spark, inputs, tmp_path / "metadata", embedder, plan="fused")
    with pytest.raises(JobError, match="both have a sample 'same'"):
        export_metadata(
            spark, str(tmp_path / "metadata"), str(tmp_path / "out"), inputs, "true",
            options=ExportOptions(samples_per_shard=5),
        )  # fmt: skip
    summary = export_metadata(
        spark, str(tmp_path / "metadata"), str(tmp_path / "other"), inputs, "true"
    )
    assert (summary.num_samples, summary.num_shards) == (2, 2)


def test_to_webdataset_is_nemo_curators(spark, tmp_path, embedder):
    write_photograph_shards(tmp_path / "in", num_shards=3, samples_per_shard=5)
    scored = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path / "in"), id_col="key"))
    with pytest.raises(InputError, match="no column 'is_wide' of booleans"):
        scored.to_webdataset(str(tmp_path / "out"), filter_column="is_wide")
    scored.metadata = scored.metadata.withColumn("is_wide", F.col("width") > 480)
    summary = scored.to_webdataset(
        str(tmp_path / "out"),
        filter_column="is_wide",
        samples_per_shard=4,
        max_shards=3,
        old_id_col="old_key",
    )
    wide = {
        (path.stem, key): members
        for path in sorted((tmp_path / "in").glob("*.tar"))
        for key, members in samples_of(path).items()
        if json.loads(members["json"])["width"] > 480
    }
    assert 4 < len(wide) < 15
    assert summary.num_samples == len(wide)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [tar.name for tar in tars] == [f"{i:03}.tar" for i in range(-(-len(wide) // 4))]
    found = [item for tar in tars for item in samples_of(tar).items()]
    assert [key for key, _ in found] == [f"{i // 4:03}{i % 4}" for i in range(len(wide))]
    assert [members for _, members in found] == list(wide.values())
    sidecar = pd.concat(pd.read_parquet(tar.with_suffix(".parquet")) for tar in tars)
    assert sidecar["key"].tolist() == [key for key, _ in found]
    assert list(zip(sidecar["source_shard"], sidecar["old_key"], strict=True)) == list(wide)
    assert sidecar["nsfw_score"].between(0, 1).all()
    assert sidecar["is_wide"].all()

    again = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path / "in"), id_col="key"))
    same = {"samples_per_shard": 4, "max_shards": 3, "old_id_col": "old_key"}
    again.metadata = again.metadata.withColumn("is_wide", F.col("width") > 480)
    assert again.to_webdataset(str(tmp_path / "out"), "is_wide", **same) == summary
    again.metadata = again.metadata.withColumn("is_wide", F.col("width") > 500)
    with pytest.raises(JobError, match="query_sha256 was"):
        again.to_webdataset(str(tmp_path / "out"), "is_wide", **same)


class Scorer(ImageClassifier):
    """Weights in a file, and a score of another column."""

    def load_model(self, device):
        self.weights_file()
        return lambda embeddings: embeddings.sum(dim=1)


def test_a_dataset_with_other_weights_or_more_shards_is_another_export(spark, tmp_path):
    write_photograph_shards(tmp_path / "in", num_shards=1, samples_per_shard=3)
    weights = tmp_path / "weights"

    def export_again():
        tower = TimmImageEmbedder("test_vit2", embedding_size=16)
        scorer = Scorer("any_score", model_path=str(weights))
        dataset = scorer(tower(ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))))
        dataset.metadata = dataset.metadata.withColumn("all", F.lit(True))
        return dataset.to_webdataset(str(tmp_path / "out"), "all")

    with registered_by_value():
        weights.write_bytes(b"1")
        assert export_again().num_samples == 3
        assert export_again().num_samples == 3
        weights.write_bytes(b"2")
        with pytest.raises(JobError, match=r"classifiers\.0\.weights\.sha256 was"):
            export_again()
        weights.write_bytes(b"1")
        shutil.copyfile(tmp_path / "in" / "00000.tar", tmp_path / "in" / "00001.tar")
        with pytest.raises(JobError, match="shards_sha256 was"):
            export_again()


def test_an_export_of_stored_embeddings_knows_its_classifier(spark, tmp_path, detector_path):
    write_photograph_shards(tmp_path / "in", num_shards=1, samples_per_shard=3)
    TimmImageEmbedder("test_vit2", embedding_size=768)(
        ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
    ).save_metadata()
    for variant, refused in (("torch", False), ("torch", False), ("laion", True)):
        stored = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
        stored = NsfwClassifier(model_path=detector_path, variant=variant)(stored)
        stored.metadata = stored.metadata.withColumn("all", F.lit(True))
        if refused:
            with pytest.raises(JobError, match=r"classifiers\.0\.variant was"):
                stored.to_webdataset(str(tmp_path / "out"), "all")
        else:
            assert stored.to_webdataset(str(tmp_path / "out"), "all").num_samples == 3


@contextmanager
def registered_by_value():
    """Lets workers, which cannot import this module, have its classes."""
    from pyspark import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
