"""Spark's settings of object stores, as pyarrow gets them."""

import pytest

from spark_nsfw import storage
from spark_nsfw.errors import InputError
from spark_nsfw.hadoop import HadoopSettings
from spark_nsfw.spark.stores import adopt_stores, on_workers
from spark_nsfw.storage import settings, use_settings

#: Hadoop's own default.
DEFAULT_PROVIDERS = """
    org.apache.hadoop.fs.s3a.TemporaryAWSCredentialsProvider,
    org.apache.hadoop.fs.s3a.SimpleAWSCredentialsProvider,
    software.amazon.awssdk.auth.credentials.EnvironmentVariableCredentialsProvider,
    org.apache.hadoop.fs.s3a.auth.IAMInstanceCredentialsProvider
"""
KEYS = {"access.key": "A", "secret.key": "S"}
KEPT = "kept apart"
GIVEN = {"access_key": "A", "secret_key": "S"}


@pytest.fixture(autouse=True)
def as_before():
    before = settings()
    yield
    use_settings(before)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({}, {}),
        (KEYS, GIVEN),
        ({"access.key": "A"}, {}),
        (KEYS | {"aws.credentials.provider": DEFAULT_PROVIDERS}, GIVEN),
        (KEYS | {"session.token": "T"}, GIVEN | {"session_token": "T"}),
        (KEYS | {"aws.credentials.provider": "x.ProfileCredentialsProvider"}, {}),
        (
            KEYS | {"aws.credentials.provider": "org.x.AnonymousAWSCredentialsProvider"},
            {"anonymous": True},
        ),
        ({"endpoint.region": "eu-west-1"}, {"region": "eu-west-1"}),
        ({"endpoint": "s3.eu-central-1.amazonaws.com"}, {"region": "eu-central-1"}),
        ({"endpoint": "https://s3-us-west-2.amazonaws.com"}, {"region": "us-west-2"}),
        ({"endpoint": "s3.amazonaws.com"}, {}),
        (
            {"endpoint": "s3.dualstack.us-west-2.amazonaws.com", "path.style.access": "true"},
            {
                "scheme": "https",
                "endpoint_override": "s3.dualstack.us-west-2.amazonaws.com",
                "force_virtual_addressing": False,
                "region": "us-west-2",
            },
        ),
        (
            {"endpoint": "https://bucket.vpce-1a.s3.eu-west-1.vpce.amazonaws.com"},
            {
                "scheme": "https",
                "endpoint_override": "bucket.vpce-1a.s3.eu-west-1.vpce.amazonaws.com",
                "force_virtual_addressing": True,
                "region": "eu-west-1",
            },
        ),
        (
            {"endpoint": "http://127.0.0.1:7070/", "path.style.access": "false"},
            {
                "scheme": "http",
                "endpoint_override": "127.0.0.1:7070",
                "force_virtual_addressing": False,
                "region": "us-east-1",
            },
        ),
        (
            {"endpoint": "minio.example:9000", "path.style.access": "true"},
            {
                "scheme": "https",
                "endpoint_override": "minio.example:9000",
                "force_virtual_addressing": False,
                "region": "us-east-1",
            },
        ),
        (
            {"endpoint": "oss.example", "connection.ssl.enabled": "false", "endpoint.region": "x"},
            {
                "scheme": "http",
                "endpoint_override": "oss.example",
                "force_virtual_addressing": True,
                "region": "x",
            },
        ),
        (
            {"endpoint": "a.example", "bucket.photos.endpoint": "localhost:1"},
            {
                "scheme": "https",
                "endpoint_override": "localhost:1",
                "force_virtual_addressing": False,
                "region": "us-east-1",
            },
        ),
        ({"bucket.other.access.key": "A", "bucket.other.secret.key": "S"}, {}),
    ],
    ids=str,
)
def test_what_s3a_is_told_is_what_pyarrow_is_told(given, arguments):
    values = {f"fs.s3a.{name}": value for name, value in given.items()}
    assert HadoopSettings(values).s3_arguments("photos") == arguments


