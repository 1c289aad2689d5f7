"""The tokenizer of a GGUF file, from the one of a model directory.

Two kinds are carried over, byte-level BPE and SentencePiece's BPE. What transformers runs is the measure:
the entries are made so that llama.cpp gives the same ids, and a tokenizer it cannot follow is refused. The
scores of a tokenizer.model are kept as they are: SentencePiece itself and llama.cpp agree on them.
"""

from __future__ import annotations

from pathlib import Path

from exlq.errors import ModelError
from exlq.formats.gguf.pretokenizers import PRE_NAMES
from exlq.formats.gguf.tokenizer_bytes import byte_level_entries, checked_name
from exlq.formats.gguf.tokenizer_source import TokenizerSource, read_source
from exlq.formats.gguf.tokenizer_spaces import space_entries
from exlq.formats.gguf.tokenizer_special import special_entries, template_entries
from exlq.formats.gguf.values import KeyValue


def tokenizer_metadata(directory: Path, vocab_size: int, pre: str | None = None) -> list[KeyValue]:
    """Every `tokenizer.*` entry of the model in `directory`.

    Args:
        vocab_size: tokens the model has embeddings for, of config.json.
        pre: name of llama.cpp's pre-tokenizer, found by the tokenizer itself where None.

    Raises:
        ConfigError: if llama.cpp knows no pre-tokenizer of that name, or the tokenizer has none.
        ModelError: if the tokenizer is missing, broken, or does what llama.cpp cannot.
    """
    if pre is not None:
        checked_name(pre)
    source = read_source(directory)
    vocabulary = byte_level_entries if _is_byte_level(source) else space_entries
    return [
        *vocabulary(source, vocab_size, pre),
        *special_entries(source, vocab_size),
        *template_entries(source),
    ]


def known_pre_names() -> tuple[str, ...]:
    """Every name llama.cpp takes as `tokenizer.ggml.pre`, sorted."""
    return PRE_NAMES


def _is_byte_level(source: TokenizerSource) -> bool:
    """Whether the tokenizer is of the first kind; ModelError if of neither."""
    kind = source.model["type"]
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in source.pre_tokenizers):
        return True
    if kind == "BPE" and source.model.get("byte_fallback"):
        return False
    raise ModelError(
        f"{source.directory}: the tokenizer is {kind}{' without bytes' if kind == 'BPE' else ''}, byte-level "
        "BPE or SentencePiece's BPE was wanted; leave out --format gguf or use --gguf-template"
    )
