"""A Standalone cluster on this machine: the package and the weights travel as documented."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pyspark
import pytest
from rapids_session import CANNOT_BE_HAD, PLUGIN, settings
from test_cli import staged  # noqa: F401  # a fixture

from spark_nsfw.score.download import file_sha256

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
SPARK = Path(pyspark.__file__).parent / "bin"
LOOPBACK = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}


def environment(**changes):
    """This one's, without what would bring the package to the workers by another way."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYSPARK_")}
    return {name: v for name, v in kept.items() if name != "PYTHONPATH"} | LOOPBACK | changes


def started(arguments, log, pattern, env):
    """A daemon of the cluster, once its log has said what ``pattern`` looks for."""
    with open(log, "w") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=env)
    for _ in range(600):
        found = re.search(pattern, log.read_text())
        if found:
            return process, found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """The URL of a master that has one worker of two cores, which says it has a GPU."""
    directory = tmp_path_factory.mktemp("cluster")
    gpus = directory / "gpus.sh"
    gpus.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0"]}'\n""")
    gpus.chmod(0o755)
    resource = "-Dspark.worker.resource.gpu"
    java, daemons = str(SPARK / "spark-class"), []
    env = environment(
        SPARK_WORKER_DIR=str(directory / "work"),
        SPARK_WORKER_OPTS=f"{resource}.amount=1 {resource}.discoveryScript={gpus}",
    )
    at_loopback = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
    try:
        process, url = started(
            [java, "org.apache.spark.deploy.master.Master", *at_loopback],
            directory / "master.log", r"Starting Spark master at (spark://[\d.]+:[1-9]\d*)", env,
        )  # fmt: skip
        daemons.append(process)
        process, _ = started(
            [java, "org.apache.spark.deploy.worker.Worker", *at_loopback,
             "--cores", "2", "--memory", "2g", url],
            directory / "worker.log", r"(Successfully registered with master)", env,
        )  # fmt: skip
        daemons.append(process)
        yield url
    finally:
        for process in reversed(daemons):
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package's wheel, as ``python -m build`` makes it."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", directory, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


def packed_environment(directory, wheel):
    """A relocatable environment with the package, as venv-pack or conda-pack make them.

    For all else it looks into the environment that runs the tests: torch alone has gigabytes.
    """
    venv.create(directory / "env", symlinks=True)
    packages = directory / "env" / "lib" / f"python{sysconfig.get_python_version()}"
    zipfile.ZipFile(wheel).extractall(packages / "site-packages")
    rest = packages / "site-packages" / "rest.pth"
    rest.write_text(sysconfig.get_path("purelib"))
    with tarfile.open(directory / "env.tar.gz", "w:gz") as archive:
        archive.add(directory / "env", arcname=".")
    return directory / "env.tar.gz"


def submit(master, directory, options, shards, staged, **changes):  # noqa: F811
    """Run the job on the cluster; returns what it printed."""
    done = subprocess.run(
        [str(SPARK / "spark-submit"), "--master", master, *options,
         "--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.ui.enabled=false",
         str(Path(__file__).with_name("cluster_job.py")),
         str(shards / "0000[0-2].tar"), str(directory / "out"), "--plan=fused", "--device=cpu",
         "--model=test_vit2", "--embedding-size=768", "--models", str(staged)],
        capture_output=True, text=True, check=False, cwd=directory,
        env=environment(**changes),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def check(directory, printed, master, staged):  # noqa: F811
    assert f"master: {master}" in printed
    assert "33 samples in 3 shards: 33 scored, 0 failed" in printed
    assert file_sha256(staged / "test_vit2.safetensors") in printed
    assert pq.read_table(directory / "out", columns=["nsfw_score"]).num_rows == 33


def packages(printed, who):
    return re.findall(rf"{who}'s package: (.*)", printed)


def test_a_wheel_as_py_files(master, wheel, shards, staged, tmp_path):  # noqa: F811
    """Under the name of a zip, which it is: Spark leaves a .whl off the Python path."""
    package = shutil.copyfile(wheel, tmp_path / "package.zip")
    printed = submit(master, tmp_path, ["--py-files", str(package)], shards, staged)
    check(tmp_path, printed, master, staged)
    assert len(packages(printed, "driver") + packages(printed, "worker")) == 3
    for path in packages(printed, "driver") + packages(printed, "worker"):
        assert "/package.zip/spark_nsfw/" in path


def test_a_packed_environment_as_archive(master, wheel, shards, staged, tmp_path):  # noqa: F811
    archive = packed_environment(tmp_path, wheel)
    printed = submit(
        master, tmp_path, ["--archives", f"{archive}#environment"], shards, staged,
        PYSPARK_PYTHON="./environment/bin/python", PYSPARK_DRIVER_PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    check(tmp_path, printed, master, staged)
    assert len(packages(printed, "worker")) == 2
    for path in packages(printed, "worker"):
        assert "/environment/lib/" in path


@pytest.mark.rapids
@pytest.mark.skipif(pyspark.__version__ < "4", reason="the plugin is of Scala 2.13")
def test_conf_starts_the_plugins_daemon(master, wheel, shards, staged, tmp_path):  # noqa: F811
    """conf/ as it stands, but for the sizes of this machine, and that the plugin only explains."""
    package = shutil.copyfile(wheel, tmp_path / "package.zip")
    smaller = {
        "spark.executor.cores": "2", "spark.task.cpus": "2", "spark.executor.memory": "1g",
        "spark.rapids.sql.mode": "explainOnly", "spark.sql.session.timeZone": "UTC",
    }  # fmt: skip
    options = [part for item in smaller.items() for part in ("--conf", "=".join(item))]
    conf, script = ROOT / "conf" / "spark-defaults.conf", ROOT / "conf" / "get_gpus_resources.sh"
    options += ["--properties-file", str(conf), "--files", str(script)]
    try:
        printed = submit(
            master, tmp_path, [*options, "--py-files", str(package)], shards, staged,
        )  # fmt: skip
    except AssertionError as exc:
        if CANNOT_BE_HAD.search(str(exc)):
            pytest.skip(f"{PLUGIN} cannot be had from a Maven repository here")
        raise
    check(tmp_path, printed, master, staged)
    assert re.findall("worker's daemon: (.*)", printed) == ["rapids.daemon"] * 2


def test_kubernetes_is_asked_for_the_gpus_of_conf(spark):
    """By Spark's own code, which wants a vendor there."""
    jvm = spark._jvm
    conf = jvm.org.apache.spark.SparkConf(False)
    for name, value in settings(ROOT / "conf" / "spark-defaults.conf").items():
        conf.set(name, value)
    asked = jvm.org.apache.spark.deploy.k8s.KubernetesUtils.buildResourcesQuantities(
        "spark.executor", conf
    )
    assert asked.apply("nvidia.com/gpu").getAmount() == "1"
    assert conf.get("spark.executorEnv.CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
