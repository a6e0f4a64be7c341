"""Spark's settings of object stores, as pyarrow takes them.

A user tells Spark once where a store is and who asks (``spark.hadoop.fs.s3a.*``); whatever reads
files in Python goes by the same. What Spark was not told, pyarrow takes from the environment and
the machine's role, as Spark does.

Source: Hadoop's documentation, "Hadoop-AWS module: Integration with Amazon Web Services".
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

__all__ = ["AUTHENTICATION", "S3A_NAMES", "SECRETS", "USER", "HadoopSettings"]

#: What is taken over of ``fs.s3a.`` and of ``fs.s3a.bucket.NAME.``; no more, for it may be secret.
S3A_NAMES = (
    "access.key",
    "secret.key",
    "session.token",
    "aws.credentials.provider",
    "endpoint",
    "endpoint.region",
    "path.style.access",
    "connection.ssl.enabled",
)

#: What Hadoop may keep in a store of its own for secrets.
SECRETS = S3A_NAMES[:3]

AUTHENTICATION = "hadoop.security.authentication"

#: Who Spark is to HDFS: not one of Hadoop's names.
USER = "user.name"

#: Providers that take the keys from the settings, by the end of their names.
_FROM_SETTINGS = ("SimpleAWSCredentialsProvider", "TemporaryAWSCredentialsProvider")
_ANONYMOUS = ("AnonymousAWSCredentialsProvider", "AnonymousCredentialsProvider")

#: Amazon's own hosts; those that pyarrow finds by a region; and the region in a name.
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
_REGION = re.compile(r"\b[a-z]{2}(?:-[a-z]+)+-\d+\b")
_USUAL = re.compile(rf"s3(?:[.-]{_REGION.pattern})?\.amazonaws\.com(?:\.cn)?")

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class HadoopSettings:
    """Settings by Hadoop's names, without ``spark.hadoop.``. They may hold credentials.

    Attributes:
        values: never shown.
    """

    values: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def has_kerberos(self) -> bool:
        """Whether Hadoop's services want to know who asks."""
        return self.values.get(AUTHENTICATION, "simple") == "kerberos"

    @property
    def user(self) -> str:
        """Who asks services that believe in names."""
        return self.values.get(USER) or os.environ.get("HADOOP_USER_NAME") or getpass.getuser()

    def s3_arguments(self, bucket: str) -> dict[str, Any]:
        """Arguments of `pyarrow.fs.S3FileSystem` for a bucket; none where nothing is set."""

        def of(name: str) -> str:
            own = self.values.get(f"fs.s3a.bucket.{bucket}.{name}", "")
            return own or self.values.get(f"fs.s3a.{name}", "")

        arguments: dict[str, Any] = {}
        providers = [name for name in re.split(r"[\s,]+", of("aws.credentials.provider")) if name]
        access_key, secret_key = of("access.key"), of("secret.key")
        if providers and providers[0].endswith(_ANONYMOUS):
            arguments["anonymous"] = True
        elif access_key and secret_key and _take_keys(providers):
            arguments |= {"access_key": access_key, "secret_key": secret_key}
            if of("session.token"):
                arguments["session_token"] = of("session.token")
        region, endpoint = of("endpoint.region"), of("endpoint").rstrip("/")
        if endpoint and "://" not in endpoint:
            is_plain = of("connection.ssl.enabled") == "false"
            endpoint = f"{'http' if is_plain else 'https'}://{endpoint}"
        place = urlsplit(endpoint)
        host = place.hostname or ""
        if host.endswith(_AMAZON):
            named = _REGION.search(host)
            region = region or (named[0] if named else "")
        if host and not _USUAL.fullmatch(host):
            is_virtual = of("path.style.access") != "true" and not _is_address(host)
            arguments |= {
                "scheme": place.scheme,
                "endpoint_override": place.netloc,
                "force_virtual_addressing": is_virtual,
            }
            region = region or _DEFAULT_REGION
        if region:
            arguments["region"] = region
        return arguments


def _take_keys(providers: list[str]) -> bool:
    return not providers or any(name.endswith(_FROM_SETTINGS) for name in providers)


def _is_address(host: str) -> bool:
    """Whether a host has no names below it."""
    if host == "localhost":
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
