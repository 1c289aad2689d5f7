"""BPE tokenizers of SentencePiece's kind (▁ for a space, bytes as a fallback) as GGUF metadata.

llama.cpp's "llama" tokenizer has no merges: of all neighbours that together are a token it joins those of
the highest score. Scores come from tokenizer.model, or from the rank of the merge that makes a token
(with one score for all, as llama.cpp's converter has it there, the ids are others).

Where llama.cpp differs, and no entry of the file can change it: it puts the first space after every special
token too, and also in front of a text that begins with a space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from gguf import GGUFValueType, Keys, TokenType

from exlq.errors import ConfigError, ModelError
from exlq.formats.gguf.tokenizer_model import PieceType, read_sentencepiece
from exlq.formats.gguf.tokenizer_source import TokenizerSource, listed, refuse_twins
from exlq.formats.gguf.values import KeyValue

SPACE = "▁"
UNUSED_SCORE = -10000.0
PROBES, PROBES_WRONG = 512, 0.01
ADVICE = "leave out --format gguf or use --gguf-template"


def space_entries(source: TokenizerSource, vocab_size: int, pre: str | None) -> list[KeyValue]:
    """The vocabulary with its scores, and whether a text gets a space in front.

    Raises:
        ConfigError: if a pre-tokenizer was asked for; this kind has none.
        ModelError: if the tokenizer does what llama.cpp cannot.
    """
    if pre is not None:
        raise ConfigError(
            f"--tokenizer-pre {pre}: {source.directory} has a SentencePiece tokenizer, which needs none; "
            "leave the flag out"
        )
    prefix = space_prefix(source)
    texts, types = listed(source, vocab_size)
    _name_bytes(texts, types)
    _refuse_lost_bytes(source, texts)
    scores = _scores(source, texts, types)
    texts = [
        text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text
        for text, kind in zip(texts, types, strict=True)
    ]
    refuse_twins(texts, source)
    _refuse_other_ids(source, texts, types, scores, prefix)
    keys = Keys.Tokenizer
    array, strings = GGUFValueType.ARRAY, GGUFValueType.STRING
    return [
        KeyValue(keys.MODEL, "llama", strings),
        KeyValue(keys.PRE, "default", strings),
        KeyValue(keys.LIST, texts, array, strings),
        KeyValue(keys.SCORES, scores, array, GGUFValueType.FLOAT32),
        KeyValue(keys.TOKEN_TYPE, types, array, GGUFValueType.INT32),
        KeyValue(keys.ADD_PREFIX, prefix, GGUFValueType.BOOL),
    ]


def space_prefix(source: TokenizerSource) -> bool:
    """Whether transformers puts a space in front of a text; ModelError if it does anything else to it."""
    prefixes, replaces = False, False
    for step in [*source.normalizers, *source.pre_tokenizers]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefixes = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}:
                prefixes, replaces = prefixes or scheme != "never", True
                if split:
                    _refuse_inner_spaces(source)
            case {"type": "Split", "pattern": {"String": " "}} if replaces:
                pass  # there is no space left to split at
            case _:
                raise ModelError(
                    f"{source.directory}: the tokenizer has a step {step['type']}, spaces turned into ▁ and "
                    f"nothing else was wanted; {ADVICE}"
                )
    if not replaces:
        raise ModelError(
            f"{source.directory}: the tokenizer does not turn spaces into ▁ as SentencePiece does; {ADVICE}"
        )
    return prefixes


def _name_bytes(texts: list[str], types: list[int]) -> None:
    """Gives the token of a byte of ASCII its name where it goes by its character, in place.

    Gemma's tab has both texts, and the package tokenizers keeps now the one, now the other.
    """
    known = set(texts)
    for token_id, text in enumerate(texts):
        if types[token_id] == TokenType.NORMAL and len(text) == 1 and text.isascii():
            name = f"<0x{ord(text):02X}>"
            if name not in known:
                texts[token_id], types[token_id] = name, int(TokenType.BYTE)


def _scores(source: TokenizerSource, texts: Sequence[str], types: list[int]) -> list[float]:
    """A score per token; marks in `types` what tokenizer.model knows better."""
    if (source.directory / "tokenizer.model").is_file():
        known = _scores_of_model(source, texts, types)
    else:
        rank = {left + right: -float(n) for n, (left, right) in reversed([*enumerate(source.merges, 1)])}
        known = [rank.get(text, 0.0) for text in texts]
    unk = source.tokenizer.special_tokens_map.get("unk_token")
    if unk in texts:
        types[texts.index(unk)] = int(TokenType.UNKNOWN)
    joinable = (TokenType.NORMAL, TokenType.BYTE)
    # No spelling may be joined into a special token before it is joined into ordinary ones.
    below = min(min(known) - 1, UNUSED_SCORE)
    return [score if kind in joinable else below for kind, score in zip(types, known, strict=True)]


def _scores_of_model(source: TokenizerSource, texts: Sequence[str], types: list[int]) -> list[float]:
    path = source.directory / "tokenizer.model"
    model = read_sentencepiece(path)
    alone = not (source.directory / "tokenizer.json").is_file()
    refused = {
        f"its type is {model.model_type}, BPE was wanted": model.model_type != "BPE",
        "it normalizes texts, llama.cpp does not": alone and model.normalizes,
        "it removes extra spaces, llama.cpp does not": alone and model.removes_extra_whitespaces,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ModelError(f"{path}: {what}; {ADVICE}")
    scores = [0.0] * len(texts)
    for token_id, (text, kind) in enumerate(zip(texts, types, strict=True)):
        piece = model.pieces[token_id] if token_id < len(model.pieces) else None
        if kind not in (TokenType.NORMAL, TokenType.BYTE):
            continue
        if piece is None or piece.text != text:
            raise ModelError(
                f"{path}: token {token_id} is {piece.text if piece else None!r} there and {text!r} in "
                "the tokenizer transformers loads; remove the file that is not the model's"
            )
        scores[token_id] = piece.score
        if piece.type == PieceType.UNUSED:
            types[token_id] = int(TokenType.UNUSED)
    return scores


def _refuse_inner_spaces(source: TokenizerSource) -> None:
    added = {token["content"] for token in source.added}
    inner = next((t for t in source.model["vocab"] if SPACE in t[1:] and t not in added), None)
    if inner is not None:
        raise ModelError(
            f"{source.directory}: the tokenizer splits texts at spaces but has the token {inner!r}, "
            f"which llama.cpp would use; {ADVICE}"
        )


def _refuse_lost_bytes(source: TokenizerSource, texts: Sequence[str]) -> None:
    lost = {f"<0x{byte:02X}>" for byte in range(256)} - set(texts)
    if lost:
        raise ModelError(
            f"{source.directory}: {len(lost)} of the 256 byte tokens are missing, {min(lost)} for one; "
            f"llama.cpp needs them all; {ADVICE}"
        )


def _refuse_other_ids(
    source: TokenizerSource,
    texts: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    prefix: bool,
) -> None:
    """Joins tokens as llama.cpp would, and refuses where that is not what transformers does."""
    ids = {text: token_id for token_id, text in enumerate(texts)}
    score_of = dict(zip(texts, scores, strict=True))
    probes = _probes(texts, types)
    wrong = 0
    for probe in probes:
        parts = joined(SPACE * prefix + probe, score_of)
        wrong += source.ids(probe, special=False) != [ids.get(part) for part in parts]
    if wrong > PROBES_WRONG * len(probes):
        raise ModelError(
            f"{source.directory}: joined by score as llama.cpp does it, {wrong} of {len(probes)} words get "
            f"other tokens; the merges of SentencePiece's BPE were wanted; {ADVICE}"
        )


def _probes(texts: Sequence[str], types: Sequence[int]) -> list[str]:
    """Words put together of two tokens each, spread over the vocabulary."""
    plain = (t.strip(SPACE) for t, kind in zip(texts, types, strict=True) if kind == TokenType.NORMAL)
    words = [text for text in plain if text.isalpha()]
    chosen = words[:: max(1, len(words) // PROBES)]
    return [first + second for first, second in zip(chosen, reversed(chosen), strict=True)]


def joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """Tokens of a text as llama.cpp's "llama" tokenizer makes them: best score first, then leftmost.

    Source: llm_tokenizer_spm_session of src/llama-vocab.cpp.
    """
    parts = list(text)
    while True:
        pairs = [left + right for left, right in pairwise(parts)]
        known = [at for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            return parts
        best = max(known, key=lambda at: scores[pairs[at]])
        parts[best : best + 2] = [pairs[best]]
