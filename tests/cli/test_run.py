"""`exlq run`: the answer alone on stdout, all else on stderr, or one event."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exlq.cli import main
from exlq.run.torch_engine import TorchEngine
from tests.run.conftest import llama_cpp, plain_gguf

__all__ = ["llama_cpp", "plain_gguf"]
GREEDY = ["-n", "12", "--temperature", "0"]


def test_stdout_holds_the_answer_alone(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_llama), "-p", "I have a dream", "--device", "cpu", *GREEDY]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(" of the ")
    assert shown.out.count("\n") == 1
    assert "of weights" in shown.err
    assert "prompt 6 tokens" in shown.err
    assert "generated 12 tokens" in shown.err
    assert main(["run", str(tiny_llama), "-p", "I have a dream", "--device", "cpu", "-q", *GREEDY]) == 0
    assert capsys.readouterr() == (shown.out, "")


def test_a_program_gets_one_event_with_everything(
    llama_cpp: None, plain_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["run", str(plain_gguf), "-p", "I have a dream", "--seed", "5", "-n", "8", "--status-json"]) == 0
    )
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["note", "result"]
    assert len(events[1]["text"]) > 8
    assert (events[1]["seed"], events[1]["prompt_tokens"], events[1]["generated_tokens"]) == (5, 6, 8)
    assert events[1]["generated_per_s"] > 0


def test_the_prompt_comes_from_stdin_too(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(tiny_llama), "--device", "cpu", *GREEDY]
    assert main([*arguments, "-p", "I have a dream"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("I have a dream\n"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == wanted


def test_an_interrupted_answer_is_shown_and_ends_with_130(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = TorchEngine.answer

    def interrupted(engine: TorchEngine, prompt: Any, sampling: Any, tell: Any) -> Any:
        def once(piece: str) -> None:
            tell(piece)
            raise KeyboardInterrupt

        return whole(engine, prompt, sampling, once)

    monkeypatch.setattr(TorchEngine, "answer", interrupted)
    assert main(["run", str(tiny_llama), "-p", "I have a dream", "--device", "cpu", *GREEDY]) == 130
    shown = capsys.readouterr()
    assert shown.out == " of\n"
    assert "interrupted" in shown.err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "a", "--mlock"], "--mlock: transformers cannot honour it"),
        (["-p", "a", "--temperature", "-1"], "--temperature -1.0: 0 to 100 is wanted"),
        (["-p", "a", "-n", "0"], "-n 0: at least 1 is wanted"),
        (["-p", "a", "--stop", ""], "--stop"),
        (["-p", "a", "--format", "gguf"], "--format gguf"),
        (["-p", "a", "--device", "nothing"], "--device nothing"),
    ],
)
def test_what_cannot_work_is_one_line_and_2(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], flags: list[str], why: str
) -> None:
    assert main(["run", str(tiny_llama), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert why in shown.err


def test_llama_cpp_starts_without_torch(llama_cpp: None, plain_gguf: Path) -> None:
    code = (
        "import sys; from exlq.cli import main; "
        f"main(['run', {str(plain_gguf)!r}, '-p', 'I have', '-n', '2', '-q']); "
        "print([name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
