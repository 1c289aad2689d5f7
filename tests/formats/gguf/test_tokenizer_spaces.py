"""SentencePiece's BPE in llama.cpp gives the ids of the package sentencepiece, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from exlq.calibration.tokenizer import load_tokenizer
from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp import available
from exlq.formats.gguf.tokenizer import tokenizer_metadata
from exlq.formats.gguf.tokenizer_spaces import joined
from exlq.formats.gguf.values import KeyValue
from tests.formats.gguf.tokenizer_models import CORPUS, STRESS, loaded, save, sentencepiece_model, write

needs_llamacpp = pytest.mark.skipif(not available(), reason="llama.cpp (xllamacpp) is not installed")


def value(entries: list[KeyValue], name: str) -> Any:
    """What an entry holds, None if it is not there."""
    return next((entry.value for entry in entries if entry.key == f"tokenizer.{name}"), None)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def converted(directory: Path, *, normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """The tokenizer.model of a directory as the package tokenizers runs it, with a few tokens added."""
    backend = json.loads(load_tokenizer(directory).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in backend["merges"]]
    model = models.BPE(backend["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def saved(tokenizer: Tokenizer, directory: Path) -> Path:
    return save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@needs_llamacpp
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_a_sentencepiece_model_keeps_its_ids(add_dummy_prefix: bool, tmp_path: Path) -> None:
    directory = sentencepiece_model(tmp_path / "model", add_dummy_prefix=add_dummy_prefix)
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = load_tokenizer(directory)
    entries = tokenizer_metadata(directory, 720)
    assert value(entries, "ggml.add_space_prefix") is add_dummy_prefix
    with loaded(entries, tmp_path / "v.gguf") as vocabulary:
        for text in [STRESS, *CORPUS, "  two spaces in front", "", "<s> spelled </s>"]:
            found = vocabulary.tokenize(text, add_special=False, parse_special=False)
            assert found == processor.encode(text), text
        for text in [STRESS, *CORPUS]:
            found = vocabulary.tokenize(text, add_special=True, parse_special=True)
            assert found == tokenizer(text, verbose=False)["input_ids"], text


@needs_llamacpp
@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix", "after_special"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True, False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False, True),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False, True),
    ],
    ids=["llama-2", "llama-new", "never", "gemma"],
)
def test_a_tokenizer_json_alone_keeps_its_ids(
    normalizer: Any, pre_tokenizer: Any, prefix: bool, after_special: bool, tmp_path: Path
) -> None:
    model = sentencepiece_model(tmp_path / "model")
    tokenizer = converted(model, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    directory = saved(tokenizer, tmp_path / "converted")
    entries = tokenizer_metadata(directory, 720)
    assert value(entries, "ggml.model") == "llama"
    assert value(entries, "ggml.add_space_prefix") is prefix
    reference = load_tokenizer(directory)
    with loaded(entries, tmp_path / "v.gguf") as vocabulary:
        for text in [STRESS, *CORPUS]:
            found = vocabulary.tokenize(text, add_special=False, parse_special=False)
            assert found == plain_ids(reference, text), text
        for text in [STRESS, "a</s>b <tag>c</s> d" if after_special else "a </s>"]:
            found = vocabulary.tokenize(text, add_special=True, parse_special=True)
            assert found == reference(text, verbose=False)["input_ids"], text


@needs_llamacpp
def test_runs_of_spaces_that_are_tokens_of_their_own_stay_so(tmp_path: Path) -> None:
    directory = sentencepiece_model(
        tmp_path / "model",
        add_dummy_prefix=False,
        user_defined_symbols=["<mask>", "▁▁", "▁▁▁", "\n\n", "<table>"],
    )
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "tokenizer_class": "GemmaTokenizer"}), encoding="utf-8")
    entries = tokenizer_metadata(directory, 720)
    tokens, types = value(entries, "ggml.tokens"), value(entries, "ggml.token_type")
    assert tokens[3:8] == ["<mask>", "  ", "   ", "\n\n", "<table>"]
    assert types[3:8] == [3, 4, 4, 4, 4]
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    text = "  a  b   c    d\n\n\ne<table>f " + STRESS
    with loaded(entries, tmp_path / "v.gguf") as vocabulary:
        assert vocabulary.tokenize(text, add_special=False, parse_special=True) == processor.encode(text)


def test_types_and_scores_are_those_of_the_model(tmp_path: Path) -> None:
    directory = sentencepiece_model(tmp_path / "model")
    processor = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    write(tokenizer_metadata(directory, 720), tmp_path / "v.gguf")
    fields = GGUFReader(tmp_path / "v.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:700] == [processor.id_to_piece(i) for i in range(700)]
    assert scores[3:700] == [processor.get_score(i) for i in range(3, 700)]
    assert types[:3] == [2, 3, 3]  # unknown, control, control
    assert types[3:259] == [6] * 256
    assert types[259:] == [1] * 441 + [5] * 20
    assert tokens[-1] == "[PAD719]"
    assert max(scores[700:]) < min(scores[3:700])
    assert fields["tokenizer.ggml.pre"].contents() == "default"
    assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_type": "unigram", "vocab_size": 450}, "its type is unigram, BPE was wanted"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes texts"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"byte_fallback": False, "vocab_size": 500}, r"\d+ of the 256 byte tokens are missing"),
    ],
)
def test_a_model_llama_cpp_cannot_follow_is_refused(
    options: dict[str, Any], found: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=found) as refused:
        tokenizer_metadata(sentencepiece_model(tmp_path, **options), 720)
    assert "\n" not in str(refused.value)


def test_another_models_tokenizer_model_is_refused(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "model")
    replaced = normalizers.Replace(" ", "▁")
    directory = saved(converted(model, normalizer=replaced, pre_tokenizer=None), tmp_path / "both")
    tokenizer_metadata(directory, 720)
    other = sentencepiece_model(tmp_path / "other", vocab_size=600)
    (directory / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    with pytest.raises(ModelError, match=r"tokenizer\.model: token \d+ is .* there and .* in the tokenizer"):
        tokenizer_metadata(directory, 720)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "found"),
    [
        (normalizers.Lowercase(), None, "a step Lowercase"),
        (None, pre_tokenizers.Whitespace(), "a step Whitespace"),
        (None, None, "does not turn spaces into ▁"),
    ],
)
def test_other_steps_are_refused(normalizer: Any, pre_tokenizer: Any, found: str, tmp_path: Path) -> None:
    tokenizer = converted(
        sentencepiece_model(tmp_path / "model"), normalizer=normalizer, pre_tokenizer=pre_tokenizer
    )
    with pytest.raises(ModelError, match=found):
        tokenizer_metadata(saved(tokenizer, tmp_path / "converted"), 720)


@needs_llamacpp
@pytest.mark.parametrize("character", ["\x07", "\x00"])
@pytest.mark.parametrize("with_model", [True, False])
def test_a_byte_under_the_text_of_its_character_keeps_its_id(
    with_model: bool, character: str, tmp_path: Path
) -> None:
    model = sentencepiece_model(tmp_path / "model")
    tokenizer = converted(model, normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=None)
    parts = json.loads(tokenizer.to_str())
    name = f"<0x{ord(character):02X}>"
    byte = parts["model"]["vocab"].pop(name)
    parts["model"]["vocab"][character] = byte
    directory = saved(Tokenizer.from_str(json.dumps(parts)), tmp_path / "converted")
    if with_model:
        (directory / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    with loaded(tokenizer_metadata(directory, 720), tmp_path / "v.gguf") as vocabulary:
        found = vocabulary.tokenize(f"a{character}b", add_special=False, parse_special=False)
    assert found == plain_ids(load_tokenizer(directory), f"a{character}b")
    assert byte in found
    assert value(tokenizer_metadata(directory, 720), "ggml.tokens")[byte] == name


def test_a_byte_without_a_token_is_refused(tmp_path: Path) -> None:
    """llama.cpp aborts the whole program when it meets such a byte."""
    model = sentencepiece_model(tmp_path / "model")
    tokenizer = converted(model, normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=None)
    parts = json.loads(tokenizer.to_str())
    parts["model"]["vocab"]["ÿ"] = parts["model"]["vocab"].pop("<0xFF>")
    directory = saved(Tokenizer.from_str(json.dumps(parts)), tmp_path / "converted")
    with pytest.raises(ModelError, match="1 of the 256 byte tokens are missing, <0xFF> for one"):
        tokenizer_metadata(directory, 720)


def test_merges_that_scores_cannot_tell_are_refused(tmp_path: Path) -> None:
    """SentencePiece merges whatever makes a token; here only every other token has a merge."""
    model = sentencepiece_model(tmp_path / "model")
    tokenizer = converted(model, normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=None)
    parts = json.loads(tokenizer.to_str())
    parts["model"]["merges"] = parts["model"]["merges"][::2]
    directory = saved(Tokenizer.from_str(json.dumps(parts)), tmp_path / "converted")
    with pytest.raises(ModelError, match=r"joined by score .* words get other tokens"):
        tokenizer_metadata(directory, 720)


def test_a_split_at_spaces_is_refused_where_a_token_holds_one(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "model")
    metaspace = pre_tokenizers.Metaspace(split=True)
    directory = saved(converted(model, normalizer=None, pre_tokenizer=metaspace), tmp_path / "converted")
    with pytest.raises(ModelError, match="splits texts at spaces but has the token '▁▁"):
        tokenizer_metadata(directory, 720)


def test_a_pre_tokenizer_by_name_is_refused(tmp_path: Path) -> None:
    directory = sentencepiece_model(tmp_path)
    with pytest.raises(ConfigError, match="SentencePiece tokenizer, which needs none; leave the flag out"):
        tokenizer_metadata(directory, 720, pre="llama-bpe")


def test_tokens_are_joined_best_score_first_then_leftmost() -> None:
    scores = {"aa": -1.0, "ab": -2.0, "aab": -3.0}
    assert joined("aaab", scores) == ["aa", "ab"]
    assert joined("aaa", scores) == ["aa", "a"]
    assert joined("aab", scores) == ["aab"]
    assert joined("", scores) == []
