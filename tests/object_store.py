"""A real S3 server on this machine, for tests of object stores."""

import logging
import uuid

import pytest


class ObjectStore:
    """A bucket of its own, seen without pyarrow."""

    def __init__(self, client):
        self.client = client
        self.bucket = f"bucket-{uuid.uuid4()}"
        client.create_bucket(Bucket=self.bucket)

    def put(self, key, content):
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def names(self):
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [entry["Key"] for entry in found]

    def files(self):
        """Key → content of all but the markers of directories."""
        return {
            key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            for key in self.names()
            if not key.endswith("/")
        }


@pytest.fixture(scope="module")
def s3_endpoint():
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    boto3 = pytest.importorskip("boto3")
    settings = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return ObjectStore(boto3.client("s3", endpoint_url=s3_endpoint))
