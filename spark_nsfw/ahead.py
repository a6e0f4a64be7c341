"""Reading a remote file through, with blocks on their way before they are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

__all__ = ["PositionedFile", "read_ahead"]

#: What is handed on at a time.
_BUFFER_BYTES = 1 << 20


def read_ahead(
    read_at: Callable[[int, int], bytes], size: int, block_bytes: int, num_ahead: int
) -> BinaryIO:
    """A file whose next blocks are fetched while the last one is used.

    A store answers a request after tens of milliseconds and then sends one file at tens of
    megabytes a second; several requests at a time make up for both. Memory: one more block than
    are on their way.

    Args:
        read_at: given an offset and a length, gives so many bytes or raises; called by threads.
        size: of the file, in bytes.
        block_bytes: of a request.
        num_ahead: requests on their way at a time.
    """
    return io.BufferedReader(_AheadFile(read_at, size, block_bytes, num_ahead), _BUFFER_BYTES)


class PositionedFile(io.RawIOBase):
    """A readable file with a position, which seeking alone does not read from.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As `io.IOBase.seek`; past the end, too."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position


class _AheadFile(PositionedFile):
    """As `read_ahead`, without a buffer."""

    def __init__(
        self, read_at: Callable[[int, int], bytes], size: int, block_bytes: int, num_ahead: int
    ) -> None:
        super().__init__(size)
        self._read_at = read_at
        self._block_bytes = block_bytes
        self._num_ahead = num_ahead
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(num_ahead, thread_name_prefix="read-ahead")

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._position, self._block_bytes)
        if self._position >= self._size or not len(buffer):
            return 0
        self._ask_for(number)
        content = memoryview(self._blocks[number].result())[start : start + len(buffer)]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _ask_for(self, number: int) -> None:
        """Have a block and those after it fetched, and forget all others."""
        num_blocks = -(-self._size // self._block_bytes)
        wanted = range(number, min(number + 1 + self._num_ahead, num_blocks))
        for other in self._blocks.keys() - wanted:
            self._blocks.pop(other).cancel()
        for each in wanted:
            if each not in self._blocks:
                offset = each * self._block_bytes
                length = min(self._block_bytes, self._size - offset)
                self._blocks[each] = self._pool.submit(self._read_at, offset, length)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._blocks.clear()
        super().close()
