"""What starts before the first image is scored: the command, the JVM, Spark's Python daemon."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from spark_nsfw.errors import InputError
from spark_nsfw.spark import early, jvm, session

SPY = """
import os, pathlib
from spark_nsfw import PixelClassifier, Transform

class Spy(PixelClassifier):
    def __init__(self, model_path=None):
        super().__init__("spy", Transform(16), (0, 0, 0), (1, 1, 1))

    def load_model(self, device):
        parent = pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        told = {"parent": parent.decode().split(chr(0)), "threads": os.environ["OMP_NUM_THREADS"]}
        told["directory"] = os.getcwd()
        pathlib.Path(os.environ["TOLD"], str(os.getpid())).write_text(repr(told))
        return lambda pixels: pixels.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Where a detector in `tmp_path` tells of the worker that it is in."""
    (tmp_path / "spies.py").write_text(SPY)
    (tmp_path / "told").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def command(*arguments):
    return [sys.executable, "-m", "spark_nsfw.cli", *map(str, arguments)]


def score(shards, output, *more):
    given = ["score", shards, output, "--detector=spies:Spy", "--columns=", "--plan=fused", *more]
    return subprocess.run(command(*given), capture_output=True, text=True)


def all_end(told):
    """Wait until no process is left of the commands that this test has run."""
    until = time.monotonic() + 30
    while left := [each for each in psutil.process_iter() if mark_of(each) == str(told)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.2)


def mark_of(process):
    if process.pid == os.getpid():
        return None
    try:
        return process.environ().get("TOLD")
    except psutil.Error:
        return None


def workers(told):
    return [eval(path.read_text()) for path in told.iterdir()]


def test_workers_come_from_the_daemon_that_was_started_early(shards, tmp_path, told):
    ended = score(shards, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert workers(told)
    for worker in workers(told):
        assert "--early" in worker["parent"]
        assert worker["threads"] == "1"
        assert worker["directory"] == str(tmp_path)
    all_end(told)
    assert "samples in" in ended.stdout  # all of it was written before the process ended
    for path in told.iterdir():
        path.unlink()
    # Where there is an output, there may be nothing to do: Spark's own daemon is early enough.
    assert score(shards, tmp_path / "out", "--overwrite", "--yes").returncode == 0
    assert all("--early" in worker["parent"] for worker in workers(told))
    one = next((tmp_path / "out").glob("shard=0*"))
    for path in [*one.iterdir(), *told.iterdir()]:
        path.unlink()
    assert score(shards, tmp_path / "out").returncode == 0
    assert workers(told)
    assert all("spark_nsfw.spark.daemon" in worker["parent"] for worker in workers(told))
    assert not any("--early" in worker["parent"] for worker in workers(told))


def test_a_command_that_fails_leaves_no_daemon(shards, tmp_path, told):
    ended = score(shards, tmp_path / "out", "--detector=laion=missing.zip", "--no-pretrained")
    assert ended.returncode in (1, 2)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("WARNING: Using")]
    assert len(said) == 1
    assert "missing.zip" in said[0]
    all_end(told)


def test_without_an_early_daemon_there_is_nobody_to_hand_over_to(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARK_NSFW_EARLY_DAEMON", raising=False)
    assert not early.hand_over()
    monkeypatch.setenv("SPARK_NSFW_EARLY_DAEMON", str(tmp_path / "gone"))
    assert not early.hand_over()
    assert "SPARK_NSFW_EARLY_DAEMON" not in os.environ  # workers need not know of it


def test_what_is_handed_over(monkeypatch, tmp_path):
    """Pipes, environment, path and directory; it returns when the other side has ended."""
    path = tmp_path / "daemon"
    script = (
        "import os, sys; from spark_nsfw.spark.early import hand_over; "
        "print(hand_over(), file=sys.stderr)"
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"SPARK_NSFW_EARLY_DAEMON": str(path), "MARK": "x"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        there, _ = listening.accept()
    _, pipes, _, _ = socket.recv_fds(there, 1, 3)
    with there.makefile("rb") as stream:
        about = json.load(stream)
    assert about["environment"]["MARK"] == "x"
    assert about["directory"] == os.getcwd()
    os.write(pipes[1], b"from here")
    process.stdin.write("to there")
    process.stdin.flush()
    assert os.read(pipes[0], 100) == b"to there"
    there.sendall(b"y")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    for pipe in pipes:
        os.close(pipe)
    there.close()
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("from here", "True\n")


@pytest.mark.parametrize(("python", "taken"), [("another", False), (sys.executable, True)])
def test_nobody_takes_over_for_another_python(tmp_path, python, taken):
    """Such as one that Spark's settings name."""
    path = tmp_path / "socket" / "daemon"
    path.parent.mkdir()
    script = (
        "import sys; from spark_nsfw.spark.early import take_over; "
        "sys.exit(10 + take_over(sys.argv[1], lambda: None))"
    )
    first = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE)
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    script = (
        f"import sys; sys.executable = {python!r}; "
        "from spark_nsfw.spark.early import hand_over; sys.exit(20 + hand_over())"
    )
    environment = os.environ | {"SPARK_NSFW_EARLY_DAEMON": str(path)}
    second = subprocess.run([sys.executable, "-c", script], env=environment, timeout=30)
    assert first.wait(30) == 10 + taken
    assert second.returncode == 20 + taken  # if not, it goes on by itself
    assert not path.parent.exists()


def test_an_early_daemon_without_a_socket_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("os.setpgid", lambda *_: None)
    path = tmp_path / ("long" * 30) / "daemon"  # longer than a socket's path may be
    path.parent.mkdir()
    assert not early.take_over(str(path), lambda: pytest.fail("it need not prepare"))
    assert not path.parent.exists()


