"""HDFS through its own HTTP service, for machines without Hadoop's native library."""

from __future__ import annotations

import getpass
import os
from typing import Any

from pyarrow import fs

from spark_nsfw.errors import InputError

__all__ = ["webhdfs"]

#: Of a name node's HTTP service.
_PORTS = {"webhdfs": 9870, "swebhdfs": 9871}


def webhdfs(scheme: str, authority: str, *, kerberos: bool) -> fs.FileSystem:
    """The filesystem of a name node.

    Args:
        scheme: ``webhdfs``, or ``swebhdfs`` for HTTPS.
        authority: its host, and its port unless that is Hadoop's default.
        kerberos: ask with the ticket that ``kinit`` got, not with a user's name.

    Raises:
        InputError: a package is missing.

    Source: Hadoop's documentation, "WebHDFS REST API".
    """
    try:
        from fsspec.implementations.webhdfs import WebHDFS
    except ImportError as exc:
        raise InputError(
            f"{scheme}://{authority} needs more packages: pip install 'spark-nsfw[hdfs]'"
        ) from exc
    host, _, port = authority.partition(":")
    user = None if kerberos else os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
    service = WebHDFS(
        host,
        int(port or _PORTS[scheme]),
        kerberos=kerberos,
        user=user,
        use_https=scheme == "swebhdfs",
    )
    return fs.PyFileSystem(_Handler(service))


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


def _file_info(path: str, status: dict[str, Any]) -> fs.FileInfo:
    """What WebHDFS says of a file or directory, as pyarrow says it."""
    is_file = status["type"] == "file"
    return fs.FileInfo(
        path,
        fs.FileType.File if is_file else fs.FileType.Directory,
        size=status["size"] if is_file else None,
        mtime=status["modificationTime"] / 1000,
    )
