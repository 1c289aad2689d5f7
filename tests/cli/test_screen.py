"""What a person and what a program is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from exlq.cli import main
from exlq.cli.screen import JsonScreen, Terminal


def shown(capsys: pytest.CaptureFixture[str], **flags: bool) -> tuple[str, str]:
    """stdout and stderr of a run of ten steps with a plan and a result."""
    with Terminal(**flags) as screen:
        screen.tell("a plan")
        for done in range(1, 11):
            screen("measuring", done, 10)
        screen.show("a result", {})
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_results_go_to_stdout_and_progress_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(capsys)
    assert out == "a plan\na result\n"
    assert err.splitlines()[0].startswith("measuring 1/10")
    assert err.splitlines()[-1] == "measuring 10/10"
    assert len(err.splitlines()) < 10


def test_quiet_shows_the_result_alone_and_verbose_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, quiet=True) == ("a result\n", "")
    assert len(shown(capsys, verbose=True)[1].splitlines()) == 10


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    _, err = shown(capsys)
    for part in ("measuring", "in all", "10/10", "\x1b["):
        assert part in err


def test_a_program_reads_one_object_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with JsonScreen() as screen:
        screen.expect({"measuring": 4.0})
        screen("measuring", 1, 2)
        screen.tell("a note")
        screen.show("a result", {"bpw": 4.0})
        screen.fail("a\nfault", 2)
    captured = capsys.readouterr()
    events: list[dict[str, Any]] = [json.loads(line) for line in captured.out.splitlines()]
    assert [event["event"] for event in events] == ["plan", "progress", "note", "result", "error"]
    assert (events[1]["stage"], events[1]["done"], events[1]["total"]) == ("measuring", 1, 2)
    assert events[1]["left_s"] >= 0
    assert events[3]["bpw"] == 4.0
    assert (events[4]["message"], events[4]["exit_code"]) == ("a fault", 2)
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["convrt"], "there is no command convrt; did you mean convert?"),
        (["convert", "-i", "a", "-o", "b", "--bist", "4"], "--bist is not known here; did you mean --bits?"),
        (
            ["convert", "-i", "a", "-o", "b", "--file", "4"],
            "--file is not known here; did you mean --file-size?",
        ),
        (["convert", "-i", "a"], "required: -o/--out_dir"),
        (["convert", "-i", "a", "-o", "b", "-b", "four"], "'four' is no number of bits"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_to_do(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert "--help" in lines[0]


def test_a_failure_on_a_terminal_has_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as screen:
        screen.fail("model[bold].bin\nis gone", 1)
    assert capsys.readouterr().err == "error: model[bold].bin is gone\n"
