"""A real S3 server on this machine, for tests of object stores."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any

import boto3
from faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Bucket", "S3Server"]


class S3Server:
    """moto's S3 in a thread of this process."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)

    def __enter__(self) -> Self:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def environment(self, url: str | None = None) -> dict[str, str]:
        """What pyarrow, boto and their like must find in the environment to come here.

        Args:
            url: a proxy that stands before this server.
        """
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Bucket:
    """A new bucket, seen through a proxy by pyarrow, and past it, without pyarrow, by a test.

    Attributes:
        name: of the bucket.
        url: such as ``s3://bucket-1``.
        proxy: what stands before the server.
    """

    def __init__(self, server: S3Server, proxy: FaultyProxy) -> None:
        self.name = f"bucket-{uuid.uuid4()}"
        self.url = f"s3://{self.name}"
        self.proxy = proxy
        settings = server.environment()
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=server.url,
            aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
            region_name=settings["AWS_DEFAULT_REGION"],
        )
        self._client.create_bucket(Bucket=self.name)

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self._client.delete_object(Bucket=self.name, Key=key)

    def names(self) -> list[str]:
        """The keys of all objects, sorted."""
        found = self._client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"] for entry in found]

    def files(self) -> dict[str, bytes]:
        """Key → content of all objects but the markers of directories."""
        return {
            key: self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
            for key in self.names()
            if not key.endswith("/")
        }
