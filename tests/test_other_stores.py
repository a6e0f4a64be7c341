"""Python's part on Google's and Azure's stores and WebHDFS; the whole program on WebHDFS."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from fsspec.implementations.webhdfs import WebHDFS
from pyarrow import fs
from stores import azurite, fake_gcs, hdfs_cluster, program

from examples.photographs import write_photograph_shards
from spark_nsfw import SampleOptions, storage
from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.files import (
    delete_files,
    exists,
    iter_files,
    list_files,
    move_file,
    write_file,
)
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.storage import open_input

pytestmark = pytest.mark.stores

#: Azurite's own account, the same on every machine.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("in")
    write_photograph_shards(directory, num_shards=3, samples_per_shard=5)
    return directory


def always(store, root):
    """In place of `storage._filesystem`: the environment cannot name these servers."""
    found = functools.lru_cache(lambda scheme, authority: (store, root))
    storage._filesystem.cache_clear()
    return found


@pytest.fixture
def google(tmp_path, monkeypatch):
    if program("bin/fake-gcs-server") is None:
        pytest.skip("no fake-gcs-server: no Go here?")
    with fake_gcs(tmp_path / "log") as url:
        place = url.removeprefix("http://")
        store = fs.GcsFileSystem(anonymous=True, endpoint_override=place, scheme="http",
                                 project_id="p")  # fmt: skip
        store.create_dir("bucket")
        monkeypatch.setattr(storage, "_filesystem", always(store, "bucket"))
        yield "gs://bucket"


@pytest.fixture
def azure(tmp_path, monkeypatch):
    if program("node_modules/.bin/azurite-blob") is None:
        pytest.skip("no Azurite: no npm here?")
    with azurite(tmp_path / "log") as url:
        place = url.removeprefix("http://")
        store = fs.AzureFileSystem(
            AZURITE_ACCOUNT, account_key=AZURITE_KEY,
            blob_storage_authority=place, blob_storage_scheme="http",
            dfs_storage_authority=place, dfs_storage_scheme="http",
        )  # fmt: skip
        store.create_dir("container")
        monkeypatch.setattr(storage, "_filesystem", always(store, "container"))
        yield f"abfss://container@{AZURITE_ACCOUNT}.dfs.core.windows.net"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if program("ivy/jars/org.apache.hadoop_hadoop-client-minicluster-3.4.2.jar") is None:
        pytest.skip("no HDFS: no Maven repository here?")
    directory = tmp_path_factory.mktemp("hdfs")
    with hdfs_cluster(directory, directory / "log") as urls:
        yield urls


@pytest.fixture
def webhdfs(cluster):
    return f"{cluster[1]}/user"


@pytest.fixture(params=["google", "azure", "webhdfs"])
def place(request):
    return f"{request.getfixturevalue(request.param)}/{request.node.originalname}"


def upload(directory, url):
    for path in sorted(Path(directory).glob("*.tar")):
        write_file(f"{url}/{path.name}", path.read_bytes())


def rows_of(url):
    source = ShardSource(ShardInputs.parse(url), SampleOptions())
    units = source.units()
    schema = source.schema(units=units)
    read = [source.read(unit, schema) for unit in units]
    return [(batch.to_pylist(), images) for batches in read for batch, images in batches]


def test_shards_are_listed_and_read_as_on_a_local_disk(place, local):
    upload(local, f"{place}/in")
    assert rows_of(f"{place}/in") == rows_of(str(local))


def test_files_are_written_listed_moved_and_deleted(place):
    for name in ("a", "d/e", "d/f/g"):
        write_file(f"{place}/{name}", name.encode())
    write_file(f"{place}/a", b"another")  # in its place
    assert open_input(f"{place}/a").read() == b"another"
    assert list_files(place)[1] == ["a", "d/e", "d/f/g"]
    entries = list(iter_files(f"{place}/d"))
    assert {entry.name: entry.size for entry in entries} == {"e": 3, "f/g": 5}
    assert all(abs(entry.modified_seconds - time.time()) < 60 for entry in entries)
    move_file(f"{place}/d/e", f"{place}/a")
    assert open_input(f"{place}/a").read() == b"d/e"
    assert not exists(f"{place}/d/e")
    delete_files([f"{place}/a", f"{place}/none"])
    assert list_files(place)[1] == ["d/f/g"]


def test_what_is_not_there_is_told(place):
    with pytest.raises(FileNotFoundError):
        open_input(f"{place}/none.tar")
    assert list(iter_files(f"{place}/none")) == []
    with pytest.raises(InputError, match="none"):
        ShardInputs.parse(f"{place}/none.tar").list_units()


def test_the_whole_program_works_on_webhdfs(cluster, local, detector_path, tmp_path):
    place = f"{cluster[1]}/whole"
    upload(local, f"{place}/in")
    command = [sys.executable, "-m", "spark_nsfw.cli"]
    score = [*command, "score", f"{place}/in", f"{place}/out", "--model=test_vit",
             "--embedding-size=768", "--no-pretrained",
             f"--detector=laion={detector_path}"]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(score, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing to do" in done.stderr
    page = tmp_path / "report.html"
    for more in (
        ["report", f"{place}/out", "-o", str(page), "--shards", f"{place}/in"],
        ["inspect", f"{place}/out"],
        ["export", f"{place}/out", f"{place}/clean", "--shards", f"{place}/in",
         "--where", "nsfw_score >= 0"],
    ):  # fmt: skip
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert page.read_text("utf-8").count('<img alt="sample') > 0
    exported = [row for batch, _ in rows_of(f"{place}/clean") for row in batch]
    assert len(exported) == 15


def test_hdfs_without_its_library_is_told_with_two_remedies(cluster, tmp_path):
    command = [sys.executable, "-m", "spark_nsfw.cli", "score", f"{cluster[0]}/in"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CLASSPATH", "HADOOP_HOME")}
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "ARROW_LIBHDFS_DIR" in line
    assert "webhdfs://" in line


def test_a_node_that_fails_is_no_missing_file_and_its_words_are_no_content(
    webhdfs, local, monkeypatch
):
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.01, 0.01))
    upload(local, f"{webhdfs}/faults")
    url = f"{webhdfs}/faults/00000.tar"
    whole = (local / "00000.tar").read_bytes()
    send = requests.Session.send
    fails = []

    def faulty(session, request, **kwargs):
        if fails and fails[0] in request.url:
            fails.pop(0)
            raise requests.ConnectionError("nobody answers")
        return send(session, request, **kwargs)

    monkeypatch.setattr(requests.Session, "send", faulty)
    for fault in ("GETFILESTATUS", "op=OPEN", "namenoderpcaddress"):
        fails[:] = [fault]
        assert open_input(url).read() == whole
        assert not fails
        fails[:] = [fault] * 9
        with pytest.raises(StorageError, match="cannot be read now"):
            open_input(url).read()
    fails.clear()
    lost = lambda _, place: place.replace("00000.tar?op=OPEN", "none?op=OPEN")  # noqa: E731
    monkeypatch.setattr(WebHDFS, "_apply_proxy", lost)
    with pytest.raises(StorageError, match="cannot be read now"):  # a data node's 404
        open_input(url).read()


def test_a_name_node_that_does_not_answer_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.01,))
    storage._filesystem.cache_clear()
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        list(iter_files("webhdfs://127.0.0.1:9/in"))
