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


@pytest.mark.usefixtures("spark", "detector_path")
def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for commands, shown in STEPS:
        printed = "".join(run(command, capsys) for command in commands.splitlines())
        expected = comparable(shown, "/home/me/spark_nsfw")
        assert comparable(printed, tmp_path) == expected, commands
    assert (tmp_path / "demo" / "report.html").read_text("utf-8").count('<img alt="sample') == 8
