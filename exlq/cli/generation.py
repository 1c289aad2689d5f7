"""What the commands that use a model share: settings from flags, text as it comes, figures at the end."""

from __future__ import annotations

import argparse
import sys

from exlq.cli.screen import Screen
from exlq.run.engine import Answer, Engine, Machine, Prompt, Sampling, as_mapping


def sampling_of(parsed: argparse.Namespace) -> Sampling:
    """How tokens are drawn; the seed by lot where none is given."""
    seed = {} if parsed.seed is None else {"seed": parsed.seed}
    return Sampling(
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        min_p=parsed.min_p,
        repeat_penalty=parsed.repeat_penalty,
        stop=tuple(parsed.stop),
        **seed,
    )


def machine_of(parsed: argparse.Namespace) -> Machine:
    return Machine(
        ctx_size=parsed.ctx_size,
        device=getattr(parsed, "device", None),
        dtype=getattr(parsed, "dtype", None),
        threads=parsed.threads,
        n_gpu_layers=parsed.n_gpu_layers,
        no_mmap=parsed.no_mmap,
        mlock=parsed.mlock,
        verbose=parsed.verbose,
    )


class Talk:
    """Where answers and remarks go: text to stdout as it comes, remarks to stderr; for programs, events."""

    def __init__(self, parsed: argparse.Namespace, screen: Screen) -> None:
        self._json, self._quiet, self._screen = parsed.status_json, parsed.quiet, screen

    def note(self, text: str) -> None:
        """A remark that is no part of any answer."""
        if self._json:
            self._screen.tell(text)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def piece(self, text: str) -> None:
        """A part of an answer."""
        if not self._json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def answer(self, engine: Engine, prompt: Prompt, sampling: Sampling) -> Answer:
        """Lets the model answer, and shows the answer and its figures."""
        answer = engine.answer(prompt, sampling, self.piece)
        if self._json:
            self._screen.show(answer.text, as_mapping(answer, sampling, engine))
            return answer
        if not answer.text.endswith("\n"):
            self.piece("\n")
        self.note(figures(answer, sampling))
        return answer


def figures(answer: Answer, sampling: Sampling) -> str:
    """Tokens and their rates, in one line."""
    parts = [
        _rated("prompt", answer.prompt_tokens, answer.prompt_per_s),
        _rated("generated", answer.generated_tokens, answer.generated_per_s),
        f"seed {sampling.seed}" if sampling.temperature > 0 else "",
        {"stop": "", "length": "cut at the limit", "interrupted": "interrupted"}[answer.ended],
    ]
    return f"[{'; '.join(part for part in parts if part)}]"


def _rated(name: str, count: int | None, per_s: float | None) -> str:
    if count is None:
        return ""
    return f"{name} {count} tokens" + ("" if per_s is None else f", {per_s:.1f} tokens/s")
