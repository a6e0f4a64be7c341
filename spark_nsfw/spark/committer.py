"""How a store takes files: which of Hadoop's committers writes an output.

The object stores' own committers come with Spark's cloud module. Without it, and on HDFS
and local disks, Hadoop's file committer moves each task's files as the task ends
(algorithm 2), so that a kill costs only the tasks under way.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError

__all__ = ["Committer", "committer_of"]

_log = logging.getLogger(__name__)

_CLOUD = "org.apache.spark.internal.io.cloud"
_PROTOCOL = "spark.sql.sources.commitProtocolClass"
_FACTORY = "mapreduce.outputcommitter.factory.scheme"

#: What the two cloud committers need of Spark's SQL settings.
_CLOUD_SETTINGS = {
    _PROTOCOL: f"{_CLOUD}.PathOutputCommitProtocol",
    "spark.sql.parquet.output.committer.class": f"{_CLOUD}.BindingParquetOutputCommitter",
}

_S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"

#: Of every write, whatever the store: no file of a unit is cut in two; `_temporary` of other
#: runs is left alone; and no file says that all is done, since nobody reads it.
_ALWAYS = {
    "maxRecordsPerFile": "0",
    "mapreduce.fileoutputcommitter.cleanup.skipped": "true",
    "mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
}

#: On a local disk. Hadoop's checksum files double the number of files, and without its native
#: library each one costs two more processes (``chmod``). The price: damage on a local disk is
#: not noticed by reading, unless a reader checks Parquet's own checksums.
_NO_CHECKSUM_FILES = {
    "fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
    "fs.file.impl.disable.cache": "true",
}

_MANIFEST_FACTORIES = {
    "gs": "org.apache.hadoop.mapreduce.lib.output.committer.manifest.ManifestCommitterFactory",
    "abfs": "org.apache.hadoop.fs.azurebfs.commit.AzureManifestCommitterFactory",
    "abfss": "org.apache.hadoop.fs.azurebfs.commit.AzureManifestCommitterFactory",
}


@dataclass(frozen=True)
class Committer:
    """How one output is written.

    Attributes:
        name: for people.
        settings: of the session, for the length of a write.
        options: of the write.
    """

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


def committer_of(spark: SparkSession, output: str) -> Committer:
    """The committer for an output's store, and what it needs to be told.

    Args:
        spark: classic; through Spark Connect nothing is known of the server, whose own
            settings are taken with algorithm 2.
        output: a path or URL.

    Raises:
        InputError: the session sets a committer that deletes what it did not write.
    """
    scheme = output.partition(":")[0] if ":" in output.partition("/")[0] else "file"
    jvm: Any = getattr(spark, "_jvm", None) if hasattr(spark, "_jsparkSession") else None
    hadoop: Any = jvm and spark._jsparkSession.sessionState().newHadoopConf()
    # On EMR s3:// may be EMRFS, which has a committer of its own and publishes as tasks end.
    is_emrfs = scheme == "s3" and jvm is not None and hadoop.get("fs.s3.impl") not in (None, _S3A)
    is_s3a = scheme in ("s3a", "s3") and not is_emrfs
    if (
        jvm is not None
        and is_s3a
        and hadoop.get("fs.s3a.committer.staging.conflict-mode") == "replace"
        and hadoop.get("fs.s3a.committer.name") in ("directory", "partitioned")
    ):
        raise InputError(
            "fs.s3a.committer.staging.conflict-mode is 'replace', which can delete the whole "
            "output: set it to 'append', or leave fs.s3a.committer.name to spark-nsfw"
        )
    has_cloud = jvm is not None and _has_class(jvm, _CLOUD_SETTINGS[_PROTOCOL])
    if is_s3a and has_cloud:
        return Committer(
            "S3A's magic committer",
            _CLOUD_SETTINGS,
            _ALWAYS
            | {
                "fs.s3a.committer.magic.enabled": "true",
                "fs.s3a.committer.name": "magic",
                f"{_FACTORY}.{scheme}": "org.apache.hadoop.fs.s3a.commit.S3ACommitterFactory",
                # Another run's uploads into the same output are none of ours.
                "fs.s3a.committer.abort.pending.uploads": "false",
            },
        )
    # Hadoop has them from 3.3.5 on, which Spark 3.5 is older than.
    if scheme in _MANIFEST_FACTORIES and has_cloud and _has_class(jvm, _MANIFEST_FACTORIES[scheme]):
        return Committer(
            "the manifest committer",
            _CLOUD_SETTINGS,
            _ALWAYS | {f"{_FACTORY}.{scheme}": _MANIFEST_FACTORIES[scheme]},
        )
    if jvm is not None and (is_s3a or scheme in _MANIFEST_FACTORIES):
        _log.warning(
            "spark-hadoop-cloud is not on the class path: Spark will copy every file to commit "
            "it to %s; add spark-hadoop-cloud to spark.jars.packages",
            output,
        )
    settings = {}
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        # Databricks' own protocol shows files that are not committed to all other readers.
        settings[_PROTOCOL] = (
            "org.apache.spark.sql.execution.datasources.SQLHadoopMapReduceCommitProtocol"
        )
    return Committer(
        "Hadoop's file committer, algorithm 2",
        settings,
        _ALWAYS
        | {"mapreduce.fileoutputcommitter.algorithm.version": "2"}
        | (_NO_CHECKSUM_FILES if scheme == "file" else {}),
    )


def _has_class(jvm: Any, name: str) -> bool:
    from py4j.protocol import Py4JJavaError

    loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
    try:
        jvm.java.lang.Class.forName(name, False, loader)
    except Py4JJavaError:
        return False
    return True
