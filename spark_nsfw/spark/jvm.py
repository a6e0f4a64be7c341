"""How the JVM of a local session runs: quiet, quick to start, and small.

Half of a Spark start goes into loading 15,000 classes out of jars. Java can keep them in an
archive that later JVMs map into memory (class data sharing, JEP 350):

    python -m spark_nsfw.spark.jvm
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyspark

from spark_nsfw.errors import InputError
from spark_nsfw.score.download import cache_dir

__all__ = ["class_archive", "keep_classes", "local_jvm_options"]

_LOG_SETTINGS = Path(__file__).with_name("log4j2.properties")

#: Images are decoded and scored by Python: what the JVM gains by compiling longer, and by
#: collecting garbage on several threads, it takes from the cores that Python needs.
_COMPILER, _COLLECTOR = "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"

#: Hadoop starts several children for every file that it writes; on Linux alone may they share its
#: memory until they are another program.
_CHILDREN = "-Djdk.lang.Process.launchMechanism=VFORK"

#: A job like ours, so that its classes are those that a run needs.
_JOB = """
import sys
from pyspark.sql import SparkSession
from spark_nsfw.spark.session import active_or_local_session
spark = active_or_local_session()
def same(batches):
    yield from batches
rows = spark.range(2).selectExpr("'a' as shard", "cast(id as string) as key", "array(1f) as e")
rows = rows.mapInArrow(same, rows.schema)
rows.write.mode("append").partitionBy("shard").parquet(sys.argv[1])
found = spark.read.parquet(sys.argv[1])
found.groupBy("shard").agg({"key": "count"}).collect()
found.createOrReplaceTempView("found")
spark.sql("select percentile_approx(e[0], 0.5) from found where key = '1'").toPandas()
spark.stop()
jvm = spark.sparkContext._gateway.proc
jvm.stdin.close()
sys.exit(jvm.wait())  # it writes the archive as it ends
"""


def local_jvm_options() -> list[str]:
    """Options of the JVM that a local session starts."""
    options = [f"-Dlog4j2.configurationFile={_LOG_SETTINGS.as_uri()}", _COMPILER]
    if not re.search(r"-XX:\+Use\w+GC\b", _given_options()):  # Java refuses to be given two
        options.append(_COLLECTOR)
    if sys.platform == "linux":
        options.append(_CHILDREN)
    archive = class_archive()
    if archive.exists():
        # An archive that this JVM cannot use is left alone, without a word.
        options += [f"-XX:SharedArchiveFile={archive}", "-Xshare:auto", "-Xlog:cds=off"]
        options += ["-Xlog:cds+dynamic=off", "-Xlog:class+path=off"]
    return options


def _given_options() -> str:
    """Options of Java that others have chosen, in their own forms."""
    names = ("SPARK_SUBMIT_OPTS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
    given = [os.environ.get(name, "") for name in names]
    directory = os.environ.get("SPARK_CONF_DIR") or f"{_spark_home()}/conf"
    defaults = Path(directory, "spark-defaults.conf")
    return " ".join([*given, defaults.read_text() if defaults.is_file() else ""])


def _spark_home() -> Path:
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)


def class_archive() -> Path:
    """Where the classes of this Java and this Spark are kept, whether or not they are."""
    java = Path(shutil.which("java", path=_java_path()) or "java").resolve()
    jars = _spark_home() / "jars"
    known_by = [str(path) for path in (java, jars)]
    for file in [java, *sorted(jars.glob("*.jar"))]:
        if file.exists():
            stat = file.stat()
            known_by.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    name = hashlib.sha256("\n".join(known_by).encode()).hexdigest()[:16]
    return cache_dir() / f"spark-{pyspark.__version__}-{name}.jsa"


def _java_path() -> str:
    home = os.environ.get("JAVA_HOME")
    return f"{home}/bin" if home else os.environ.get("PATH", "")


def keep_classes() -> Path:
    """Run a small job and keep the classes that it loaded; nothing if they are there.

    Returns:
        The archive, some 176 MB.

    Raises:
        InputError: Java is older than 17, or the job failed.
    """
    archive = class_archive()
    if archive.exists():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as directory:
        made = Path(directory) / archive.name
        given = os.environ.get("SPARK_SUBMIT_OPTS", "")
        options = f"-XX:ArchiveClassesAtExit={made} -Xlog:cds=off -Xlog:cds+dynamic=off {given}"
        ended = subprocess.run(
            [sys.executable, "-c", _JOB, f"{directory}/rows"],
            env=os.environ | {"SPARK_SUBMIT_OPTS": options},
            check=False,
        )
        if ended.returncode != 0 or not made.exists():
            raise InputError(
                "Spark's classes were not kept, which only costs time: the job that loads them "
                "failed. It needs Java 17 or later"
            )
        made.replace(archive)
    return archive


if __name__ == "__main__":
    try:
        print(keep_classes())
    except InputError as exc:
        sys.exit(str(exc))
