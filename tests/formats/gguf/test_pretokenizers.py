"""The table of pre-tokenizers says of each what llama.cpp does."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from exlq.evaluation.llamacpp import available
from exlq.formats.gguf.pretokenizers import (
    CHECK_TEXT,
    DIGIT_PATTERN,
    GPT2_PATTERN,
    NEAR_BY_STRUCTURE,
    PRE_BY_HASH,
    PRE_BY_STRUCTURE,
    PRE_NAMES,
)
from exlq.formats.gguf.tokenizer import tokenizer_metadata
from tests.formats.gguf.tokenizer_models import STRESS, loaded, save, split, trained

pytestmark = pytest.mark.skipif(not available(), reason="llama.cpp (xllamacpp) is not installed")

STRUCTURES = list(PRE_BY_STRUCTURE.items())


def steps_of(patterns: tuple[str, ...]) -> list[Any]:
    """Steps as tokenizer.json has them: GPT-2's own pattern hides in ByteLevel, digits have a step."""
    if patterns[-1] != GPT2_PATTERN:
        return split(*patterns)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if patterns[0] == DIGIT_PATTERN else []
    return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    characters = [*STRESS, *(" \n\t'sS019,.aA" * 6)]
    return ["".join(rng.choices(characters, k=rng.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize(("structure", "name"), STRUCTURES, ids=[name for _, name in STRUCTURES])
def test_a_structure_of_the_table_is_split_by_llama_cpp_alike(
    structure: tuple[tuple[str, ...], bool], name: str, tmp_path: Path
) -> None:
    patterns, ignore_merges = structure
    tokenizer = trained(steps_of(patterns), ignore_merges=ignore_merges)
    entries = tokenizer_metadata(save(tokenizer, tmp_path / "model"), 640)
    assert [entry.value for entry in entries if entry.key == "tokenizer.ggml.pre"] == [name]
    with loaded(entries, tmp_path / "v.gguf") as vocabulary:
        for text in [STRESS, CHECK_TEXT, *random_texts(400)]:
            found = vocabulary.tokenize(text, add_special=True, parse_special=True)
            assert found == tokenizer.encode(text).ids, repr(text)


def test_the_structures_left_out_are_indeed_split_otherwise(tmp_path: Path) -> None:
    for (patterns, ignore_merges), name in NEAR_BY_STRUCTURE.items():
        tokenizer = trained(split(*patterns), ignore_merges=ignore_merges)
        entries = tokenizer_metadata(save(tokenizer, tmp_path / name), 640, pre=name)
        with loaded(entries, tmp_path / f"{name}.gguf") as vocabulary:
            texts = [STRESS, *random_texts(400)]
            same = [
                vocabulary.tokenize(t, add_special=True, parse_special=True) == tokenizer.encode(t).ids
                for t in texts
            ]
        assert 0.9 < sum(same) / len(same) < 1, name


def test_llama_cpp_loads_every_name(tmp_path: Path) -> None:
    directory = save(trained(split(GPT2_PATTERN)), tmp_path / "model")
    for name in PRE_NAMES:
        with loaded(tokenizer_metadata(directory, 640, pre=name), tmp_path / "v.gguf") as vocabulary:
            assert vocabulary.tokenize("a", add_special=False, parse_special=False), name


def test_every_name_of_the_tables_is_one_llama_cpp_loads() -> None:
    used = {*PRE_BY_HASH.values(), *PRE_BY_STRUCTURE.values(), *NEAR_BY_STRUCTURE.values()}
    assert used <= set(PRE_NAMES)
    assert list(PRE_NAMES) == sorted(set(PRE_NAMES))
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in PRE_BY_HASH)


def test_a_tokenizer_of_the_hash_table_is_known_by_its_ids_whatever_its_structure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is of the ids as Python prints a list of them, BOS included."""
    tokenizer = trained(split(r"\w+|\W+"))
    digest = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()
    monkeypatch.setattr("exlq.formats.gguf.tokenizer_bytes.PRE_BY_HASH", {digest: "viking"})
    entries = tokenizer_metadata(save(tokenizer, tmp_path / "model"), 640)
    assert entries[1].value == "viking"


def test_where_both_are_known_the_structure_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2's vocabulary gives the check text the same ids under the patterns of qwen2 and qwen35."""
    structures = {name: patterns for (patterns, _), name in STRUCTURES}
    tokenizer = trained(split(*structures["qwen35"]))
    digest = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()
    directory = save(tokenizer, tmp_path / "model")
    for by_hash, expected in (("qwen2", "qwen35"), ("qwen35", "qwen35"), ("viking", "viking")):
        monkeypatch.setattr("exlq.formats.gguf.tokenizer_bytes.PRE_BY_HASH", {digest: by_hash})
        assert tokenizer_metadata(directory, 640)[1].value == expected


def test_the_check_text_is_the_one_the_hashes_are_of() -> None:
    """The digest is of llama.cpp's own text; with GPT-2's vocabulary it gives the hash of gpt-2."""
    digest = hashlib.sha256(CHECK_TEXT.encode()).hexdigest()
    assert digest == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    assert PRE_BY_HASH["3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"] == "gpt-2"
