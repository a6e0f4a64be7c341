"""HDFS through its own HTTP service, for machines without Hadoop's native library.

fsspec speaks the protocol. What it takes lightly is made strict here: a name node that does not
answer is an error and no missing file, a data node's error is no content, and nobody is waited
for without end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from spark_nsfw.errors import InputError

__all__ = ["webhdfs"]

#: Of a name node's HTTP service.
_PORTS = {"webhdfs": 9870, "swebhdfs": 9871}

#: Seconds for a connection, and for each piece of an answer.
_TIMEOUTS = 10, 60


def webhdfs(scheme: str, authority: str, *, user: str, kerberos: bool) -> fs.FileSystem:
    """The filesystem of a name node.

    Args:
        scheme: ``webhdfs``, or ``swebhdfs`` for HTTPS.
        authority: its host, and its port unless that is Hadoop's default.
        user: who asks.
        kerberos: ask with the ticket that ``kinit`` got, not with the user's name.

    Raises:
        InputError: a package is missing.

    Source: Hadoop's documentation, "WebHDFS REST API".
    """
    try:
        service_class = _service_class()
    except ImportError as exc:
        raise InputError(
            f"{scheme}://{authority} needs more packages: pip install 'spark-nsfw[hdfs]'"
        ) from exc
    host, _, port = authority.partition(":")
    service = service_class(
        host,
        int(port or _PORTS[scheme]),
        kerberos=kerberos,
        user=None if kerberos else user,
        use_https=scheme == "swebhdfs",
    )
    return fs.PyFileSystem(_Handler(service))


@cache
def _service_class() -> Any:
    from fsspec.implementations.webhdfs import WebHDFS
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):  # type: ignore[misc, unused-ignore]
        def send(self, request: Any, *, timeout: Any = None, **kwargs: Any) -> Any:
            answer = super().send(request, timeout=timeout or _TIMEOUTS, **kwargs)
            if "namenoderpcaddress=" in request.url:  # a data node's answer, which nobody checks
                answer.raise_for_status()
            return answer

    class Service(WebHDFS):  # type: ignore[misc]
        def _connect(self) -> None:
            super()._connect()
            for scheme in ("http://", "https://"):
                self.session.mount(scheme, Adapter())

        def _call(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._call(*args, **kwargs)
            except (RuntimeError, ValueError) as exc:  # such as that of one in safe mode
                raise OSError(f"the name node says: {exc}") from exc

        def mv(self, path1: str, path2: str, **_: Any) -> None:
            answer = self._call("RENAME", method="put", path=path1, destination=path2)
            if not answer.json().get("boolean"):
                raise OSError(f"the name node does not rename {path1} to {path2}")

    return Service


class _Handler(fs.FSSpecHandler):  # type: ignore[misc]
    """As pyarrow's, with times, and errors instead of nothing where nobody answers."""

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        try:
            return _file_info(path, self.fs.info(path))
        except FileNotFoundError:
            return fs.FileInfo(path, fs.FileType.NotFound)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found: list[fs.FileInfo] = []
        directories = [selector.base_dir]
        while directories:
            here = directories.pop()
            try:
                entries = self.fs.ls(here, detail=True)
            except FileNotFoundError:
                if here == selector.base_dir and not selector.allow_not_found:
                    raise
                continue  # gone meanwhile
            for entry in entries:
                if not entry["pathSuffix"]:
                    raise NotADirectoryError(f"{here} is a file")
                info = _file_info(f"{here.rstrip('/')}/{entry['pathSuffix']}", entry)
                found.append(info)
                if selector.recursive and info.type is fs.FileType.Directory:
                    directories.append(info.path)
        return found

    def open_input_file(self, path: str) -> pa.PythonFile:
        from fsspec.caching import BaseCache

        if self.fs.info(path)["type"] != "file":
            raise IsADirectoryError(f"{path} is a directory")
        file = self.fs.open(path, mode="rb")
        file.cache = BaseCache(file.blocksize, file._fetch_range, file.size)  # we have our own
        return pa.PythonFile(file, mode="r")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def delete_file(self, path: str) -> None:
        if self.fs.info(path)["type"] != "file":
            raise IsADirectoryError(f"{path} is a directory")
        self.fs.rm_file(path)


def _file_info(path: str, status: dict[str, Any]) -> fs.FileInfo:
    """What WebHDFS says of a file or directory, as pyarrow says it."""
    is_file = status["type"] == "file"
    return fs.FileInfo(
        path,
        fs.FileType.File if is_file else fs.FileType.Directory,
        size=status["size"] if is_file else None,
        mtime=status["modificationTime"] / 1000,
    )
