"""Tokenizers made on the spot, and llama.cpp's view of one written to a GGUF file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int32
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import GGUFValueType, GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from exlq.evaluation.llamacpp_api import library
from exlq.formats.gguf.values import KeyValue

# What tokenizers get wrong: runs of spaces and lines, digits, scripts, contractions, code.
STRESS = (
    "Hello  world,   this    is\ta\t\ttab\n\nand\r\nlines \n  \n   end.   "
    "3 33 333 3333 33333 1,234.56 x1y22 ½ ² ٣٤ Ⅷ "
    "I'm you'RE we'Ve they'll he'd don'T 'tis o'clock "
    "你好,世界 日本語のテキスト、カタカナ한국어 ไทยภาษา हिन्दी кириллица ΕΛΛΗΝΙΚΑ עברית العربية "
    "café naïve Ångström Straße ÉCOLE façade œuvre "
    "🚀🦙 👩‍👩‍👧‍👦 🇩🇪 ✅… —–‘’“”«» "
    "def f(x):\n    return x**2 + {'a': [1,2]}  # comment\n\tif (a&&b) { c->d += !e; }\n"
    "https://example.org/path?q=1&r=%20 CamelCaseWord snake_case_word ALLCAPS "
    "<html><b>x</b></html> \\n $5.00 50% a^b ~`| ------===== ''''```` !!!??? (a)[b]{c}\u00a0\u200b\u3000x  "
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it's gone, isn't it? we're sure they'll know.",
    "Numbers 1 12 123 1234 12345 2024 1999 3.14159 and 100,000 were counted in the year 1987.",
    "def main(args):\n    for i in range(10):\n        print(i, args[i])\n    return None\n",
    "你好世界 今天天气很好 日本語 こんにちは café naïve Привет мир, это тест. über straße",
    "HTTPServer CamelCase snake_case ALL CAPS   spaces    more     spaces\n\n\nlines\t\ttabs",
    STRESS,
] * 4
CHATML = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def trained(
    steps: Sequence[pre_tokenizers.PreTokenizer],
    *,
    ignore_merges: bool = False,
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Byte-level BPE of ~600 tokens behind the given steps, with BOS in front and a few special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<plain>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return tokenizer


def split(*patterns: str) -> list[pre_tokenizers.PreTokenizer]:
    """The patterns one after another, then bytes."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> Path:
    """A model directory with this tokenizer.json and nothing but tokenizers' files."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
    }
    settings.update({"clean_up_tokenization_spaces": False, **config})
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def sentencepiece_model(directory: Path, *, add_dummy_prefix: bool = True, **options: Any) -> Path:
    """A directory with a tokenizer.model as Llama 2 has it, trained on the corpus."""
    directory.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
        **options,
    }
    sentences = iter([line for text in CORPUS for line in text.splitlines() if line])
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=sentences, model_writer=stream, add_dummy_prefix=add_dummy_prefix, **settings
    )
    (directory / "tokenizer.model").write_bytes(stream.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_prefix_space": add_dummy_prefix,
        "legacy": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


class Vocabulary:
    """llama.cpp's tokenizer of a file that holds these entries."""

    def __init__(self, pointer: Any, call: Any) -> None:
        self._pointer, self._call = pointer, call

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8")
        found = (c_int32 * (len(raw) + 16))()
        n = self._call.llama_tokenize(
            self._pointer, raw, len(raw), found, len(found), add_special, parse_special
        )
        return list(found[:n])


@contextmanager
def loaded(entries: Sequence[KeyValue], path: Path) -> Iterator[Vocabulary]:
    """The entries written by the package gguf to `path`, and loaded by llama.cpp without any tensor."""
    write(entries, path)
    runtime = library()
    params = runtime.model_params()
    params.n_gpu_layers, params.vocab_only = 0, True
    model = runtime.call.llama_model_load_from_file(str(path).encode(), params)
    assert model, runtime.errors
    yield Vocabulary(runtime.call.llama_model_get_vocab(model), runtime.call)
    runtime.call.llama_model_free(model)


def write(entries: Sequence[KeyValue], path: Path) -> None:
    """A GGUF file of metadata alone."""
    writer = GGUFWriter(path, "llama")
    for entry in entries:
        assert (entry.element is not None) == (entry.type == GGUFValueType.ARRAY)
        writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
