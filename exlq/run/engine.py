"""What every runtime takes and gives: a prompt or a conversation in, text in pieces out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from exlq.errors import ConfigError

Messages = Sequence[Mapping[str, str]]  # of `role` and `content`, oldest first
Prompt = str | Messages
Tell = Callable[[str], None]
Ended = Literal["stop", "length", "interrupted"]
DEFAULT_CONTEXT = 4096
LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and when to stop; checked when made.

    The order is llama.cpp's in every runtime: repetition penalty, top-k, top-p, min-p, temperature.
    Temperature 0 takes the likeliest token; `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1
    leave those steps out. `stop` are texts that end an answer and are no part of it.
    """

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbelow(LARGEST_SEED))
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, value, fits, wanted in (
            ("-n", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("--repeat-penalty", self.repeat_penalty, 0 < self.repeat_penalty <= 100, "above 0, at most 100"),
            ("--seed", self.seed, 0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
            ("--stop", "''", all(self.stop), "some text"),
        ):
            if not fits:
                raise ConfigError(f"{flag} {value}: {wanted} is wanted")


@dataclass(frozen=True)
class Machine:
    """Where and with what a model runs. None, and False of the last, stand for what was not asked for.

    `ctx_size` counts tokens of prompt and answer; 4096, or the model's maximum if that is less.
    """

    ctx_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    no_mmap: bool = False
    mlock: bool = False
    verbose: bool = False

    def refuse(self, runtime: str, flags: Sequence[str], instead: str) -> None:
        """Raises ConfigError where one of these flags was given, which `runtime` cannot honour."""
        for flag in flags:
            given = getattr(self, flag.removeprefix("--").replace("-", "_"))
            if given is not None and given is not False:  # 0 layers are a wish too
                raise ConfigError(f"{flag}: {runtime} cannot honour it; {instead}")

    def context(self, longest: int) -> int:
        """Tokens of prompt and answer together.

        Args:
            longest: the model's own maximum.

        Raises:
            ConfigError: for more than that, or less than 2.
        """
        if self.ctx_size is None:
            return min(DEFAULT_CONTEXT, longest)
        if not 2 <= self.ctx_size <= longest:
            raise ConfigError(f"--ctx-size {self.ctx_size}: 2 to {longest} is wanted, the model's maximum")
        return self.ctx_size


@dataclass(frozen=True)
class Answer:
    """What came of a prompt; the rates are None where nothing can be said of them.

    `prompt_tokens` are those of the whole prompt, also where some were still in the cache. Tokens of an
    interrupted answer of llama.cpp are the pieces that came.
    """

    text: str
    ended: Ended
    prompt_tokens: int | None
    generated_tokens: int
    prompt_per_s: float | None
    generated_per_s: float | None


class Engine(Protocol):
    """A loaded model."""

    about: str  # which runtime with what, in one line
    has_template: bool  # whether conversations can be held

    def answer(self, prompt: Prompt, sampling: Sampling, tell: Tell) -> Answer:
        """Generates until a stop token, a stop text, the limit or Ctrl-C.

        Args:
            prompt: text to go on from, or a conversation that the model's chat template writes out.
            tell: called with each piece of the answer as it comes, always of whole characters.

        Raises:
            ConfigError: if the prompt leaves no room in the context.
            ModelError: if the template does not take the conversation.
        """
        ...

    def close(self) -> None: ...


def check_prompt(n_tokens: int, context: int) -> None:
    """Raises ConfigError where no room is left for an answer."""
    if n_tokens >= context:
        raise ConfigError(
            f"{n_tokens} tokens of prompt, a context of {context} was wanted to hold prompt and answer; "
            "shorten it (/reset in a chat) or give a larger --ctx-size"
        )


def rate(count: int, seconds: float) -> float | None:
    """Per second, None where either is too little to say."""
    return count / seconds if count > 0 and seconds > 0 else None


def as_mapping(answer: Answer, sampling: Sampling, engine: Engine) -> dict[str, Any]:
    """Everything known of an answer, for a program."""
    return {**vars(answer), "seed": sampling.seed, "runtime": engine.about}
