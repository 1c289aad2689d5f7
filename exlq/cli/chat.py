"""`exlq chat`: a conversation with a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing

from exlq.cli.generation import Talk, machine_of, sampling_of
from exlq.cli.screen import Screen
from exlq.errors import InputError, ModelError
from exlq.run.conversation import Conversation, command
from exlq.run.open import open_engine
from exlq.run.source import find_source

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401, gives `input` the arrow keys and a history

ASK = "> "


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    talk, sampling = Talk(parsed, screen), sampling_of(parsed)
    source = find_source(parsed.model, parsed.format)
    with closing(open_engine(source, machine_of(parsed), talk.note)) as engine:
        if not engine.has_template:
            raise ModelError(
                f"{source.path} has no chat template, so it was hardly made to chat; exlq run goes on from a "
                "text; for chat take a model made for it (chat_template.jinja, or in GGUF "
                "tokenizer.chat_template)"
            )
        talk.note("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat.")
        now = Conversation(parsed.system)
        for line in _lines(talk):
            meant = command(line, now)
            if meant is None:
                try:
                    answer = talk.answer(engine, now.messages(line), sampling)
                    now = now.after(line, answer.text)
                except InputError as exc:  # a conversation too long, or not to the template's liking
                    talk.note(f"error: {exc}")
                continue
            now = meant.conversation
            if meant.ends:
                return
            talk.note(meant.said)


def _lines(talk: Talk) -> Iterator[str]:
    """What the person says, line by line, until the end of stdin; empty lines are nothing."""
    asked = ASK if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asked).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            talk.note("\n/exit or Ctrl-D ends the chat")
            continue
        if line:
            yield line
