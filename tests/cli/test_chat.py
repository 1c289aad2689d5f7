"""`exlq chat`: what is said is kept, commands change it, nothing but /exit and the end of stdin ends it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exlq.cli import main
from exlq.run.torch_engine import TorchEngine
from tests.run.conftest import llama_cpp, plain_gguf

__all__ = ["llama_cpp", "plain_gguf"]
Chat = Callable[..., int]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations the model was given."""
    prompts: list[Any] = []
    whole = TorchEngine.answer

    def listened(engine: TorchEngine, prompt: Any, *others: Any) -> Any:
        prompts.append([message["content"] for message in prompt])
        return whole(engine, prompt, *others)

    monkeypatch.setattr(TorchEngine, "answer", listened)
    return prompts


@pytest.fixture
def chat(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    def run(said: str, *flags: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        return main(["chat", str(tiny_llama), "--device", "cpu", "-n", "6", "--temperature", "0", *flags])

    return run


def test_a_chat_keeps_what_was_said(chat: Chat, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("hello\n\nand you?\n", "--system", "be kind", "--status-json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, second = (event["text"] for event in events if event["event"] == "result")
    assert asked == [["be kind", "hello"], ["be kind", "hello", first, "and you?"]]
    assert second


def test_commands_change_the_conversation(
    chat: Chat, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("one\n/reset\ntwo\n/system be brief\nthree\n/help\n/exit\nfour\n", "--system", "be kind") == 0
    assert asked == [["be kind", "one"], ["be kind", "two"], ["be brief", "three"]]
    shown = capsys.readouterr()
    assert "/reset " in shown.err
    assert "/reset" not in shown.out


def test_a_conversation_that_is_too_long_says_so_and_goes_on(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(f"{'word ' * 400}\nhello\n") == 0
    shown = capsys.readouterr()
    assert "error: " in shown.err
    assert "/reset in a chat" in shown.err
    assert shown.err.count("generated 6 tokens") == 1


def test_ctrl_c_at_the_question_ends_nothing(
    chat: Chat, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["interrupt", "hello", "/exit"])

    def typed(_: str) -> str:
        line = next(said)
        if line == "interrupt":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert chat("") == 0
    assert asked == [["hello"]]


def test_a_model_without_a_template_is_told_of(
    llama_cpp: None, plain_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(plain_gguf), "-q"]) == 2
    shown = capsys.readouterr().err
    assert "has no chat template" in shown
    assert "exlq run" in shown
    assert len(shown.splitlines()) == 1
