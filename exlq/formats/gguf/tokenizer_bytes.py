"""Byte-level BPE tokenizers (GPT-2's kind) as GGUF metadata, and the pre-tokenizer they need."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType, Keys

from exlq.errors import ConfigError, ModelError
from exlq.formats.gguf.pretokenizers import (
    CHECK_TEXT,
    DIGIT_PATTERN,
    DIGITS_PATTERN,
    GPT2_PATTERN,
    NEAR_BY_STRUCTURE,
    PRE_BY_HASH,
    PRE_BY_STRUCTURE,
    PRE_NAMES,
)
from exlq.formats.gguf.tokenizer_source import TokenizerSource, listed, refuse_twins
from exlq.formats.gguf.values import KeyValue

# llama.cpp wants merges even of a tokenizer that has none; this one can never apply, as the
# texts it merges are longer than a character and no merge makes them.
NO_MERGES = ["<none> <none>"]
# How such tokenizers write bytes: the printable as themselves, the other 68 from U+0100 on.
ALPHABET = {chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))}


def byte_level_entries(source: TokenizerSource, vocab_size: int, pre: str | None) -> list[KeyValue]:
    """The vocabulary, the merges and the pre-tokenizer's name, `pre` if given.

    Raises:
        ConfigError: if llama.cpp knows no pre-tokenizer of that name.
        ModelError: if the tokenizer does what llama.cpp cannot, or its pre-tokenizer is not known.
    """
    _refuse_settings(source)
    texts, types = listed(source, vocab_size)
    refuse_twins(texts, source)
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in source.merges]
    keys = Keys.Tokenizer
    strings, integers = GGUFValueType.STRING, GGUFValueType.INT32
    return [
        KeyValue(keys.MODEL, "gpt2", strings),
        KeyValue(keys.PRE, checked_name(pre) if pre is not None else find_pre(source), strings),
        KeyValue(keys.LIST, texts, GGUFValueType.ARRAY, strings),
        KeyValue(keys.TOKEN_TYPE, types, GGUFValueType.ARRAY, integers),
        KeyValue(keys.MERGES, merges or NO_MERGES, GGUFValueType.ARRAY, strings),
    ]


def checked_name(pre: str) -> str:
    """The name, if llama.cpp knows it; ConfigError otherwise, with the names near it."""
    if pre in PRE_NAMES:
        return pre
    near = difflib.get_close_matches(pre, PRE_NAMES, n=3, cutoff=0.4) or ["llama-bpe", "qwen2", "gpt-2"]
    raise ConfigError(
        f"--tokenizer-pre {pre}: llama.cpp knows no such pre-tokenizer; did you mean {', '.join(near)}?"
    )


def find_pre(source: TokenizerSource) -> str:
    """llama.cpp's name of the pre-tokenizer: by the ids of the check text, or by what it is made of.

    The second takes only what llama.cpp splits alike, and decides between names of which it has both:
    the check text does not tell all of them apart (qwen2 and qwen35). As in llama.cpp's own table, NFC
    is let pass though llama.cpp does not normalize: nearly every text is in NFC.

    Raises:
        ModelError: if neither finds one; there is no guess.
    """
    digest = hashlib.sha256(str(source.ids(CHECK_TEXT, special=True)).encode()).hexdigest()
    key = _structure(source)
    by_hash = PRE_BY_HASH.get(digest)
    by_structure = PRE_BY_STRUCTURE.get(key) if key else None
    if by_structure and (by_hash is None or by_hash in PRE_BY_STRUCTURE.values()):
        return by_structure
    if by_hash:
        return by_hash
    steps = " + ".join(_described(step) for step in [*source.normalizers, *source.pre_tokenizers])
    ignoring = ", ignoring merges" if source.model.get("ignore_merges") else ""
    near = NEAR_BY_STRUCTURE.get(key) if key else None
    advice = f"--tokenizer-pre {near} is near but not equal" if near else "give --tokenizer-pre NAME"
    raise ModelError(
        f"{source.directory}: the pre-tokenizer is {steps}{ignoring} (check hash {digest[:8]}), one that "
        f"llama.cpp knows was wanted; {advice}, or leave out --format gguf, or use --gguf-template"
    )


def _structure(source: TokenizerSource) -> tuple[tuple[str, ...], bool] | None:
    """A key of the tables of structures, None if a step is like nothing of llama.cpp's."""
    patterns = [_pattern(step) for step in source.pre_tokenizers]
    if any(step["type"] != "NFC" for step in source.normalizers):
        return None
    if any(pattern is None for pattern in patterns):
        return None
    return tuple(pattern for pattern in patterns if pattern), bool(source.model.get("ignore_merges"))


def _pattern(step: Mapping[str, Any]) -> str | None:
    """What a step splits by, "" if it does not split, None if llama.cpp has nothing of that kind."""
    if step["type"] == "ByteLevel":
        return GPT2_PATTERN if step["use_regex"] else ""
    if step["type"] == "Digits":
        return DIGIT_PATTERN if step["individual_digits"] else DIGITS_PATTERN
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern: str | None = step["pattern"].get("Regex")
        return pattern and pattern.replace("\r", r"\r").replace("\n", r"\n")
    return None


def _described(step: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in step.items() if name not in ("type", "trim_offsets")}
    return f"{step['type']}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def _refuse_settings(source: TokenizerSource) -> None:
    """What llama.cpp's BPE cannot do, whatever the pre-tokenizer is called."""
    model = source.model
    refused = {
        "puts a space in front of a text (add_prefix_space)": any(
            step.get("add_prefix_space") for step in source.pre_tokenizers
        ),
        "marks the parts of a word (continuing_subword_prefix, end_of_word_suffix)": (
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "drops merges at random (dropout)": model.get("dropout"),
        "lacks the token of some byte and gives unk_token for it": (
            model.get("unk_token") and ALPHABET - model["vocab"].keys()
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ModelError(
                f"{source.directory}: the tokenizer {what}, llama.cpp's BPE cannot; "
                "leave out --format gguf or use --gguf-template"
            )
