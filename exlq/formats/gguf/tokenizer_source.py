"""A model's tokenizer as transformers runs it, taken apart: what a GGUF file says of it must do the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from exlq.calibration.tokenizer import load_tokenizer
from exlq.errors import ModelError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Not marked special where they should be: llama.cpp's converter makes them control tokens all the same.
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)


@dataclass(frozen=True)
class TokenizerSource:
    """A loaded tokenizer with what the package tokenizers runs for it, as the JSON of tokenizer.json."""

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    parts: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.parts["model"]
        return model

    @property
    def pre_tokenizers(self) -> list[Mapping[str, Any]]:
        return flat(self.parts["pre_tokenizer"], "pretokenizers")

    @property
    def normalizers(self) -> list[Mapping[str, Any]]:
        return flat(self.parts["normalizer"], "normalizers")

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        added: Sequence[Mapping[str, Any]] = self.parts["added_tokens"]
        return added

    @property
    def merges(self) -> list[tuple[str, str]]:
        return [(left, right) for left, right in self.model["merges"]]

    @property
    def texts(self) -> dict[str, int]:
        """Id of every token by its text, those added included."""
        return {**self.model["vocab"], **{token["content"]: token["id"] for token in self.added}}

    def ids(self, text: str, *, special: bool) -> list[int]:
        """What transformers makes of a text, `special` tokens put around it or not."""
        found: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return found


def read_source(directory: Path) -> TokenizerSource:
    """The tokenizer of a model directory.

    Raises:
        ModelError: if there is none, or it is one whose parts transformers does not tell.
    """
    if (directory / "tekken.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"{directory}: tekken.json alone was found, tokenizer.json was wanted; take the model's "
            "transformers version, or save its tokenizer with transformers"
        )
    tokenizer = load_tokenizer(directory)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{directory}: {type(tokenizer).__name__} runs in Python, one with a tokenizer.json was wanted; "
            "leave out --format gguf or use --gguf-template"
        )
    return TokenizerSource(directory, tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()))


def flat(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The steps of a part, sequences in sequences taken out; `members` is how a sequence names its own."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for member in part[members] for step in flat(member, members)]


def listed(source: TokenizerSource, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of the tokens 0 to `vocab_size` - 1, `[PADi]` where the tokenizer has none.

    Added tokens beyond the model's vocabulary are left out: it has no embedding for them.

    Raises:
        ModelError: if an ordinary token is beyond it, or two tokens have one text.
    """
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    added = {token["id"] for token in source.added}
    for text, token_id in source.model["vocab"].items():
        if token_id < vocab_size:
            texts[token_id], types[token_id] = text, int(_type_of(text, source))
        elif token_id not in added:
            raise ModelError(
                f"{source.directory}: token {token_id} ({text!r}) is in the tokenizer, config.json has "
                f"vocab_size {vocab_size}; the two must belong together"
            )
    for token in source.added:
        if token["id"] < vocab_size:
            control = token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            texts[token["id"]], types[token["id"]] = token["content"], int(kind)
    return texts, types


def refuse_twins(texts: Sequence[str], source: TokenizerSource) -> None:
    """Two tokens of one text make llama.cpp abort the whole program when it loads the file."""
    seen: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        if text in seen:
            raise ModelError(
                f"{source.directory}: tokens {seen[text]} and {token_id} are both {text!r}, llama.cpp wants "
                "each text once; correct tokenizer.json"
            )
        seen[text] = token_id


def _type_of(text: str, source: TokenizerSource) -> TokenType:
    fallback = source.model.get("byte_fallback")
    return TokenType.BYTE if fallback and BYTE.fullmatch(text) else TokenType.NORMAL
