"""Faults that attacks have found, each by its name."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq import calibration
from exlq.checkpoint.open import open_checkpoint
from exlq.errors import FormatError, InputError, ModelError, panics_as_errors
from exlq.formats.gguf.reader import GgufFile
from exlq.inspect import inspect
from exlq.models.config import family_of
from exlq.models.open import open_model
from tests.fuzz.valid import Valid
from tests.helpers import edit_config


@pytest.fixture
def model(valid: Valid, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid.model, tmp_path / "model"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"head_dim": 10**10},
        {"hidden_size": 2**62},
        {"vocab_size": -1},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "llama3", "factor": 1e300}},
        {"rms_norm_eps": 1e300},
        {"sliding_window": "wide"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": ["a\nb\x1b[31m"]},
    ],
)
def test_settings_that_no_model_has_are_refused_before_a_model_is_made(
    model: Path, settings: dict[str, Any]
) -> None:
    edit_config(model, **settings)
    with pytest.raises(ModelError) as caught:
        family_of(model)
    assert str(caught.value).isprintable()


def test_code_beside_a_model_is_never_run(model: Path) -> None:
    trap = model / "trap"
    code = f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (model / f"{name}.py").write_text(code)
    edit_config(
        model, auto_map={"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    )
    path = model / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_x.Tokenizer", "tokenization_x.Tokenizer"]}
    path.write_text(json.dumps(tokenizer))
    for use in (
        lambda: open_model(model, open_checkpoint(model), device=torch.device("cpu")),
        lambda: calibration.load_tokenizer(model),
        lambda: inspect(model),
    ):
        with suppress(InputError):
            use()
    assert not trap.exists()


@pytest.mark.parametrize("largest", [2**24, 2**31, 2**32 - 1])
def test_a_token_whose_id_would_fill_memory_is_refused(model: Path, largest: int) -> None:
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["model"]["vocab"]["a"] = largest
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"a token of id {largest}"):
        calibration.load_tokenizer(model)


def test_a_panic_of_a_library_in_rust_is_an_error_like_others(model: Path, capfd: Any) -> None:
    """The template of this tokenizer names a token that it does not define."""
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ModelError, match="the tokenizer fails on text"):
        calibration.bos_id(calibration.load_tokenizer(model))
    capfd.readouterr()


def test_an_interrupt_is_not_taken_for_a_panic() -> None:
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt


@pytest.mark.parametrize("counts", [(1 << 18, 0), (0, 1 << 17)])
def test_a_gguf_file_of_more_tensors_or_entries_than_any_model_has_is_refused(
    tmp_path: Path, counts: tuple[int, int]
) -> None:
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        file.truncate(20_000_000)
    with pytest.raises(FormatError, match="more than any model has"):
        GgufFile(path)


def test_a_gguf_header_beyond_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a")
        file.write(struct.pack("<IIQ", 9, 0, 1 << 30))
        file.truncate((1 << 30) + 1000)
    with pytest.raises(FormatError, match="ends beyond"):
        GgufFile(path)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"outputs": {"gguf": {}}},
        {"outputs": []},
        {"outputs": {}},
        {"seconds": {"a": "b"}},
    ],
)
def test_a_summary_that_lacks_or_changes_a_part_is_refused(
    valid: Valid, tmp_path: Path, change: dict[str, Any]
) -> None:
    summary = json.loads((valid.directory / "job" / "summary.json").read_text(encoding="utf-8"))
    (tmp_path / "summary.json").write_text(json.dumps({**summary, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=r"summary\.json is broken"):
        inspect(tmp_path)
