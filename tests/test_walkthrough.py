"""docs/walkthrough.md: every command runs as printed, and prints what the page says but for the figures."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exlq.cli.commands import COMMANDS

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "walkthrough.md"
LEFT_OUT = "…"
FIGURE = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]\d+)?")
UNITS = re.compile(r"\b(?:s|min|h|B|KiB|MiB|GiB)\b")
BORDERS = re.compile(r"[─━┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇┳┻╋│┃╈]+")


def steps(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every command of the page's indented blocks with the lines printed below it."""
    command, printed = "", list[str]()
    for line in text.splitlines():
        inside = line.startswith("    ")
        if inside and not line.startswith("    $ "):
            printed.append(line[4:])
            continue
        if command and not inside and not line:
            continue
        if command:
            yield command, printed
        command, printed = (line[6:], []) if inside else ("", [])
    if command:
        yield command, printed


def shape(line: str) -> str:
    """A line without its figures, units and borders: what does not change from machine to machine."""
    plain = UNITS.sub("u", FIGURE.sub("0", BORDERS.sub(" ", line)))
    return " ".join(plain.split())


def agrees(printed: list[str], found: list[str]) -> bool:
    """Whether the lines found have the shapes of those printed, any number in place of `…`."""
    wanted, got = ([s for line in lines if (s := shape(line))] for lines in (printed, found))
    pattern = "".join(".*?" if line == LEFT_OUT else re.escape(line + "\n") for line in wanted)
    return re.fullmatch(pattern, "".join(line + "\n" for line in got), re.DOTALL) is not None


def test_the_page_is_read_as_commands_and_what_they_print() -> None:
    text = "Text.\n\n    $ one\n    a 1\n\n    b\n\nMore.\n\n    $ two\n    $ three\n    c"
    assert list(steps(text)) == [("one", ["a 1", "b"]), ("two", []), ("three", ["c"])]


@pytest.mark.parametrize(
    ("found", "same"),
    [
        (["│ KL 0.02 │", "size 3.1 MiB", "x", "end"], True),
        (["│ KL 0.5e-3 │", "size 300 KiB", "end"], True),
        (["│ KL 0.02 │", "size 3 MiB", "x"], False),
        (["│ perplexity 0.02 │", "size 3 MiB", "end"], False),
    ],
)
def test_figures_may_differ_and_words_may_not(found: list[str], same: bool) -> None:
    assert agrees(["│ KL 0.01  │", "size 12 KiB", "…", "end"], found) == same


def test_the_page_shows_the_main_commands() -> None:
    shown = {shlex.split(command)[1] for command, _ in steps(PAGE.read_text(encoding="utf-8"))}
    assert shown <= set(COMMANDS)
    assert {"plan", "doctor", "convert", "inspect", "explain", "solve", "report", "run"} <= shown


@pytest.mark.slow
def test_every_command_prints_what_the_page_says(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the page runs a GGUF file in llama.cpp")
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")
    settings = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for command, printed in steps(PAGE.read_text(encoding="utf-8")):
        arguments = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(arguments, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert agrees(printed, done.stdout.splitlines()), f"{command} printed\n{done.stdout}"
