"""`exlq run`: text continued by a model."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from exlq.cli.generation import Talk, machine_of, sampling_of
from exlq.cli.screen import Screen
from exlq.errors import ConfigError
from exlq.run.open import open_engine
from exlq.run.source import find_source


def run(parsed: argparse.Namespace, screen: Screen) -> None:
    talk, sampling = Talk(parsed, screen), sampling_of(parsed)
    source = find_source(parsed.model, parsed.format)
    prompt = _prompt(parsed.prompt)
    with closing(open_engine(source, machine_of(parsed), talk.note)) as engine:
        answer = talk.answer(engine, prompt, sampling)
    if answer.ended == "interrupted":
        raise KeyboardInterrupt


def _prompt(given: str | None) -> str:
    """What -p says, or what comes on stdin, without the line's end."""
    if given is None and sys.stdin.isatty():
        raise ConfigError('no prompt was given; want -p "some text", or text on stdin')
    prompt = sys.stdin.read().rstrip("\r\n") if given is None else given
    if not prompt:
        raise ConfigError('the prompt is empty; want -p "some text", or text on stdin')
    return prompt
