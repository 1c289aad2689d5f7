"""What does not belong in a text: special tokens spelled out, control characters, runs of one character."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerBase

REPEATED = 200  # times in a row that one character is odd
# Of the models most in use; taken where no tokenizer says which it has.
COMMON = (
    *("<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>"),
)
SURROGATE = re.compile(r"[\ud800-\udfff]")
ODD = {
    "control characters": re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]"),
    "replacement characters": re.compile("\ufffd"),
    "invisible characters": re.compile("[\u200b\u2060\ufeff]"),
    "one character repeated": re.compile(rf"(.)\1{{{REPEATED - 1},}}", re.DOTALL),
}


def odd(texts: Iterable[str]) -> dict[str, int]:
    """How many texts hold what `ODD` names; only those that any does."""
    found = Counter(name for text in texts for name, pattern in ODD.items() if pattern.search(text))
    return {name: found[name] for name in ODD if found[name]}


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """The tokenizer's special tokens, or the common ones."""
    if tokenizer is None:
        return COMMON
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def spelled_out(texts: Iterable[str], tokens: Iterable[str]) -> Mapping[str, int]:
    """How often each token stands in the texts, most often first; only those that do."""
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return {}
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return dict(Counter(match[0] for text in texts for match in pattern.finditer(text)).most_common())
