"""`exlq report`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exlq.cli import main
from tests.conftest import REPOSITORY
from tests.report.page_helpers import make_job


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path / "job")
    assert main(["report", str(job)]) == 0
    assert capsys.readouterr().out == f"report: {job / 'report.html'}\n"
    assert main(["report", str(job), "-o", str(tmp_path / "page.html"), "--status-json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"event": "result", "report": str(tmp_path / "page.html"), "plots": []}


def test_plots_are_written_beside_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'exlq[report]'")
    job = make_job(tmp_path / "job", ("exl2",))
    assert main(["report", str(job), "--svg", str(tmp_path / "plots")]) == 0
    first, *plots = capsys.readouterr().out.splitlines()
    assert first == f"report: {job / 'report.html'}"
    assert f"plot: {tmp_path / 'plots' / 'exl2-frontier.svg'}" in plots


def test_no_job_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {tmp_path} has no summary.json")


def test_the_report_takes_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "pyarrow", "matplotlib")
    code = f"import sys, exlq.cli.report; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
