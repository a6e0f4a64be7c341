"""The whole program on object stores, against real servers: ``make test-stores``."""

import io
import json
import re
import time

import pyarrow.parquet as pq
import pytest
from s3_fixtures import NEEDS_S3, score, upload, with_cloud
from stores import ACCESS_KEY, SECRET_KEY
from test_spark import collected

from spark_nsfw.cli import main
from spark_nsfw.note import inspect_output
from spark_nsfw.use.metadata import MetadataFiles

pytestmark = NEEDS_S3


@pytest.fixture(scope="session")
def spark(s3_spark):
    return s3_spark


def keys(client, bucket):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))


@pytest.mark.parametrize("scheme", ["s3a", "s3"])
def test_every_command_works_on_s3(
    spark, client, gateway, bucket, s3_shards, s3_rows, detector_path, tmp_path, capsys, scheme
):
    upload(client, bucket, s3_shards)
    place = f"{scheme}://{bucket}"
    assert main(score(f"{place}/in", f"{place}/out", detector_path)) == 0
    told = capsys.readouterr()
    assert collected(spark.read.parquet(f"s3a://{bucket}/out")) == s3_rows
    found = keys(client, bucket)
    # Nothing is left of a committer's work; with the magic one files appear where they belong.
    left = [key for key in found if "__magic" in key or "_temporary" in key]
    assert not [key for key in left if not key.endswith("/")]  # this server keeps empty folders
    copies = [r for r in gateway.requests if "x-amz-copy-source" in r[2]]
    assert bool(copies) != with_cloud()
    before = len(gateway.requests)
    assert main(score(f"{place}/in", f"{place}/out", detector_path)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert keys(client, bucket) == found
    assert len(gateway.requests) - before < 100

    page = tmp_path / "report.html"
    before = len(gateway.ranges("/in/"))
    assert main(["report", f"{place}/out", "-o", str(page), "--shards", f"{place}/in"]) == 0
    num_shown = page.read_text("utf-8").count('<img alt="sample')
    assert num_shown > 0
    asked = gateway.ranges("/in/")[before:]
    images = spark.read.parquet(f"s3a://{bucket}/out").select("image_offset", "image_num_bytes")
    ranges = {f"bytes={at - 512}-{at + size - 1}" for at, size in images.collect()}
    assert len(asked) == num_shown
    assert {*asked} <= ranges
    assert main(["inspect", f"{place}/out", "--json"]) == 0
    export = ["export", f"{place}/out", f"{place}/clean", "--shards", f"{place}/in"]
    assert main([*export, "--where", "nsfw_score >= 0"]) == 0
    assert "24 of 24 samples" in capsys.readouterr().out
    detector = f"--detector=laion={detector_path}"
    assert main(["classify", f"{place}/out", f"{place}/again", detector]) == 0
    again = spark.read.parquet(f"s3a://{bucket}/again").select("nsfw_score").collect()
    assert len(again) == 24

    notes = json.dumps(list(inspect_output(f"{place}/out")))
    summary = client.get_object(Bucket=bucket, Key="out/_spark_nsfw/summary.json")["Body"].read()
    for text in (told.out, told.err, notes, summary.decode(), page.read_text("utf-8")):
        assert SECRET_KEY not in text
        assert ACCESS_KEY not in text
    files = MetadataFiles.at(f"{place}/out").files()
    assert len(files) == 4
    for shard in files:
        (key,) = [k for k in found if f"shard={shard}/" in k and k[-1] != "/"]
        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert SECRET_KEY.encode() not in body
        assert pq.read_table(io.BytesIO(body)).num_rows == 6


def lines_of(text):
    """What a command says on stderr, without its lines of progress."""
    return [line for line in text.splitlines() if line.startswith("spark-nsfw: ")]


SHARD = r"/in/00001\.tar"

#: Faults that pass, by name: what fails, and how.
PASSING = {
    "SlowDown everywhere": {"first": 5, "times": 4, "status": 503},
    "500 on uploads": {"method": "PUT", "path": r"/out/shard", "times": 3, "status": 500},
    "500 on completion": {"method": "POST", "path": "uploadId", "times": 2, "status": 500},
    "a stall while reading": {"method": "GET", "path": SHARD, "times": 1, "delay_seconds": 5},
    "slow listings": {"method": "GET", "path": "list-type", "times": None, "delay_seconds": 1},
    "403 for a moment": {"method": "GET", "path": SHARD, "times": 1, "status": 403},
    "a cut answer to a listing": {
        "method": "GET",
        "path": "list-type",
        "times": 1,
        "cut_after": 99,
    },
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_costs_no_row(
    spark, client, gateway, bucket, s3_shards, s3_rows, detector_path, name
):
    upload(client, bucket, s3_shards)
    fault = gateway.fail(**PASSING[name])
    assert main(score(f"s3a://{bucket}/in", f"s3a://{bucket}/out", detector_path)) == 0
    assert fault.num_failed > 0
    assert collected(spark.read.parquet(f"s3a://{bucket}/out")) == s3_rows


@pytest.mark.parametrize("tenth", range(10))
def test_a_connection_cut_in_a_shard_costs_no_row(
    spark, client, gateway, bucket, s3_shards, s3_rows, detector_path, tenth
):
    upload(client, bucket, s3_shards)
    size = (s3_shards / "00001.tar").stat().st_size
    fault = gateway.fail("GET", SHARD, times=1, cut_after=size * tenth // 10)
    assert main(score(f"s3a://{bucket}/in", f"s3a://{bucket}/out", detector_path)) == 0
    assert fault.num_failed == 1
    assert collected(spark.read.parquet(f"s3a://{bucket}/out")) == s3_rows


#: Faults that last, and what is said of them.
LASTING = {
    "an expired token": ({"method": "GET", "path": SHARD, "status": 403}, "00001.tar"),
    "a store that is down": ({"path": "/in/", "status": 503}, "cannot be read now"),
    "refused uploads": ({"method": "(PUT|POST)", "path": "/out/shard", "status": 403}, "out"),
    "uploads that never complete": (
        {"method": "POST", "path": "/out/shard%3D0.*uploadId", "status": 500},
        "un again to resume",
    ),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_told_in_a_line_and_mended_by_running_again(
    spark, client, gateway, bucket, s3_shards, s3_rows, detector_path, capsys, name
):
    upload(client, bucket, s3_shards)
    fault, said = LASTING[name]
    gateway.fail(**fault, times=None)
    command = score(f"s3a://{bucket}/in", f"s3a://{bucket}/out", detector_path)
    assert main(command) == 1
    (line,) = lines_of(capsys.readouterr().err)
    assert said in line
    assert SECRET_KEY not in line
    gateway.mend()
    done = MetadataFiles.at(f"s3a://{bucket}/out").done()
    for shard in done:
        (key,) = [k for k in keys(client, bucket) if f"shard={shard}/" in k]
        content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert pq.read_table(io.BytesIO(content)).num_rows == 6
    if name != "an expired token":
        assert not done
    assert main(command) == 0
    assert collected(spark.read.parquet(f"s3a://{bucket}/out")) == s3_rows


#: Places that cannot work, and what is said of them.
REFUSED = {
    "no such bucket": ("s3a://there-is-none/in", {}, r"there-is-none"),
    "nothing there": ("s3a://{bucket}/nothing", {}, r"nothing.*no"),
    "may not list": ("s3a://{bucket}/in", {"path": "list-type"}, r"(?i)access.denied|403"),
    "may not write": ("s3a://{bucket}/in", {"method": "PUT", "path": "/out/"}, r"(?i)denied|403"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_told_soon(
    spark, client, gateway, bucket, s3_shards, detector_path, capsys, name
):
    upload(client, bucket, s3_shards)
    place, fault, said = REFUSED[name]
    if fault:
        gateway.fail(**fault, times=None, status=403)
    began = time.monotonic()
    command = score(place.format(bucket=bucket), f"s3a://{bucket}/out", detector_path)
    assert main(command) in (1, 2)
    assert time.monotonic() - began < 30
    (line,) = lines_of(capsys.readouterr().err)
    assert re.search(said, line), line


def test_a_mistyped_endpoint_is_told_soon(spark, client, bucket, s3_shards, detector_path, capsys):
    spark.conf.set("fs.s3a.bucket.mistyped.endpoint", "http://127.0.0.1:9")
    began = time.monotonic()
    try:
        status = main(score("s3a://mistyped/in", "s3a://mistyped/out", detector_path))
    finally:
        spark.conf.unset("fs.s3a.bucket.mistyped.endpoint")
    assert status == 1
    assert time.monotonic() - began < 30
    (line,) = lines_of(capsys.readouterr().err)
    assert "mistyped" in line
    assert "127.0.0.1:9" in line
