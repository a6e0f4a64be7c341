"""Commands on S3 that are killed, and two at once: the rows stay the same. ``make test-stores``."""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from s3_fixtures import NEEDS_S3, score, upload
from stores import SECRET_KEY
from test_spark import collected

from examples.photographs import write_photograph_shards
from spark_nsfw.cli import main
from spark_nsfw.use.metadata import MetadataFiles

pytestmark = NEEDS_S3

KILLS = 20


@pytest.fixture(scope="session")
def spark(s3_spark):
    return s3_spark


@pytest.fixture(scope="session")
def configured(spark, s3a_settings, tmp_path_factory):
    """What a command of its own needs in the environment; the secrets are in a file."""
    directory = tmp_path_factory.mktemp("conf")
    jars = spark.sparkContext.getConf().get("spark.jars").replace("file://", "").split(",")
    settings = s3a_settings | {"spark.driver.extraClassPath": ":".join(jars)}
    del settings["spark.jars.packages"]  # each start would copy 700 MB
    lines = [f"{name} {value}" for name, value in settings.items()]
    (directory / "spark-defaults.conf").write_text("\n".join(lines) + "\n")
    return os.environ | {"SPARK_CONF_DIR": str(directory), "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    directory = tmp_path_factory.mktemp("many")
    write_photograph_shards(directory, num_shards=4 * KILLS + 16, samples_per_shard=1)
    return directory


def begin(command, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "spark_nsfw.cli", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def kill(process):
    """SIGKILL for the driver and all that it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


def test_drivers_killed_while_they_commit_cost_no_row(
    spark, client, gateway, bucket, many, detector_path, configured
):
    upload(client, bucket, many)
    place = f"s3a://{bucket}"
    whole = score(f"{place}/in", f"{place}/whole", detector_path, "--plan=fused")
    assert main(whole) == 0
    expected = collected(spark.read.parquet(f"{place}/whole"))
    command = score(f"{place}/in", f"{place}/out", detector_path, "--plan=fused",
                    "--shards-per-wave=4")  # fmt: skip
    gateway.fail(times=None, delay_seconds=0.02)  # commits take their time
    draw, killed, progress = random.Random(7), 0, []
    while killed < KILLS:
        before = len(gateway.requests)
        num_commits = draw.randrange(4)
        process = begin(command, configured)
        while process.poll() is None:
            requests = gateway.requests[before:]
            commits = [r for r in requests if r[0] == "POST" and "/out/shard%3D0" in r[1]
                       and "uploadId" in r[1]]  # fmt: skip
            uploads = [r for r in requests if "/out/shard%3D0" in r[1] and "partNumber" in r[1]]
            if uploads and len(commits) >= num_commits:
                kill(process)
                killed += 1
            time.sleep(0.005)
        if process.returncode == 0:
            break
        progress.append(len(MetadataFiles.at(f"{place}/out").done()))
    assert killed == KILLS
    assert progress == sorted(progress)
    assert 0 < progress[-1] <= 4 * KILLS  # a wave each at most
    gateway.mend()
    assert main(command) == 0
    assert collected(spark.read.parquet(f"{place}/out")) == expected


def test_killed_workers_leave_no_half_object(
    spark, client, gateway, bucket, many, detector_path, configured
):
    upload(client, bucket, many)
    place = f"s3a://{bucket}"
    assert main(score(f"{place}/in", f"{place}/whole", detector_path, "--plan=fused")) == 0
    expected = collected(spark.read.parquet(f"{place}/whole"))
    # Spark tries a task four times.
    tries = {"MASTER": "local[2,4]", "PYSPARK_SUBMIT_ARGS": "--master local[2,4] pyspark-shell"}
    command = score(f"{place}/in", f"{place}/out", detector_path, "--plan=fused",
                    "--shards-per-wave=24")  # fmt: skip
    gateway.fail(times=None, delay_seconds=0.02)  # there is time to hit a task that writes
    process, killed, before = begin(command, configured | tries), 0, len(gateway.requests)
    while process.poll() is None and killed < 8:
        writing = [r for r in gateway.requests[before:] if "/out/" in r[1] and "__magic" in r[1]
                   and r[0] == "PUT"]  # fmt: skip
        if len(writing) >= 6:
            before = len(gateway.requests)
            killed += kill_workers(process)
        time.sleep(0.005)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-2000:]
    assert killed >= 4
    assert collected(spark.read.parquet(f"{place}/out")) == expected
    objects = client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]
    files = [each["Key"] for each in objects if each["Key"].endswith(".parquet")]
    assert len(files) == len(client_shards(client, bucket)) + 1  # and the schema's
    assert not [each["Key"] for each in objects if "__magic" in each["Key"]]
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def client_shards(client, bucket):
    objects = client.list_objects_v2(Bucket=bucket, Prefix="in/")["Contents"]
    return [each["Key"] for each in objects if each["Key"].endswith(".tar")]


def kill_workers(process):
    """SIGKILL for the Python workers of a driver; how many there were."""
    killed = 0
    for each in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            is_python = [
                p.cmdline()[1:3] == ["-m", "pyspark.daemon"] for p in (each, each.parent())
            ]
            if all(is_python):  # forked by the daemon
                each.kill()
                killed += 1
    return killed


def test_two_commands_at_once_cost_no_row(
    spark, client, bucket, s3_shards, s3_rows, detector_path, configured
):
    upload(client, bucket, s3_shards)
    place = f"s3a://{bucket}"
    command = score(f"{place}/in", f"{place}/out", detector_path, "--shards-per-wave=2")
    runs = [begin(command, configured) for _ in range(2)]
    for run in runs:
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said[-2000:]
        assert SECRET_KEY not in said
    assert main(command) == 0
    assert collected(spark.read.parquet(f"{place}/out")) == s3_rows
