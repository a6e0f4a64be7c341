"""Which Python scripts/setup.sh takes, on a PATH of stand-ins."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_python(directory, interpreters, **environment):
    """What the script does where these are on the PATH: name → version, None cannot run."""
    for name, version in interpreters.items():
        script = directory / name
        script.write_text("#!/bin/sh\n" + (f"echo {version}\n" if version else "exit 127\n"))
        script.chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "find_python.sh")],
        env={"PATH": str(directory)} | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("interpreters", "chosen"),
    [
        ({"python3": "3.13", "python3.12": "3.12"}, "python3"),  # Debian 13
        ({"python3": "3.10", "python3.13": "3.13"}, "python3"),
        ({"python3": "3.9", "python3.11": "3.11", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.14", "python3.14": "3.14", "python3.10": "3.10"}, "python3.10"),
        ({"python3": "3.8", "python3.13": None, "python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.14"}, "python3"),
        ({"python3": "3.9", "python3.14": "3.14"}, "python3.14"),
        ({"python3.12": "3.12"}, "python3.12"),
    ],
)
def test_a_fitting_python_is_found(tmp_path, interpreters, chosen):
    done = find_python(tmp_path, interpreters)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


def test_a_named_python_is_taken_or_refused(tmp_path):
    there = {"python3": "3.12", "python3.14": "3.14", "python3.9": "3.9"}
    assert find_python(tmp_path, there, PYTHON="python3.14").stdout == "python3.14\n"
    old = find_python(tmp_path, there, PYTHON="python3.9")
    assert (old.returncode, old.stdout) == (1, "")
    assert "PYTHON=python3.9 is Python 3.9, and Python 3.10 to 3.14 is needed" in old.stderr
    missing = find_python(tmp_path, there, PYTHON="/nowhere/python")
    assert missing.returncode == 1
    assert "no Python that runs" in missing.stderr


@pytest.mark.parametrize(
    ("interpreters", "said"), [({"python3": "3.9"}, "has only Python 3.9"), ({}, "has none")]
)
def test_without_one_the_remedy_is_named(tmp_path, interpreters, said):
    done = find_python(tmp_path, interpreters)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "PYTHON=/path/to/python3.12" in done.stderr


def test_setup_stops_without_a_python_and_installs_nothing(tmp_path):
    for command in ("dirname", "sh"):
        (tmp_path / command).symlink_to(f"/bin/{command}")
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "setup.sh"), str(tmp_path / "venv")],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Python 3.10 to 3.13 is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_versions_of_python_are_the_same_everywhere():
    tested = re.search(r'tested="(.*)"', (ROOT / "scripts" / "find_python.sh").read_text())[1]
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert declared == tested.split()[::-1]
    assert f"Python {declared[0]} to {declared[-1]}" in (ROOT / "README.md").read_text()
    assert os.access(ROOT / "scripts" / "find_python.sh", os.X_OK)
