import io
import tarfile

import pytest
import webdataset.tariterators as reference

from spark_nsfw import SampleOptions, iter_sample_batches
from spark_nsfw.read.tar import iter_samples, split_name
from spark_nsfw.schema import Status


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a/b.c/001.SEG.png", "./x.jpg", ".hidden", "no_extension", "a.b/c",
     "a..jpg", "deep/er/k.tar.gz", "k.", "/abs/k.jpg", "new\nline.jpg", "..jpg", "a/../b.jpg"],
)  # fmt: skip
def test_names_split_as_webdataset_splits_them(name):
    prefix, suffix = reference.base_plus_ext(name)
    expected = None if prefix is None else (prefix, suffix.lower())
    assert split_name(name) == expected


def test_hidden_files_are_no_samples_below_a_folder_either():
    # webdataset makes one sample with the key "dir/" of all of them
    assert split_name("dir/._001.jpg") is None


@pytest.mark.parametrize("name", ["__meta__.json", "__dir__/a.jpg", "__x__"])
def test_webdatasets_own_notes_are_no_samples(name):
    assert split_name(name) is None


def test_adjacent_members_with_one_key_are_one_sample(tmp_path):
    members = [("b.jpg", b"1"), ("b.TXT", b"2"), ("a.jpg", b"3"), ("x/a.json", b"{}")]
    path = write_tar(tmp_path / "s.tar", members)
    samples = [(s.key, s.members) for s in iter_samples(str(path))]
    assert samples == [
        ("b", {"jpg": b"1", "txt": b"2"}),
        ("a", {"jpg": b"3"}),
        ("x/a", {"json": b"{}"}),
    ]


