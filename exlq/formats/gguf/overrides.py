"""Types of tensors given by hand, with the options and the precedence of llama-quantize.

Source: llama.cpp, src/llama-quant.cpp and tools/quantize/quantize.cpp (2026-10), restated.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exlq.errors import ConfigError
from exlq.formats.gguf.recipes import (
    EMBEDDINGS,
    OUTPUT,
    Named,
    Recipe,
    fallback,
    is_quantized,
    is_quantized_name,
    is_tied,
)
from exlq.formats.gguf.types import BLOCKS

TABLE_PER_LAYER = EMBEDDINGS[1]  # the one embedding a pattern takes from --token-embedding-type
FLAGS = {"embedding": "--token-embedding-type", "output": "--output-tensor-type"}
PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")


@dataclass(frozen=True)
class Overrides:
    """Types given by hand: by the first pattern found in a name, for the head, for the embeddings."""

    patterns: tuple[tuple[re.Pattern[str], str], ...] = ()
    output: str | None = None
    embedding: str | None = None


def parse_overrides(
    items: Sequence[str] = (), output: str | None = None, embedding: str | None = None
) -> Overrides:
    """The overrides of `--tensor-type` items REGEX=TYPE, `--output-tensor-type` and `--token-embedding-type`.

    Patterns are lower-cased, as llama-quantize does. It reads them as ECMAScript: what Python alone
    understands, as `(?i)` and `(?<=…)`, works here only.

    Raises:
        ConfigError: for an item without `=`, a pattern that is no regular expression, an unknown type.
    """
    return Overrides(
        patterns=tuple(_parse_item(item) for item in items),
        output=None if output is None else _parse_type(output, FLAGS["output"]),
        embedding=None if embedding is None else _parse_type(embedding, FLAGS["embedding"]),
    )


def read_type_file(path: Path) -> list[str]:
    """The items of a `--tensor-type-file`, which white space separates.

    Raises:
        ConfigError: if the file cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"--tensor-type-file {path} cannot be read ({exc}); want text REGEX=TYPE …"
        ) from exc


def pinned(overrides: Overrides, name: str, tied: bool) -> str | None:
    """The type given by hand to a tensor, None if there is none.

    `tied` says that the embeddings are the head too: `--output-tensor-type` then speaks of them where
    neither `--token-embedding-type` nor a pattern does.
    """
    if not is_quantized_name(name):
        return None
    by_flag = _flag_for(overrides, name)
    if by_flag is not None:
        return getattr(overrides, by_flag)  # type: ignore[no-any-return]
    by_pattern = _by_pattern(overrides, name)
    return overrides.output if by_pattern is None and tied and name in EMBEDDINGS else by_pattern


def pinned_types(
    overrides: Overrides, tensors: Sequence[Named], recipe: Recipe | None = None
) -> dict[str, str]:
    """The type of every tensor that has one given by hand, held against the length of its rows.

    A type whose blocks do not divide the rows gives way as a recipe's does. With a recipe of floats only the
    two flags count, as in llama-quantize.

    Raises:
        ConfigError: for a head or embeddings whose rows are no whole blocks of the type a flag gives them;
            llama-quantize would fail on them.
    """
    tied = is_tied(tensors)
    if recipe is not None and recipe.is_float:
        overrides = replace(overrides, patterns=(), output=None if tied else overrides.output)
    types: dict[str, str] = {}
    for tensor in tensors:
        type = pinned(overrides, tensor.name, tied)
        if type is None or not is_quantized(tensor.name, tensor.shape):
            continue
        flag = _flag_for(overrides, tensor.name)
        types[tensor.name] = fallback(type, tensor.shape[-1])
        if flag is not None and types[tensor.name] != type:
            raise ConfigError(
                f"{FLAGS[flag]} {type} stores whole blocks of {BLOCKS[type].block_size} weights, "
                f"{tensor.name} has rows of {tensor.shape[-1]}; choose {types[tensor.name]}"
            )
    return types


def type_file(types: Mapping[str, str]) -> str:
    """A `--tensor-type-file` with which stock llama-quantize gives each tensor the type it has in `types`.

    To be used as `llama-quantize --tensor-type-file FILE IN.gguf OUT.gguf Q4_K_M`: any quantized TYPE will
    do, it names the file and types what is not listed. The items reach `token_embd.weight` and
    `output.weight` too, as long as neither of their two flags is given.
    """
    listed = {name: type for name, type in types.items() if is_quantized_name(name)}
    return "".join(f"^{_escaped(name)}$={type.lower()}\n" for name, type in listed.items())


def _flag_for(overrides: Overrides, name: str) -> str | None:
    """The field of `overrides` that has the first word on a tensor, before any pattern."""
    if name == OUTPUT and overrides.output is not None:
        return "output"
    if name not in EMBEDDINGS or overrides.embedding is None:
        return None
    named = name == TABLE_PER_LAYER and _by_pattern(overrides, name) is not None
    return None if named else "embedding"


def _by_pattern(overrides: Overrides, name: str) -> str | None:
    return next((type for pattern, type in overrides.patterns if pattern.search(name)), None)


def _parse_item(item: str) -> tuple[re.Pattern[str], str]:
    pattern, equals, type = item.partition("=")
    if not pattern or not equals:
        raise ConfigError(
            f"--tensor-type {item!r} has no pattern or no type; want REGEX=TYPE, as attn_v=Q6_K"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python's next version would read differently
            compiled = re.compile(pattern.lower())
    except (re.error, FutureWarning, DeprecationWarning, OverflowError, RecursionError) as exc:
        raise ConfigError(f"--tensor-type {item!r} is no regular expression: {exc}; correct it") from exc
    return compiled, _parse_type(type, f"--tensor-type {pattern}=")


def _parse_type(text: str, flag: str) -> str:
    if text.upper() not in BLOCKS:
        raise ConfigError(f"{flag}: {text!r} is no tensor type; want one of {', '.join(BLOCKS)}")
    return text.upper()


def _escaped(name: str) -> str:
    """A pattern for one name; bytes a pattern or the file cannot hold, and capitals, match as any byte."""
    return "".join(
        chr(byte) if byte in PLAIN else r"\." if byte == ord(".") else "." for byte in name.encode()
    )
