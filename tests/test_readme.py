"""What the README shows of the command line is what it prints. (Its Python runs in `test_api.py`.)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attndsl.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
# Code between fences, in which a command stands after `$`, and commands in a line of text.
SHOWN = re.findall(r"^```\n\$ attndsl (.*)\n((?:.*\n)*?)```", TEXT, re.MULTILINE)
NAMED = re.findall(r"`attndsl (\w+ [^`]+)`", TEXT)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0, done.output
    return done.output


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").split("\n")]


def test_there_are_some() -> None:
    assert len(SHOWN) >= 2 and NAMED


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command.split()[0] for command, _ in SHOWN])
def test_what_is_shown_is_printed(command: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed, wanted = lines(run(command, monkeypatch)), lines(shown)
    assert any(printed[i : i + len(wanted)] == wanted for i in range(len(printed))), "\n".join(printed)


@pytest.mark.parametrize("command", NAMED)
def test_a_command_that_is_named_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is compiled here, under the interpreter: test_inspection.py asks for assembly.
    command = command.removesuffix(" --assembly ptx")
    run(command.replace("FILE", "examples/patterns/streaming.attn"), monkeypatch)


def test_the_rows_that_explain_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"^```\nrows\n((?:.*\n)*?)```", TEXT, re.MULTILINE)
    printed = run("explain examples/patterns/streaming.attn --n 4096", monkeypatch)
    assert all(line.strip() in printed for line in lines(shown)), printed