def test_samples_are_those_of_webdataset(tmp_path, shards):
    for shard in sorted(shards.glob("0000[012].tar")):
        files = reference.tar_file_expander([{"url": str(shard), "stream": shard.open("rb")}])
        expected = [
            (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in reference.group_by_keys(files)
        ]
        assert [(s.key, s.members) for s in iter_samples(str(shard))] == expected
        assert len(expected) == 11


def test_unwanted_members_are_named_but_not_read(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.mp4", b"2")])
    (sample,) = iter_samples(str(path), lambda extension: extension == "jpg")
    assert sample.members == {"jpg": b"1"}
    assert sample.extensions == ["jpg", "mp4"]


def test_two_members_with_one_extension_fail_the_sample(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3")])
    first, second = iter_samples(str(path))
    assert (first.status, first.error_message) == (
        Status.MEMBER_DUPLICATED,
        "two members with extension 'jpg'",
    )
    assert second.status is Status.OK


def test_a_key_that_comes_back_is_told(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    statuses = [(s.key, s.status) for s in iter_samples(str(path))]
    assert statuses == [("a", Status.OK), ("b", Status.OK), ("a", Status.KEY_REPEATED)]


def test_a_member_over_the_limit_is_not_read(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"12345"), ("b.jpg", b"1")])
    first, second = iter_samples(str(path), max_member_bytes=4)
    assert first.status is Status.MEMBER_OVERSIZED
    assert first.error_message == "a.jpg has 5 bytes, the limit is 4"
    assert second.members == {"jpg": b"1"}


def test_a_link_in_place_of_an_image_is_told(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
        archive.addfile(link)
    (sample,) = iter_samples(str(path))
    assert sample.status is Status.MEMBER_UNREADABLE


def whole_tar(tmp_path):
    members = [(f"{i}.jpg", bytes([i]) * 1000) for i in range(4)]
    return write_tar(tmp_path / "s.tar", members), 1536


@pytest.mark.parametrize("cut", [1, 100, 511])
def test_a_tar_cut_inside_a_header_gives_what_came_before_and_says_so(tmp_path, cut):
    path, size = whole_tar(tmp_path)
    path.write_bytes(path.read_bytes()[: 2 * size + cut])
    *samples, last = iter_samples(str(path))
    assert [(s.key, s.status) for s in samples] == [("0", Status.OK), ("1", Status.OK)]
    assert (last.key, last.status) == (None, Status.SHARD_TRUNCATED)


def test_a_tar_cut_between_members_says_so(tmp_path):
    path, size = whole_tar(tmp_path)
    path.write_bytes(path.read_bytes()[: 2 * size])
    *samples, last = iter_samples(str(path))
    assert [s.key for s in samples] == ["0", "1"]
    assert (last.key, last.status) == (None, Status.SHARD_TRUNCATED)
    assert "no end-of-archive marker" in last.error_message


def test_a_tar_cut_inside_a_member_fails_that_member(tmp_path):
    path, size = whole_tar(tmp_path)
    path.write_bytes(path.read_bytes()[: 2 * size + 512 + 10])
    *samples, last = iter_samples(str(path))
    assert [(s.key, s.status) for s in samples] == [
        ("0", Status.OK),
        ("1", Status.OK),
        ("2", Status.MEMBER_TRUNCATED),
    ]
    assert samples[2].error_message == "2.jpg is cut off: 10 of 1,000 bytes"
    assert last.status is Status.SHARD_TRUNCATED


def test_a_damaged_header_ends_the_shard_and_says_so(tmp_path):
    path, size = whole_tar(tmp_path)
    content = bytearray(path.read_bytes())
    content[2 * size : 2 * size + 512] = b"x" * 512
    path.write_bytes(content)
    *samples, last = iter_samples(str(path))
    assert [s.key for s in samples] == ["0", "1"]
    assert last.status is Status.SHARD_TRUNCATED


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, b"\x1f\x8b" + b"\0" * 2000])
def test_a_file_that_is_no_tar_gives_one_row(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    (only,) = iter_samples(str(path))
    assert (only.key, only.status) == (None, Status.SHARD_UNREADABLE)


def test_a_shard_that_is_not_there_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        list(iter_samples(str(tmp_path / "gone.tar")))


@pytest.mark.parametrize("members", [[], [("__meta__.json", b"{}"), (".hidden", b"x")]])
def test_a_tar_without_samples_is_one_row_that_says_so(tmp_path, members):
    (only,) = iter_samples(str(write_tar(tmp_path / "s.tar", members)))
    assert (only.key, only.status) == (None, Status.SHARD_EMPTY)
    assert only.error_message == "the archive has no samples"


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_survive(tmp_path, tar_format):
    path, name = tmp_path / "s.tar", "d" * 90 + "/" + "ü" * 80
    with tarfile.open(path, "w", format=tar_format) as archive:
        info = tarfile.TarInfo(name + ".jpg")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    assert [s.key for s in iter_samples(str(path))] == [name]


def test_memory_holds_one_sample_at_a_time(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{i:03}.jpg", b"x" * 500_000) for i in range(60)])
    import tracemalloc

    tracemalloc.start()
    count = sum(1 for _ in iter_samples(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 60
    assert peak < 4_000_000  # of 30 MB in the shard; the read buffer has 1 MiB


def test_a_name_that_is_not_utf8_is_a_name_all_the_same(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\u00e9.jpg", "caf\u00e9.s\u00e9.txt", "z.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    batches = iter_sample_batches([(str(path), "s")], SampleOptions())
    keys = [key for batch in batches for key in batch.column("key").to_pylist()]
    assert keys == ["caf\\xe9", "z"]


def member_of_size(name, size):
    """A header as GNU tar writes large sizes, in base 256, where a size may be negative."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("name", ["b.jpg", "b.txt"])
@pytest.mark.parametrize("size", [-1, -512, -1024])
def test_a_negative_size_is_damage_and_no_walk_in_circles(tmp_path, name, size):
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"x" * 512)]).read_bytes()[:1024]
    path = tmp_path / "s.tar"
    path.write_bytes(good + member_of_size(name, size) + bytes(1024))
    first, fault = iter_samples(str(path), lambda extension: extension == "jpg")
    assert (first.key, first.status) == ("a", Status.OK)
    assert (fault.key, fault.status) == (None, Status.SHARD_TRUNCATED)
    assert f"{size:,}" in fault.error_message


@pytest.mark.parametrize("size", [2**40, 2**62 - 1, 2**62, 2**63, 2**64, 2**80])
def test_a_size_beyond_the_end_is_damage_however_large(tmp_path, size):
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"x" * 512)]).read_bytes()[:1024]
    path = tmp_path / "s.tar"
    path.write_bytes(good + member_of_size("b.jpg", size) + bytes(1024))
    for wanted in ("jpg", "txt"):
        first, *_, fault = iter_samples(str(path), wanted.__eq__)
        assert (first.key, first.status) == ("a", Status.OK)
        assert (fault.key, fault.status) == (None, Status.SHARD_TRUNCATED)


@pytest.mark.parametrize(
    "headers", [{"size": "-512"}, {"size": str(2**70)}, {"GNU.sparse.map": "1,a"}]
)
def test_extension_headers_that_cannot_be_are_damage(tmp_path, headers):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
        info = tarfile.TarInfo("b.jpg")
        info.pax_headers = headers
        archive.addfile(info)
    first, fault = iter_samples(str(path))
    assert (first.key, first.status) == ("a", Status.OK)
    assert (fault.key, fault.status) == (None, Status.SHARD_TRUNCATED)