def test_an_early_daemon_deletes_nothing_but_its_socket(monkeypatch, tmp_path):
    monkeypatch.setattr("os.setpgid", lambda *_: None)
    (tmp_path / "mine").write_text("mine")
    assert not early.take_over(str(tmp_path / "mine"), lambda: pytest.fail("no socket"))
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(ZeroDivisionError):
        early.take_over(str(tmp_path / "daemon"), lambda: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_session_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr("pyspark.sql.SparkSession.getActiveSession", lambda: None)
    monkeypatch.setattr("pyspark.SparkContext._active_spark_context", None)
    monkeypatch.setattr(session, "_started", None)
    for name in ("PYSPARK_GATEWAY_PORT", "SPARK_REMOTE", "MASTER", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(InputError, match="Java 17 or 21"):
        session.start_session()
    monkeypatch.setenv("JAVA_HOME", "/somewhere")
    monkeypatch.setattr(session, "launch_gateway", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.start_session()()


def test_later_calls_give_the_same_session_in_any_thread():
    script = """
from concurrent.futures import ThreadPoolExecutor
from spark_nsfw.spark.session import active_or_local_session
sessions = [active_or_local_session(), active_or_local_session()]
with ThreadPoolExecutor() as pool:
    sessions.append(pool.submit(active_or_local_session).result())
print(len({session.sparkContext.applicationId for session in sessions}))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("1\n", 0), ended.stderr


def test_threads_that_ask_at_once_get_one_session():
    script = """
from concurrent.futures import ThreadPoolExecutor
from spark_nsfw.spark.session import active_or_local_session, start_session
waiting = start_session()
with ThreadPoolExecutor(3) as pool:
    asked = [pool.submit(active_or_local_session) for _ in range(3)]
    sessions = [waiting(), *(each.result() for each in asked)]
print(len({session.sparkContext.applicationId for session in sessions}))
sessions[0].stop()
print(active_or_local_session().range(3).count())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("1\n3\n", 0), ended.stderr


@pytest.mark.parametrize("where", ["SPARK_SUBMIT_OPTS", "JAVA_TOOL_OPTIONS", "spark-defaults.conf"])
def test_a_collector_of_ones_own_is_the_only_one(monkeypatch, tmp_path, where):
    """Java refuses to be given two."""
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    assert "-XX:+UseSerialGC" in jvm.local_jvm_options()
    if where == "spark-defaults.conf":
        (tmp_path / where).write_text("spark.driver.extraJavaOptions -XX:+UseG1GC\n")
    else:
        monkeypatch.setenv(where, "-XX:+UseG1GC")
    assert "-XX:+UseSerialGC" not in jvm.local_jvm_options()


def test_a_job_that_fails_keeps_no_classes(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    monkeypatch.setattr(jvm, "_JOB", "raise SystemExit(3)")
    with pytest.raises(InputError, match="Java 17"):
        jvm.keep_classes()
    assert list(tmp_path.iterdir()) == []


def java_session(cache, options=""):
    """What a local session says of its JVM, and all that it prints."""
    script = """
from spark_nsfw.spark.session import active_or_local_session
spark = active_or_local_session()
beans = spark._jvm.java.lang.management.ManagementFactory.getRuntimeMXBean()
print(list(beans.getInputArguments()))
print(spark.range(3).count())
"""
    environment = os.environ | {"SPARK_NSFW_CACHE": str(cache), "SPARK_SUBMIT_OPTS": options}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "3"
    return eval(ended.stdout.splitlines()[-2]), ended.stdout + ended.stderr


def test_classes_are_kept_once_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    assert not any("SharedArchive" in option for option in jvm.local_jvm_options())
    archive = jvm.keep_classes()
    assert archive.parent == tmp_path
    assert archive.stat().st_size > 20 << 20
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
    written = archive.stat().st_mtime_ns
    assert jvm.keep_classes() == archive
    assert archive.stat().st_mtime_ns == written
    options, _ = java_session(tmp_path)
    assert f"-XX:SharedArchiveFile={archive}" in options
    log = tmp_path / "classes"
    java_session(tmp_path, f"-Xlog:class+load:file={log}")
    lines = [line for line in log.read_text().splitlines() if "org.apache.spark" in line]
    kept = sum("shared objects file" in line for line in lines)
    assert kept > len(lines) / 2


def test_an_archive_that_java_cannot_use_is_left_alone_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path))
    jvm.class_archive().write_bytes(b"damaged")
    _, printed = java_session(tmp_path)
    told = [line for line in printed.splitlines() if not line.startswith("WARNING: Using incub")]
    assert len(told) == 2, printed


def test_another_java_or_spark_has_classes_of_its_own(tmp_path, monkeypatch):
    java, jars = tmp_path / "bin" / "java", tmp_path / "spark" / "jars"
    jars.mkdir(parents=True)
    java.parent.mkdir()
    java.write_text("1")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("SPARK_HOME", str(tmp_path / "spark"))
    names = {jvm.class_archive().name}
    (jars / "a.jar").write_text("1")
    names.add(jvm.class_archive().name)
    (jars / "a.jar").write_text("22")
    names.add(jvm.class_archive().name)
    java.write_text("22")
    names.add(jvm.class_archive().name)
    assert len(names) == 4


def test_ones_own_java_options_come_last(tmp_path):
    options, _ = java_session(tmp_path, "-XX:TieredStopAtLevel=3")
    levels = [option for option in options if "TieredStopAtLevel" in option]
    assert levels == ["-XX:TieredStopAtLevel=1", "-XX:TieredStopAtLevel=3"]
