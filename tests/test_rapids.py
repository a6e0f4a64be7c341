"""What the RAPIDS plugin itself says of the job's plans and of conf/: ``make test-rapids``.

No GPU is needed: in explainOnly mode the plugin plans every query as for a GPU, says
operator by operator what would run there, and lets the CPU compute.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest
from rapids_session import CANNOT_BE_HAD, COLUMN_TYPES, PLUGIN, rapids_settings

pytestmark = [
    pytest.mark.rapids,
    pytest.mark.skipif(
        pyspark.__version__ < "4",
        reason="PyPI's pyspark 3.5 has Scala 2.12; the plugin for it, 25.04.0, does not even "
        "explain without a GPU driver",
    ),
]

ROOT = Path(__file__).parents[1]

#: ``*`` will run on the GPU, ``!`` cannot, ``@`` could but its surroundings forbid it.
OPERATOR = re.compile(r"^ *([*!@])(?:Exec)? ?<(\w+Exec)>", re.MULTILINE)

WRITE = [("*", "DataWritingCommandExec"), ("*", "WriteFilesExec"), ("*", "ProjectExec")]


def operators(text):
    """An explained plan → its operators with their marks, from the write down to the scan."""
    return OPERATOR.findall(text)


@pytest.fixture(scope="module")
def session(tmp_path_factory, detector_path):
    """The report of `rapids_session.py`, and the plugin's log of every query it planned."""
    directory = tmp_path_factory.mktemp("rapids")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rapids_session.py")), directory,
         detector_path],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable},
    )  # fmt: skip
    log = done.stderr + done.stdout
    if CANNOT_BE_HAD.search(log):
        pytest.skip(f"{PLUGIN} cannot be had from a Maven repository here")
    assert done.returncode == 0, log[-5000:]
    return json.loads((directory / "report.json").read_text()), log


def wave_of(log, plan):
    """What the plugin said of the query that writes a wave's rows: the one with our Python."""
    job = log.partition(f"job: {plan}\n")[2].partition("job: ")[0]
    queries = re.split(r"^.*GpuOverrides: *\n", job, flags=re.MULTILINE)
    (wave,) = [q for q in queries if "DataWritingCommandExec" in q and "PythonUDF" in q]
    return wave


def test_the_job_runs_with_the_plugin_and_its_python_daemon(session):
    report, log = session
    assert report["summaries"] == {"fused": [6, 6, 6], "dataframe": [6, 6, 6]}
    assert "RAPIDS Accelerator is in explain only mode" in log
    assert "Encountered an exception applying GPU overrides" not in log


def test_fused_plan_everything_from_the_python_exec_to_the_parquet_write_is_on_the_gpu(session):
    wave = wave_of(session[1], "fused")
    assert operators(wave) == [*WRITE, ("*", "MapInArrowExec"), ("*", "RangeExec")]
    assert "*Output <InsertIntoHadoopFsRelationCommand> will run on GPU" in wave
    assert "!Expression" not in wave


def test_dataframe_plan_everything_but_the_execs_that_carry_bytes_is_on_the_gpu(session):
    wave = wave_of(session[1], "dataframe")
    assert operators(wave) == [
        *WRITE, ("*", "ProjectExec"), ("!", "ArrowEvalPythonExec"), ("!", "MapInArrowExec"),
        ("*", "RangeExec"),
    ]  # fmt: skip
    for line in wave.splitlines():
        if line.lstrip().startswith(("!Exec <Arrow", "!Exec <Map")):
            assert "unsupported data types in output: BinaryType [image" in line


def test_nothing_else_that_the_job_asks_of_spark_is_kept_off(session):
    """Shuffle readers appear on re-planning only, over a shuffle that ran on the CPU here."""
    job = session[1].partition("job: fused\n")[2].partition("job: dataframe\n")[0]
    kept_off = {name for mark, name in operators(job) if mark != "*"}
    assert kept_off <= {"AQEShuffleReadExec"}


def test_explain_plan_says_the_same(session):
    explained = session[0]["explained"]
    numbers = ("*", "RangeExec")
    assert set(operators(explained["fused"])) == {("*", "MapInArrowExec"), numbers}
    assert set(operators(explained["dataframe"])) == {
        ("*", "ProjectExec"), ("!", "ArrowEvalPythonExec"), ("!", "MapInArrowExec"), numbers,
    }  # fmt: skip


@pytest.mark.parametrize("name", COLUMN_TYPES)
def test_the_documentation_says_which_columns_keep_the_python_exec_off_the_gpu(session, name):
    found = dict(map(reversed, operators(session[0]["explained"][f"column {name}"])))
    document = (ROOT / "docs" / "gpu-clusters.md").read_text()
    listed = re.search(r"Columns of type ([^.]*) keep", document)[1]
    assert (found["MapInArrowExec"] == "!") == (f"`{name}`" in listed)


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, key, _ in rapids_settings()])
def test_every_setting_in_conf_is_the_plugins_own_and_valid(session, file, key):
    report, _ = session
    assert key in report["known"], f"the plugin knows no setting {key}"
    assert "deprecated" not in report["known"][key].lower()
    assert report["refused"][f"{file} {key}"] is None


def test_a_typo_an_obsolete_setting_and_a_senseless_value_would_be_found(session):
    report, _ = session
    assert "spark.rapids.memory.gpu.allocFraktion" not in report["known"]
    assert "spark.rapids.memory.gpu.pooling.enabled" not in report["known"]
    assert "should be double" in report["nonsense"]
