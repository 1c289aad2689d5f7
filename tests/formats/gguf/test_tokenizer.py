"""llama.cpp, given our metadata, makes the tokens transformers makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from exlq.calibration.tokenizer import load_tokenizer
from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp import available
from exlq.formats.gguf.tokenizer import known_pre_names, tokenizer_metadata
from exlq.formats.gguf.values import KeyValue
from tests.formats.gguf.tokenizer_models import STRESS, loaded, save, split, trained, write
from tests.helpers import make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
TINY_LLAMA = REPOSITORY / "tests" / "assets" / "tiny-llama"
WIKI = REPOSITORY.parent / "shared" / "models" / "wiki-18m"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")

needs_llamacpp = pytest.mark.skipif(not available(), reason="llama.cpp (xllamacpp) is not installed")


def value(entries: list[KeyValue], name: str) -> Any:
    """What an entry holds, None if it is not there."""
    return next((entry.value for entry in entries if entry.key == f"tokenizer.{name}"), None)


def spelled(directory: Path) -> str:
    """The stress text with special tokens written out in it."""
    tokenizer = load_tokenizer(directory)
    special = [token for token in tokenizer.get_added_vocab() if token not in ("<unk>", "<pad>")]
    return STRESS + "".join(f"{token}x {token}\n" for token in special)


def assert_same_ids(directory: Path, entries: list[KeyValue], path: Path) -> None:
    tokenizer, text = load_tokenizer(directory), spelled(directory)
    with loaded(entries, path) as vocabulary:
        for parse_special in (False, True):
            expected = tokenizer(text, split_special_tokens=not parse_special, verbose=False)["input_ids"]
            found = vocabulary.tokenize(text, add_special=True, parse_special=parse_special)
            assert found == expected, f"parse_special={parse_special}"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return save(trained([pre_tokenizers.ByteLevel(add_prefix_space=False)]), tmp_path / "gpt2")


@needs_llamacpp
@pytest.mark.parametrize(
    ("directory", "vocab_size"), [(TINY_LLAMA, 2048), (WIKI, 4096)], ids=["tiny", "wiki"]
)
def test_a_model_of_ours_keeps_its_ids(directory: Path, vocab_size: int, tmp_path: Path) -> None:
    if not directory.is_dir():
        pytest.skip(f"{directory.name} is not there")
    entries = tokenizer_metadata(directory, vocab_size)
    assert value(entries, "ggml.pre") == "smaug-bpe"  # the pattern of Llama 3, which minds the merges
    assert_same_ids(directory, entries, tmp_path / "v.gguf")


@needs_llamacpp
def test_a_tokenizer_without_merges_keeps_its_ids(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    entries = tokenizer_metadata(tmp_path, 272)
    assert value(entries, "ggml.pre") == "gpt-2"
    assert len(value(entries, "ggml.tokens")) == 272
    assert_same_ids(tmp_path, entries, tmp_path / "v.gguf")


@needs_llamacpp
@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(LLAMA3, True, "llama-bpe"), (LLAMA3, False, "smaug-bpe"), (QWEN2, False, "qwen2")],
)
def test_a_trained_tokenizer_keeps_its_ids(
    pattern: str, ignore_merges: bool, name: str, tmp_path: Path
) -> None:
    tokenizer = trained(split(pattern), ignore_merges=ignore_merges, normalizer=normalizers.NFC())
    directory = save(tokenizer, tmp_path / "model")
    entries = tokenizer_metadata(directory, 640)
    assert value(entries, "ggml.pre") == name
    assert_same_ids(directory, entries, tmp_path / "v.gguf")


@needs_llamacpp
def test_a_word_in_the_vocabulary_that_no_merge_makes_needs_a_name_that_ignores_merges(
    tmp_path: Path,
) -> None:
    parts = json.loads(trained(split(LLAMA3), ignore_merges=True).to_str())
    parts["model"]["merges"] = parts["model"]["merges"][:150]
    directory = save(Tokenizer.from_str(json.dumps(parts)), tmp_path / "model")
    entries = tokenizer_metadata(directory, 640)
    assert_same_ids(directory, entries, tmp_path / "v.gguf")
    wrong = tokenizer_metadata(directory, 640, pre="smaug-bpe")
    with pytest.raises(AssertionError):
        assert_same_ids(directory, wrong, tmp_path / "w.gguf")


@needs_llamacpp
def test_a_tokenizer_that_adds_eos_and_no_bos_keeps_its_ids(tmp_path: Path) -> None:
    tokenizer = trained(split(LLAMA3), ignore_merges=True)  # llama-bpe adds BOS unless told otherwise
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 1)]
    )
    directory = save(tokenizer, tmp_path / "model")
    entries = tokenizer_metadata(directory, 640)
    assert value(entries, "ggml.add_bos_token") is False
    assert value(entries, "ggml.add_eos_token") is True
    assert_same_ids(directory, entries, tmp_path / "v.gguf")


def test_the_package_gguf_reads_what_was_meant(gpt2: Path, tmp_path: Path) -> None:
    entries = tokenizer_metadata(gpt2, 640)
    write(entries, tmp_path / "v.gguf")
    fields = GGUFReader(tmp_path / "v.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    backend = json.loads((gpt2 / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert all(tokens[token_id] == text for text, token_id in backend["model"]["vocab"].items())
    assert tokens[-1] == "[PAD639]"
    assert types[-1] == 5
    assert types[:3] == [3, 3, 3]  # control
    assert types[tokens.index("<plain>")] == 4  # user defined
    assert types[3] == 1
    merges = [" ".join(pair) for pair in backend["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_chat_templates_go_along_by_name(gpt2: Path) -> None:
    assert value(tokenizer_metadata(gpt2, 640), "chat_template") is None
    (gpt2 / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert value(tokenizer_metadata(gpt2, 640), "chat_template") == "{{ messages }}"
    (gpt2 / "additional_chat_templates").mkdir()
    (gpt2 / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}", encoding="utf-8")
    entries = tokenizer_metadata(gpt2, 640)
    assert value(entries, "chat_template") == "{{ messages }}"
    assert value(entries, "chat_template.tool_use") == "{{ tools }}"
    assert value(entries, "chat_templates") == ["tool_use"]


def test_ids_come_from_the_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    tokenizer = trained(split(QWEN2))
    tokenizer.post_processor = processors.ByteLevel()
    directory = save(tokenizer, tmp_path / "model", bos_token=None, eos_token=None)
    with pytest.raises(ModelError, match="no end-of-text token among 640; name it as eos_token"):
        tokenizer_metadata(directory, 640)
    ids = {"eos_token_id": [1, 2], "bos_token_id": 5000, "pad_token_id": 2}
    (directory / "config.json").write_text(json.dumps(ids), encoding="utf-8")
    entries = tokenizer_metadata(directory, 640)
    assert value(entries, "ggml.eos_token_id") == 1
    assert value(entries, "ggml.bos_token_id") == 1  # 5000 is no token; llama.cpp would take id 11
    assert value(entries, "ggml.padding_token_id") == 2
    assert value(entries, "ggml.add_bos_token") is False
    assert value(entries, "ggml.unknown_token_id") is None
    (directory / "config.json").write_text('{"eos_token_id": 1, "eos_token_id": 2}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"not readable as JSON .*'eos_token_id' is given twice"):
        tokenizer_metadata(directory, 640)


def test_added_tokens_the_model_has_no_embedding_for_are_left_out(gpt2: Path) -> None:
    plain = load_tokenizer(gpt2).get_added_vocab()["<plain>"]
    entries = tokenizer_metadata(gpt2, plain)
    assert "<plain>" not in value(entries, "ggml.tokens")
    with pytest.raises(ModelError, match=f"token {plain - 1} .* config.json has vocab_size {plain - 1}"):
        tokenizer_metadata(gpt2, plain - 1)


def test_a_name_given_wins_over_what_would_be_found(gpt2: Path) -> None:
    assert value(tokenizer_metadata(gpt2, 640), "ggml.pre") == "gpt-2"
    assert value(tokenizer_metadata(gpt2, 640, pre="qwen2"), "ggml.pre") == "qwen2"


def test_an_unknown_name_is_refused_with_those_near_it(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer-pre qwen3: .*did you mean qwen35, qwen2"):
        tokenizer_metadata(gpt2, 640, pre="qwen3")
    assert {"gpt-2", "llama-bpe", "qwen2", "tekken"} <= set(known_pre_names())


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (split(r"\w+|\W+"), r"Split\(pattern=\{'Regex'.*--tokenizer-pre NAME"),
        ([pre_tokenizers.WhitespaceSplit(), *split(LLAMA3)], "WhitespaceSplit"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "puts a space in front"),
    ],
    ids=["pattern", "step", "prefix"],
)
def test_a_pre_tokenizer_llama_cpp_lacks_is_refused(steps: list[Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=found) as refused:
        tokenizer_metadata(save(trained(steps), tmp_path), 640)
    assert "\n" not in str(refused.value)


def test_a_pre_tokenizer_llama_cpp_only_nears_is_named_but_not_taken(tmp_path: Path) -> None:
    start, marks = r"[^\r\n\p{L}\p{N}]?", r"\p{Lm}\p{Lo}\p{M}"
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}{marks}]", rf"[\p{{Ll}}{marks}]"
    tail = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tekken = f"{start}{upper}*{lower}+|{start}{upper}+{lower}*{tail}"
    directory = save(trained(split(tekken), ignore_merges=True), tmp_path)
    with pytest.raises(ModelError, match="--tokenizer-pre tekken is near but not equal"):
        tokenizer_metadata(directory, 640)
    assert value(tokenizer_metadata(directory, 640, pre="tekken"), "ggml.pre") == "tekken"


def test_a_normalizer_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    directory = save(trained(split(QWEN2), normalizer=normalizers.Lowercase()), tmp_path)
    with pytest.raises(ModelError, match=r"the pre-tokenizer is Lowercase\(\) \+ Split"):
        tokenizer_metadata(directory, 640)


def test_more_than_one_token_in_front_is_refused(tmp_path: Path) -> None:
    tokenizer = trained(split(QWEN2))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> <|im_start|> $A", special_tokens=[("<|bos|>", 0), ("<|im_start|>", 2)]
    )
    with pytest.raises(ModelError, match="puts 2 tokens before and 0 after a text"):
        tokenizer_metadata(save(tokenizer, tmp_path), 640)


def test_bytes_without_a_token_are_refused_only_where_they_become_unk(tmp_path: Path) -> None:
    for unk, is_refused in ((None, False), ("<|eos|>", True)):
        parts = json.loads(trained(split(QWEN2)).to_str())
        parts["model"]["vocab"].pop("ÿ")
        parts["model"]["unk_token"] = unk
        directory = save(Tokenizer.from_str(json.dumps(parts)), tmp_path / str(unk is None))
        if is_refused:
            with pytest.raises(ModelError, match="lacks the token of some byte"):
                tokenizer_metadata(directory, 640)
        else:
            tokenizer_metadata(directory, 640)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<|bos|>", 0.0), ("<|eos|>", 0.0), ("a", -1.0)], 0))
    words = Tokenizer(models.WordPiece({"<|bos|>": 0, "<|eos|>": 1, "a": 2}, unk_token="<|bos|>"))
    letters = Tokenizer(models.BPE({"<|bos|>": 0, "<|eos|>": 1, "a": 2}, []))
    for name, tokenizer, found in (
        ("u", unigram, "Unigram"),
        ("w", words, "WordPiece"),
        ("l", letters, "BPE without bytes"),
    ):
        tokenizer.decoder = decoders.ByteLevel()
        with pytest.raises(ModelError, match=f"the tokenizer is {found}, byte-level BPE or SentencePiece's"):
            tokenizer_metadata(save(tokenizer, tmp_path / name), 640)


def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tekken\.json alone was found, tokenizer\.json was wanted"):
        tokenizer_metadata(tmp_path, 640)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        tokenizer_metadata(tmp_path, 640)


def test_two_tokens_of_one_text_are_refused(gpt2: Path) -> None:
    parts = json.loads((gpt2 / "tokenizer.json").read_text(encoding="utf-8"))
    free = parts["added_tokens"].pop()["id"]  # the one that is not in the vocabulary
    parts["model"]["vocab"][f"[PAD{free + 1}]"] = free
    (gpt2 / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"tokens {free} and {free + 1} are both"):
        tokenizer_metadata(gpt2, free + 2)


def test_nothing_is_printed(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = json.loads((gpt2 / "tokenizer_config.json").read_text(encoding="utf-8"))
    (gpt2 / "tokenizer_config.json").write_text(
        json.dumps({**parts, "model_max_length": 8}), encoding="utf-8"
    )
    tokenizer_metadata(gpt2, 640)
    assert capfd.readouterr() == ("", "")