def test_settings_do_not_show_what_they_hold():
    text = repr(HadoopSettings({"fs.s3a.secret.key": "hush"}))
    assert "hush" not in text
    assert "fs.s3a" not in text


def test_a_session_s_settings_reach_its_workers_and_replace_older_ones(spark):
    def tell(batches):
        import pyarrow as pa

        for _ in batches:
            key = settings().values.get("fs.s3a.access.key")
            yield pa.RecordBatch.from_arrays([pa.array([key])], ["key"])

    for key in ("first", "second"):
        spark.conf.set("fs.s3a.access.key", key)
        try:
            adopt_stores(spark)
        finally:
            spark.conf.unset("fs.s3a.access.key")
        rows = spark.range(1).mapInArrow(on_workers(tell), "key string").collect()
        assert [row["key"] for row in rows] == [key]


def test_a_filesystem_is_made_anew_only_for_other_settings():
    adopted = {"fs.s3a.endpoint": "http://127.0.0.1:1", "fs.s3a.access.key": "A",
               "fs.s3a.secret.key": "S"}  # fmt: skip
    use_settings(HadoopSettings(adopted))
    first = storage.resolve("s3a://photos/a")[0]
    use_settings(HadoopSettings(dict(adopted)))
    assert storage.resolve("s3a://photos/b")[0] is first
    use_settings(HadoopSettings(adopted | {"fs.s3a.session.token": "T"}))
    assert storage.resolve("s3a://photos/b")[0] is not first


def test_a_secret_store_of_hadoop_is_asked(spark, tmp_path):
    place = f"jceks://file{tmp_path}/keys.jceks"
    jvm = spark._jvm
    configuration = jvm.org.apache.hadoop.conf.Configuration()
    configuration.set("hadoop.security.credential.provider.path", place)
    (provider,) = jvm.org.apache.hadoop.security.alias.CredentialProviderFactory.getProviders(
        configuration
    )
    secret = spark.sparkContext._gateway.new_array(jvm.char, len(KEPT))
    for position, letter in enumerate(KEPT):
        secret[position] = letter
    provider.createCredentialEntry("fs.s3a.secret.key", secret)
    provider.flush()
    spark.conf.set("hadoop.security.credential.provider.path", place)
    try:
        adopt_stores(spark)
    finally:
        spark.conf.unset("hadoop.security.credential.provider.path")
    assert settings().values["fs.s3a.secret.key"] == KEPT


def test_only_what_is_needed_is_taken_over(spark):
    given = {
        "fs.s3a.bucket.photos.access.key": "A",
        "fs.s3a.bucket.my.photos.endpoint.region": "x-y-1",
        "fs.s3a.encryption.key": "not ours",
        "hadoop.security.group.mapping.ldap.bind.password": "not ours",
    }
    for name, value in given.items():
        spark.conf.set(name, value)
    try:
        adopt_stores(spark)
    finally:
        for name in given:
            spark.conf.unset(name)
    assert settings().values["fs.s3a.bucket.photos.access.key"] == "A"
    assert settings().values["fs.s3a.bucket.my.photos.endpoint.region"] == "x-y-1"
    assert "not ours" not in settings().values.values()


def test_a_secret_store_that_cannot_be_read_is_told(spark, tmp_path):
    (tmp_path / "keys.jceks").write_text("not a key store")
    spark.conf.set("fs.s3a.security.credential.provider.path", f"jceks://file{tmp_path}/keys.jceks")
    try:
        with pytest.raises(InputError, match=r"keys\.jceks: Hadoop cannot read"):
            adopt_stores(spark)
    finally:
        spark.conf.unset("fs.s3a.security.credential.provider.path")


def test_a_task_keeps_its_name_in_sparks_plans():
    def read(batches):
        yield from batches

    assert on_workers(read).__name__ == "read"
