"""S3 as tests have it: a real server behind a proxy, buckets, and a session that is told of it.

`conftest` makes the fixtures known; a module of tests takes ``s3_spark`` for its ``spark``.
"""

import os
import re
import sys
import uuid
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from stores import ACCESS_KEY, SECRET_KEY, program, versitygw

from examples.photographs import write_photograph_shards

#: Marks of a module of tests.
NEEDS_S3 = [
    pytest.mark.stores,
    pytest.mark.skipif(program("bin/versitygw") is None, reason="no versitygw: no Go here?"),
]

#: Hadoop's version in each Spark.
HADOOP = {"3.5": "3.3.4", "4.0": "3.4.1", "4.1": "3.4.2"}

#: Where its spark-hadoop-cloud, or what that needs, is not to be had.
WITHOUT_CLOUD = {"4.0"}


def with_cloud():
    """Whether there is a magic committer; ``SPARK_HADOOP_CLOUD=no`` goes without."""
    from pyspark import __version__ as version

    return os.environ.get("SPARK_HADOOP_CLOUD") != "no" and version[:3] not in WITHOUT_CLOUD


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    """A real S3 server behind a proxy."""
    directory = tmp_path_factory.mktemp("s3")
    with versitygw(directory / "buckets", directory / "log") as url, FaultyProxy(url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3a_settings(gateway):
    from pyspark import __version__ as version

    scala = "2.12" if version < "4" else "2.13"
    packages = [f"org.apache.hadoop:hadoop-aws:{HADOOP[version[:3]]}"]
    if with_cloud():
        packages.append(f"org.apache.spark:spark-hadoop-cloud_{scala}:{version}")
    return {
        "spark.jars.packages": ",".join(packages),
        "spark.hadoop.fs.s3a.endpoint": gateway.url,
        "spark.hadoop.fs.s3a.endpoint.region": "us-east-1",
        "spark.hadoop.fs.s3a.path.style.access": "true",
        "spark.hadoop.fs.s3a.access.key": ACCESS_KEY,
        "spark.hadoop.fs.s3a.secret.key": SECRET_KEY,
        "spark.hadoop.fs.s3a.attempts.maximum": "5",
        "spark.hadoop.fs.s3a.retry.interval": "50ms",
    }


@pytest.fixture(scope="session")
def s3_spark(s3a_settings, weights_cache):
    """A session whose settings alone say where S3 is."""
    from pyspark.sql import SparkSession

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # nobody is asked who is not there
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_NSFW_CACHE"] = str(weights_cache)
    builder = SparkSession.builder.master("local[2]").appName("tests")
    more = {
        "spark.ui.enabled": "false",
        "spark.python.daemon.module": "spark_nsfw.spark.daemon",
        "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "2",
    }
    for name, value in (s3a_settings | more).items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def client(gateway):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=gateway._target and f"http://{gateway._target}",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )


@pytest.fixture
def bucket(client, gateway, request):
    """A new bucket; the proxy works again after each test."""
    test = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))
    name = f"{test[:40].strip('-')}-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=name)
    gateway.requests.clear()
    yield name
    gateway.mend()


@pytest.fixture(scope="session")
def s3_shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("in")
    write_photograph_shards(directory, num_shards=4, samples_per_shard=6)
    return directory


@pytest.fixture(scope="session")
def s3_rows(s3_spark, s3_shards, detector_path, tmp_path_factory):
    """The rows of the same shards on a local disk."""
    from test_spark import collected

    from spark_nsfw.cli import main

    output = tmp_path_factory.mktemp("local") / "out"
    assert main(score(s3_shards, output, detector_path)) == 0
    return collected(s3_spark.read.parquet(str(output)))


def score(source, output, detector, *more):
    return ["score", str(source), str(output), "--model=test_vit", "--embedding-size=768",
            "--no-pretrained", f"--detector=laion={detector}", *more]  # fmt: skip


def upload(client, bucket, directory, prefix="in"):
    for path in sorted(Path(directory).rglob("*.tar")):
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(directory)}")
