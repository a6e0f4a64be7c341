"""Files whose next blocks are fetched before they are asked for."""

import random
import threading

import pytest

from spark_nsfw.ahead import read_ahead

CONTENT = random.Random(5).randbytes(1000)


class Store:
    """Gives blocks of `CONTENT`, and remembers where they began."""

    def __init__(self):
        self.asked = []
        self.arrived = threading.Semaphore(0)

    def read_at(self, offset, length):
        self.asked.append(offset)
        self.arrived.release()
        return CONTENT[offset : offset + length]


def test_what_comes_next_is_asked_for_and_nothing_twice():
    store = Store()
    with read_ahead(store.read_at, len(CONTENT), 100, 4) as file:
        assert file.raw.readinto(bytearray(1)) == 1
        for _ in range(5):
            assert store.arrived.acquire(timeout=10)
        assert sorted(store.asked) == [0, 100, 200, 300, 400]
        assert file.read() == CONTENT[1:]
    assert sorted(store.asked) == list(range(0, 1000, 100))


def test_any_place_gives_the_files_own_bytes():
    draw = random.Random(6)
    with read_ahead(Store().read_at, len(CONTENT), 64, 3) as file:
        for _ in range(200):
            offset, length = draw.randrange(1100), draw.randrange(300)
            file.seek(offset)
            assert file.read(length) == CONTENT[offset : offset + length]


def test_an_error_comes_where_the_block_is_needed():
    def read_at(offset, length):
        if offset >= 200:
            raise OSError("no more")
        return CONTENT[offset : offset + length]

    file = read_ahead(read_at, len(CONTENT), 100, 4)
    buffer = bytearray(100)
    assert [file.raw.readinto(buffer) for _ in range(2)] == [100, 100]
    with pytest.raises(OSError, match="no more"):
        file.raw.readinto(buffer)
