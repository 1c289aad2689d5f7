"""Special tokens, what is put around a text, and chat templates, as GGUF metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType, Keys

from exlq.errors import ModelError
from exlq.files import read_json
from exlq.formats.gguf.tokenizer_source import TokenizerSource
from exlq.formats.gguf.values import KeyValue

KEY_OF = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
}


def special_entries(source: TokenizerSource, vocab_size: int) -> list[KeyValue]:
    """Ids of the special tokens and whether BOS and EOS are added, both always said.

    llama.cpp has defaults for what a file leaves out (id 11 ends a text of a "gpt2" tokenizer), hence
    a tokenizer without BOS gets EOS in its place, as GPT-2 has it, and one without EOS is refused.

    Raises:
        ModelError: without an end of text, or if more than BOS and EOS is put around a text.
    """
    before, after = _around(source)
    ids = _ids(source)
    around = {"bos": before, "eos": after}
    ids.update({name: tokens[0] for name, tokens in around.items() if tokens})
    ids = {name: token for name, token in ids.items() if 0 <= token < vocab_size}
    lost = [token for token in [*before, *after] if token >= vocab_size]
    if lost:
        raise ModelError(
            f"{source.directory}: token {lost[0]} is put around every text, config.json has vocab_size "
            f"{vocab_size}; the two must belong together"
        )
    if "eos" not in ids:
        raise ModelError(
            f"{source.directory}: the tokenizer has no end-of-text token among {vocab_size}; name it as "
            "eos_token in tokenizer_config.json"
        )
    ids.setdefault("bos", ids["eos"])
    return [
        *(KeyValue(KEY_OF[name], ids[name], GGUFValueType.UINT32) for name in KEY_OF if name in ids),
        KeyValue(Keys.Tokenizer.ADD_BOS, bool(before), GGUFValueType.BOOL),
        KeyValue(Keys.Tokenizer.ADD_EOS, bool(after), GGUFValueType.BOOL),
    ]


def template_entries(source: TokenizerSource) -> list[KeyValue]:
    """The chat template; of several, each by its name and the one called default as the template."""
    template = source.tokenizer.chat_template
    if template is None:
        return []
    named: Mapping[str, str] = template if isinstance(template, dict) else {"default": template}
    keys, strings = Keys.Tokenizer, GGUFValueType.STRING
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in named.items() if name != "default"}
    entries = [
        KeyValue(keys.CHAT_TEMPLATE_N.format(name=name), text, strings) for name, text in others.items()
    ]
    if others:
        entries.append(KeyValue(keys.CHAT_TEMPLATES, list(others), GGUFValueType.ARRAY, strings))
    if "default" in named:
        entries.append(KeyValue(keys.CHAT_TEMPLATE, named["default"], strings))
    return entries


def _around(source: TokenizerSource) -> tuple[list[int], list[int]]:
    """Tokens before and after a text, at most one each."""
    plain, whole = source.ids("a", special=False), source.ids("a", special=True)
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    start = next(starts, None) if plain else None
    if start is None:
        raise ModelError(f"{source.directory}: the tokenizer gives no tokens for a letter; correct its files")
    before, after = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise ModelError(
            f"{source.directory}: the tokenizer puts {len(before)} tokens before and {len(after)} after a "
            "text, llama.cpp at most one; leave out --format gguf or use --gguf-template"
        )
    return before, after


def _ids(source: TokenizerSource) -> dict[str, int]:
    """Ids by the names of `KEY_OF`: the tokenizer's own, then config.json's."""
    config = _config(source)
    named = source.tokenizer.special_tokens_map
    texts = source.texts
    ids: dict[str, int] = {}
    for name in KEY_OF:
        token = texts.get(named.get(f"{name}_token"))
        stated = config.get(f"{name}_token_id")
        if isinstance(stated, list):  # Llama 3 ends a text with any of several
            stated = stated[0] if stated else None
        if token is not None:
            ids[name] = token
        elif isinstance(stated, int) and not isinstance(stated, bool):
            ids[name] = stated
    return ids


def _config(source: TokenizerSource) -> Mapping[str, Any]:
    path = source.directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = read_json(path)
    except (ValueError, OSError) as exc:
        raise ModelError(f"{path}: not readable as JSON ({exc}); copy the file again") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path}: an object was wanted, {type(config).__name__} found; copy the file again")
    inner = config.get("text_config")
    return {**inner, **config} if isinstance(inner, dict) else config
