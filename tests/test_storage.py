"""Real files, and a real S3 server behind a proxy that breaks down on request."""

import functools
import io
import os
import pickle
import resource
import threading
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from test_shards import write_tar

from spark_nsfw import SampleOptions, storage
from spark_nsfw.errors import StorageError
from spark_nsfw.files import delete_empty_directories, delete_files, iter_files, write_file
from spark_nsfw.read.embeddings import EmbeddingSource
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.read.sidecar import Sidecar
from spark_nsfw.read.source import Unit
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.storage import ignores_case, is_below, open_input
from spark_nsfw.use.metadata import MetadataFiles

MIB = 1 << 20
KEYS = [f"{i:02}" for i in range(20)]


@pytest.fixture
def hasty(monkeypatch):
    """Three tries at once, and none of pyarrow's own, which go on for six seconds each."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.01, 0.01))
    made = storage._filesystem.__wrapped__

    @functools.lru_cache
    def filesystem(scheme, authority):
        if scheme != "s3":
            return made(scheme, authority)
        strategy = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        return fs.S3FileSystem(endpoint_override=endpoint, retry_strategy=strategy), authority

    monkeypatch.setattr(storage, "_filesystem", filesystem)


def tar_bytes(tmp_path):
    members = [(f"{key}.jpg", os.urandom(MIB)) for key in KEYS]
    return write_tar(tmp_path / "local.tar", members).read_bytes()


def put_tar(s3, tmp_path):
    write_file(f"{s3.url}/s.tar", tar_bytes(tmp_path))
    s3.proxy.requests.clear()
    return f"{s3.url}/s.tar"


def starts(ranges):
    return [int(found.removeprefix("bytes=").split("-")[0]) for found in ranges]


@pytest.mark.parametrize(
    "fault",
    [{"cut_after": 300_000}, {"cut_after": 0}, {"status": 500}, {"status": 503}, {"status": 403}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("first", [1, 2])
def test_a_bad_moment_costs_no_sample_and_one_block_is_read_twice(
    s3, hasty, tmp_path, fault, first
):
    url = put_tar(s3, tmp_path)
    struck = s3.proxy.fail("GET", r"s\.tar", first=first, **fault)
    samples = [(sample.key, sample.status, len(sample.members["jpg"])) for sample in
               iter_samples(url)]  # fmt: skip
    assert samples == [(key, "ok", MIB) for key in KEYS]
    assert struck.num_failed == 1
    found = starts(s3.proxy.ranges(r"s\.tar"))
    assert sorted(set(found)) == [0, 8 * MIB, 16 * MIB]
    assert len(found) <= 4


def test_a_connection_cut_once_is_mended_with_pyarrows_own_tries(s3, tmp_path):
    url = put_tar(s3, tmp_path)
    s3.proxy.fail("GET", r"s\.tar", first=2, cut_after=300_000)
    assert [sample.key for sample in iter_samples(url)] == KEYS


@pytest.mark.parametrize("fault", [{"cut_after": 1000}, {"status": 500}, {"status": 403}], ids=str)
@pytest.mark.parametrize("first", [1, 2])
def test_an_error_that_lasts_is_an_error_and_no_row(s3, hasty, tmp_path, fault, first):
    url = put_tar(s3, tmp_path)
    struck = s3.proxy.fail("GET", r"s\.tar", first=first, times=None, **fault)
    source = ShardSource(ShardInputs.parse(url), SampleOptions(batch_rows=1))
    (unit,) = source.units()
    statuses = []
    with pytest.raises(StorageError, match=r"s\.tar cannot be read now, after 3 tries: "):
        for rows, _ in source.read(unit, source.schema(())):
            statuses += rows.column("status").to_pylist()
    assert set(statuses) <= {"ok"}
    assert len(statuses) < len(KEYS)
    assert 3 <= struck.num_failed <= 3 * 3  # tries of each block


def test_a_file_that_cannot_be_opened_now_is_not_missing(s3, hasty, tmp_path):
    url = put_tar(s3, tmp_path)
    s3.proxy.fail("HEAD", r"s\.tar", times=None, status=403)
    with pytest.raises(StorageError, match="after 3 tries"):
        open_input(url)


def test_a_missing_file_is_told_at_once(s3, tmp_path):
    started = time.monotonic()
    for url in (f"{s3.url}/none.tar", str(tmp_path / "none.tar"), str(tmp_path / "no" / "none")):
        with pytest.raises(FileNotFoundError):
            open_input(url)
    with pytest.raises(IsADirectoryError):
        open_input(str(tmp_path))
    assert time.monotonic() - started < 0.4  # less than the first pause


def test_a_file_cut_short_on_disk_is_damaged(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes(tmp_path)[: 5 * MIB])
    *_, sample, fault = iter_samples(str(tmp_path / "s.tar"))
    assert (sample.status, fault.status) == ("member_truncated", "shard_truncated")


@pytest.mark.parametrize("what", ["shorter", "gone"])
def test_a_file_that_changes_while_it_is_read_is_no_damage(s3, hasty, tmp_path, what):
    url = put_tar(s3, tmp_path)
    with open_input(url) as stream:
        stream.read(1000)
        if what == "gone":
            delete_files([url])
        else:
            write_file(url, b"x" * 1000)
        stream.seek(19 * MIB)
        said = "vanished while it was read" if what == "gone" else "changed while it was read"
        with pytest.raises(StorageError, match=said):
            stream.read(10)


def test_a_local_file_that_is_cut_while_it_is_read_is_no_damage(tmp_path, hasty):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes(tmp_path))
    with open_input(str(path)) as stream, pytest.raises(StorageError, match="changed while"):
        stream.read(1000)
        os.truncate(path, 5 * MIB)
        stream.seek(10 * MIB)
        stream.read(10)


def test_another_try_takes_the_credentials_of_now(s3, tmp_path, monkeypatch):
    """A filesystem of pyarrow's looks into the file for new ones every five minutes only."""
    url = put_tar(s3, tmp_path)
    credentials = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = secret\n"
    credentials.write_text(text.format("EXPIRED"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    storage._filesystem.cache_clear()
    struck = s3.proxy.fail("", r"s\.tar", access_key="EXPIRED", times=None, status=403)
    pauses = []

    def renew(seconds):
        if threading.current_thread() is threading.main_thread():  # others sleep, too
            pauses.append(seconds)
        credentials.write_text(text.format("FRESH"))

    monkeypatch.setattr(storage.time, "sleep", renew)
    with open_input(url) as stream:
        assert len(stream.read()) > 20 * MIB
    assert (struck.num_failed, len(pauses)) == (1, 1)
    assert "FRESH" in s3.proxy.requests[-1][2]["authorization"]


def test_the_whole_of_a_file_is_one_request(s3, tmp_path):
    url = put_tar(s3, tmp_path)
    with open_input(url) as stream:
        content = stream.read()
    assert content == (tmp_path / "local.tar").read_bytes()
    assert len(s3.proxy.ranges(r"s\.tar")) == 1


def test_seeks_and_reads_are_those_of_a_plain_file(s3, tmp_path):
    (tmp_path / "plain").write_bytes(os.urandom(20 * MIB + 7))
    write_file(f"{s3.url}/plain", (tmp_path / "plain").read_bytes())
    rng = np.random.default_rng(5)
    for url in (f"{s3.url}/plain", str(tmp_path / "plain")):
        with open_input(url) as stream, (tmp_path / "plain").open("rb") as plain:
            for _ in range(60):
                kind = rng.integers(5)
                offset = int(rng.integers(0, 22 * MIB))
                if kind == 0:
                    assert stream.seek(offset) == plain.seek(offset)
                elif kind == 1:
                    back = -min(offset, 20 * MIB)
                    assert stream.seek(back, io.SEEK_END) == plain.seek(back, io.SEEK_END)
                elif kind == 2:
                    step = -min(1000, plain.tell())
                    assert stream.seek(step, io.SEEK_CUR) == plain.seek(step, io.SEEK_CUR)
                size = int(rng.choice([0, 1, 512, 8192, MIB, 9 * MIB]))
                assert stream.read(size) == plain.read(size)
                assert stream.tell() == plain.tell()
            assert stream.read() == plain.read()
            assert stream.read() == b""


def sidecar_bytes(**options):
    table = pa.table({"key": KEYS, "text": [f"{key} " * 200 for key in KEYS]})
    pq.write_table(table, sink := io.BytesIO(), **options)
    return sink.getvalue()


def sidecar_source(url):
    return ShardSource(ShardInputs.parse(url))


TEXT = [pa.field("text", pa.string())]


def rows_of(source, unit, own):
    batches = [rows for rows, _ in source.read(unit, source.schema(own))]
    return pa.Table.from_batches(batches).to_pylist()


def test_a_sidecar_that_cannot_be_read_now_is_an_error(s3, hasty, tmp_path):
    url = put_tar(s3, tmp_path)
    write_file(f"{s3.url}/s.parquet", sidecar_bytes())
    source = sidecar_source(url)
    s3.proxy.fail("", r"s\.parquet", times=None, status=403)
    with pytest.raises(StorageError, match=r"s\.parquet cannot be read now"):
        rows_of(source, Unit("s", url), TEXT)
    s3.proxy.mend()
    assert [row["text"][:2] for row in rows_of(source, Unit("s", url), TEXT)] == KEYS


def flipped(content):
    """A bit of a text flips, which only the page's checksum tells."""
    position = content.index(b"11 11 11")
    return content[:position] + b"0" + content[position + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", flipped])
def test_a_damaged_sidecar_is_a_row(s3, tmp_path, damage):
    url = put_tar(s3, tmp_path)
    content = sidecar_bytes(compression="none", use_dictionary=False, write_page_checksum=True)
    write_file(f"{s3.url}/s.parquet", damage(content))
    *samples, fault = rows_of(sidecar_source(url), Unit("s", url), TEXT)
    assert [(row["key"], row["status"], row["text"]) for row in samples] == [
        (key, "ok", None) for key in KEYS
    ]
    assert (fault["key"], fault["status"]) == (None, "sidecar_unreadable")
    assert "s.parquet" in fault["error_message"]


def test_a_missing_sidecar_is_none(s3, tmp_path):
    url = put_tar(s3, tmp_path)
    assert Sidecar.read(url, "key") is None
    assert [row["status"] for row in rows_of(sidecar_source(url), Unit("s", url), TEXT)] == (
        ["ok"] * len(KEYS)
    )


def embedding_bytes(num_rows=6000, **options):
    vectors = np.random.default_rng(0).standard_normal((num_rows, 64)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 64)
    table = pa.table({"key": [f"{i}" for i in range(num_rows)], "image_embedding": column})
    pq.write_table(table, sink := io.BytesIO(), **options)
    return sink.getvalue()


def read_embeddings(source):
    schema = source.schema()
    batches = [rows for unit in source.units() for rows, _ in source.read(unit, schema)]
    return pa.Table.from_batches(batches).to_pylist()


def test_embeddings_that_cannot_be_read_now_are_an_error(s3, hasty, monkeypatch):
    """Whichever request of pyarrow's it hits, the error comes out of its C++ as it went in."""
    monkeypatch.setattr(storage, "_REMOTE_BUFFER_BYTES", 100_000)
    write_file(f"{s3.url}/0.parquet", embedding_bytes(row_group_size=500))
    source = EmbeddingSource.open(s3.url)
    s3.proxy.requests.clear()
    expected = read_embeddings(source)
    num_requests = len(s3.proxy.ranges(r"0\.parquet"))
    assert num_requests > 2
    for first in range(1, num_requests + 1):
        s3.proxy.fail("GET", r"0\.parquet", first=first, times=None, status=403)
        with pytest.raises(StorageError, match=r"0\.parquet cannot be read now") as caught:
            read_embeddings(source)
        assert type(caught.value) is StorageError
        s3.proxy.mend()
        s3.proxy.fail("GET", r"0\.parquet", first=first, status=403)
        assert read_embeddings(source) == expected
        s3.proxy.mend()


def test_an_npy_that_cannot_be_read_now_is_an_error(s3, hasty):
    for name in ("img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"):
        sink = io.BytesIO()
        if name.endswith("npy"):
            np.save(sink, np.ones((10, 4), np.float32))
        else:
            pd.DataFrame({"image_path": KEYS[:10]}).to_parquet(sink)
        write_file(f"{s3.url}/{name}", sink.getvalue())
    source = EmbeddingSource.open(s3.url)
    assert len(read_embeddings(source)) == 10
    for path in (r"\.npy", r"metadata_0\.parquet"):
        s3.proxy.fail("GET", path, times=None, status=403)
        with pytest.raises(StorageError, match="cannot be read now"):
            read_embeddings(source)
        with pytest.raises(StorageError, match="cannot be read now"):
            EmbeddingSource.open(s3.url)
        s3.proxy.mend()


def test_a_damaged_file_of_embeddings_gives_what_can_be_read_and_a_row(tmp_path):
    content = bytearray(embedding_bytes(row_group_size=2048, use_dictionary=False))
    last = pq.read_metadata(io.BytesIO(content)).row_group(2).column(1)
    content[last.data_page_offset : last.data_page_offset + 200] = b"\xff" * 200
    (tmp_path / "0.parquet").write_bytes(content)
    (tmp_path / "1.parquet").write_bytes(embedding_bytes(3))
    rows = read_embeddings(EmbeddingSource.open(str(tmp_path)))
    assert [row["key"] for row in rows] == [f"{i}" for i in range(4096)] + [None, "0", "1", "2"]
    assert rows[4096]["status"] == "shard_unreadable"
    assert "0.parquet" in rows[4096]["error_message"]


def test_a_file_without_rows_is_a_row(tmp_path):
    (tmp_path / "0.parquet").write_bytes(embedding_bytes(3))
    (tmp_path / "1.parquet").write_bytes(embedding_bytes(0))
    *rows, last = read_embeddings(EmbeddingSource.open(str(tmp_path)))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert (last["shard"], last["key"], last["status"]) == ("1", None, "shard_empty")


@pytest.fixture
def small_files():
    """The operating system refuses to make a file longer than 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [None, b"old"])
def test_half_a_file_is_never_seen(tmp_path, small_files, before):
    path = tmp_path / "a" / "f"
    if before is not None:
        write_file(str(path), before)
    with pytest.raises(StorageError, match="a/f cannot be written"):
        write_file(str(path), bytes(2 * MIB))
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()] == (
        [] if before is None else [("f", before)]
    )


def test_a_file_is_written_over_another(tmp_path, s3):
    for url in (str(tmp_path / "new" / "f"), f"{s3.url}/new/f"):
        for content in (b"one", b"", b"three"):
            write_file(url, content)
            with open_input(url) as stream:
                assert stream.read() == content
        assert [entry.name for entry in iter_files(url.removesuffix("/new/f"))] == ["new/f"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("request_of", ["PUT", "POST"])
def test_nothing_half_is_published(s3, hasty, before, request_of):
    if before is not None:
        write_file(f"{s3.url}/f", before)
    s3.proxy.fail(request_of, r"partNumber=2|uploadId=\w+$", times=None, status=403)
    with pytest.raises(StorageError, match="f cannot be written"):
        write_file(f"{s3.url}/f", bytes(25 * MIB))
    s3.proxy.mend()
    assert [entry.size for entry in iter_files(s3.url)] == ([] if before is None else [3])


TREE = ["a", ".b", "_c", "d/e", "d/.f/g", "_h/i", "_h=1/j"]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    url = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").url
    return f"{url}/root"


def plant(root, names=TREE):
    for name in names:
        write_file(f"{root}/{name}", name.encode())


def names_in(root, **options):
    return sorted(entry.name for entry in iter_files(root, **options))


def test_files_are_listed_hidden_ones_too(root):
    assert names_in(root) == []  # it is not there
    plant(root)
    assert names_in(root) == names_in(f"{root}/") == sorted(TREE)
    assert {entry.name: entry.size for entry in iter_files(root)} == {n: len(n) for n in TREE}
    ages = [time.time() - entry.modified_seconds for entry in iter_files(root)]
    assert all(-2 < age < 60 for age in ages)


def test_a_directory_can_be_skipped(root):
    plant(root)
    assert not [n for n in names_in(root, skip=lambda name: "_h" in name) if n.startswith("_h")]


class Hdfs:
    """A local directory that lists as HDFS does and remembers what was listed."""

    type_name = "hdfs"

    def __init__(self):
        self.listed = []

    def get_file_info(self, selector):
        assert not selector.recursive
        self.listed.append(selector.base_dir)
        return fs.LocalFileSystem().get_file_info(selector)


def test_hdfs_is_listed_without_what_is_skipped(tmp_path, monkeypatch):
    hdfs = Hdfs()
    for module in ("files", "storage"):
        monkeypatch.setattr(f"spark_nsfw.{module}.resolve", lambda url: (hdfs, url))
    names = ["_temporary/1/shard=a/part-0.parquet", "shard=b/part-0.parquet", ".hidden"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    assert MetadataFiles(str(tmp_path)).done() == {"b"}
    assert hdfs.listed == [str(tmp_path), f"{tmp_path}/shard=b"]
    assert names_in(str(tmp_path)) == sorted(names)
    assert names_in(f"{tmp_path}/none") == []


def test_files_are_deleted_and_gone_ones_are_fine(root):
    plant(root)
    delete_files(f"{root}/{name}" for name in ["a", "a", "none", "no/such", "d/e"])
    assert names_in(root) == sorted(set(TREE) - {"a", "d/e"})


def test_files_that_cannot_be_deleted_are_told(s3, hasty):
    plant(s3.url)
    s3.proxy.fail("DELETE", "", times=None, status=403)
    with pytest.raises(StorageError, match="a cannot be deleted"):
        delete_files([f"{s3.url}/a"])


def test_a_listing_that_fails_is_told(s3, hasty):
    s3.proxy.fail("GET", "", times=None, status=403)
    with pytest.raises(StorageError, match="cannot be listed"):
        list(iter_files(s3.url))


def test_empty_directories_go_and_those_with_a_foreign_file_stay(root):
    filesystem, path = storage.resolve(root)
    plant(root)
    for name in ("empty/er", "d/none", "d/.f/none"):
        filesystem.create_dir(f"{path}/{name}")
    delete_files(f"{root}/{name}" for name in TREE if name != "d/.f/g")
    delete_empty_directories(root)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    found = {info.path.removeprefix(f"{path}/") for info in infos}
    assert found == {"d", "d/.f", "d/.f/g"}
    delete_files([f"{root}/d/.f/g"])
    delete_empty_directories(root)
    delete_empty_directories(root)  # it is gone already
    assert filesystem.get_file_info(path).type is fs.FileType.NotFound


def test_links_are_not_followed_when_directories_are_deleted(tmp_path):
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    delete_empty_directories(str(tmp_path / "root"))
    assert (tmp_path / "elsewhere" / "empty").is_dir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"")
    assert names_in(str(tmp_path / "root")) == ["link"]
    assert names_in(str(tmp_path / "root"), follow_links=True) == ["link/f"]


def test_loops_of_links_end_and_broken_links_are_left_out(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "f").write_bytes(b"")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "nowhere")
    assert names_in(str(tmp_path), follow_links=True) == ["a/f"]


def test_directories_may_vanish_while_they_are_listed(tmp_path):
    for directory in range(300):
        plant(f"{tmp_path}/{directory:03}", ["x/f"])
    (tmp_path / "stays").write_bytes(b"")

    def delete():
        for directory in range(299, -1, -1):
            delete_files([f"{tmp_path}/{directory:03}/x/f"])
            delete_empty_directories(f"{tmp_path}/{directory:03}")

    thread = threading.Thread(target=delete)
    thread.start()
    while thread.is_alive():
        assert "stays" in names_in(str(tmp_path))
    thread.join()
    assert names_in(str(tmp_path)) == ["stays"]


def test_a_directory_that_may_not_be_listed_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    with pytest.raises(StorageError, match="cannot be listed"):
        list(iter_files(str(tmp_path)))


def test_linux_tells_names_by_case(tmp_path, s3):
    (tmp_path / "Directory").mkdir()
    for url in (str(tmp_path), str(tmp_path / "Directory"), str(tmp_path / "none" / "x"), s3.url):
        assert not ignores_case(url)
    (tmp_path / "Both").mkdir()
    (tmp_path / "bOTH").mkdir()
    assert not ignores_case(str(tmp_path / "Both"))


@pytest.mark.parametrize(
    ("url", "directory", "below"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a/", True),
        ("/a/", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/a/b", False),
        ("file:/a/b", "/a", True),
        ("s3://x/a/b", "s3a://x/a", True),
        ("s3a://x/a/", "s3://x/a", True),
        ("s3a://x", "s3a://x/", True),
        ("s3a://x/a", "s3a://x", True),
        ("s3a://xy/a", "s3a://x", False),
        ("s3a://x/a", "/x", False),
        ("/a/../b", "/b", True),
        ("/", "/", True),
        ("/a", "/", True),
    ],
)
def test_what_is_below_what(url, directory, below):
    assert is_below(url, directory) is below


def test_links_are_followed_to_see_what_is_below(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert is_below(str(tmp_path / "link" / "x"), str(tmp_path / "real"))
    assert is_below(str(tmp_path / "real" / "x"), str(tmp_path / "link"))


def test_sources_pickle_small(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.jpg", b"x")])
    source = ShardSource(ShardInputs.parse(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert len(pickle.dumps(source)) < 2000
    (unit,) = copy.units()
    assert [row["key"] for row in rows_of(copy, unit, ())] == ["a"]
