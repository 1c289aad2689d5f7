"""Hyper-parameters and general entries; that they suffice is shown in test_runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFValueType
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exlq.errors import ModelError
from exlq.formats.gguf.metadata import completed, general, head_dim, hyper_parameters
from exlq.formats.gguf.values import KeyValue
from exlq.models.families import FAMILIES
from exlq.types import GgufFamily
from tests.conftest import TinyMaker
from tests.formats.gguf.exported import family_of, opened, raw_config
from tests.helpers import SETTINGS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
GEMMA2 = {
    **SIZES,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}


def said(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Values by the rest of their key."""
    entries = hyper_parameters(config, GgufFamily(architecture))
    assert all(entry.key.startswith(f"{architecture}.") for entry in entries)
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key.removeprefix(f"{architecture}."): entry.value for entry in entries}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_and_the_completed_config_say_the_same(family: str, tiny: TinyMaker) -> None:
    directory = tiny(family, family != "qwen2_moe")  # which llama.cpp wants with a head of its own
    model = opened(directory)
    raw = hyper_parameters(raw_config(directory), family_of(model))
    assert raw == hyper_parameters(model.config.to_dict(), family_of(model))


def test_a_llama_s_entries_are_those_the_gguf_package_would_write() -> None:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_block_count(6)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_vocab_size(272)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(1e6)
    expected = [KeyValue(key, value.value, value.type) for key, value in writer.kv_data[0].items()][1:]
    assert hyper_parameters({**SIZES, "rope_theta": 1e6}, GgufFamily("llama")) == expected


def test_gemma2_says_its_caps_and_window() -> None:
    found = said(GEMMA2, "gemma2")
    assert found["attn_logit_softcapping"] == 50.0
    assert found["final_logit_softcapping"] == 30.0
    assert found["attention.sliding_window"] == 8
    assert "attention.sliding_window_pattern" not in found
    assert found["attention.key_length"] == found["attention.value_length"] == 16


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({}, None),
        ({"sliding_window_pattern": 6}, None),
        ({"sliding_window_pattern": 3}, 3),
        ({"layer_types": [*["sliding_attention"] * 5, "full_attention"]}, None),
        ({"layer_types": ["sliding_attention"] * 6}, 7),
        ({"layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2}, 3),
    ],
)
def test_gemma3_says_which_blocks_have_a_window(settings: dict[str, Any], pattern: int | None) -> None:
    found = said({**GEMMA3, **settings}, "gemma3")
    assert found["attention.sliding_window"] == 8
    assert found.get("attention.sliding_window_pattern") == pattern
    assert found["rope.freq_base_swa"] == 10000.0
    assert not any("query" in key or "attn_logit" in key for key in found)


@pytest.mark.parametrize("settings", [{"sliding_window_pattern": 1}, {"layer_types": ["full_attention"] * 6}])
def test_a_gemma3_without_local_blocks_has_no_window(settings: dict[str, Any]) -> None:
    assert not any("window" in key for key in said({**GEMMA3, **settings}, "gemma3"))


def test_mistral_s_and_qwen_s_windows_are_left_out_as_llama_cpp_has_none() -> None:
    for architecture in ("llama", "qwen2"):
        assert not any("window" in key for key in said({**SIZES, "sliding_window": 8}, architecture))


def test_phi3_always_says_its_window_and_original_length() -> None:
    found = said(SIZES, "phi3")
    assert found["attention.sliding_window"] == 0
    assert found["rope.scaling.original_context_length"] == 128
    assert said({**SIZES, "sliding_window": 99}, "phi3")["attention.sliding_window"] == 99


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_filled_in_is_what_transformers_fills_in(family: str) -> None:
    model_type = SETTINGS[family][0]
    known = CONFIG_MAPPING[model_type]()
    for key, value in completed({"model_type": model_type}).items():
        if key == "rope_theta":
            assert known.rope_parameters["full_attention"][key] == value
        elif key != "vocab_size":
            assert getattr(known, key) == value


def test_a_27b_is_scaled_by_hidden_size_over_heads() -> None:
    large = {**GEMMA2, "num_hidden_layers": 46, "hidden_size": 128, "query_pre_attn_scalar": 32}
    said(large, "gemma2")
    with pytest.raises(ModelError, match=r"by 1/√32, config\.json by 1/√16"):
        said({**large, "query_pre_attn_scalar": 16}, "gemma2")


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {**SIZES, "hidden_size": None}, "hidden_size = None; a number was wanted"),
        ("llama", {**SIZES, "hidden_act": "gelu"}, r"computes silu, config\.json gelu"),
        ("gemma", {**SIZES, "tie_word_embeddings": False}, "no head of its own"),
        ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 64}, r"1/√16, config\.json by 1/√64"),
        ("gemma3", {**GEMMA3, "query_pre_attn_scalar": 64}, r"1/√16, config\.json by 1/√64"),
        ("gemma2", {**GEMMA2, "final_logit_softcapping": None}, "always caps"),
        ("gemma3", {**GEMMA3, "attn_logit_softcapping": 50.0}, "no attn_logit_softcapping"),
        ("llama", {**SIZES, "final_logit_softcapping": 50.0}, "no final_logit_softcapping"),
        ("gemma3", {**GEMMA3, "use_bidirectional_attention": True}, "to all"),
        ("gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 6}, "every n-th block"),
        (
            "gemma3",
            {**GEMMA3, "layer_types": [*["full_attention"] * 2, *["sliding_attention"] * 4]},
            "every n-th block",
        ),
        ("phi3", {**SIZES, "head_dim": 32}, "heads of 16 channels"),
        ("llama", {**SIZES, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    architecture: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        said(config, architecture)


CARD = """---
license: apache-2.0
language: [en, de]
tags: [chat]
base_model: org/Base-7B
model_name: A Fine Model
---
text
"""


def general_of(directory: Path, name: str = "Some-Model-8B-Instruct") -> dict[str, Any]:
    extra = [KeyValue("exlq.version", "1", GGUFValueType.STRING)]
    entries = general(directory, name, "llama", 8_030_000_000, 15, extra)
    assert entries[-1:] == extra
    return {entry.key: entry.value for entry in entries}


def test_a_model_without_a_card_is_described_by_its_name(tmp_path: Path) -> None:
    found = general_of(tmp_path)
    assert list(found)[:2] == ["general.architecture", "general.type"]
    assert found["general.architecture"] == "llama"
    assert found["general.type"] == "model"
    assert found["general.name"] == "Some Model 8B Instruct"
    assert found["general.basename"] == "Some-Model"
    assert found["general.finetune"] == "Instruct"
    assert found["general.size_label"] == "8B"
    assert found["general.file_type"] == 15
    assert found["general.quantization_version"] == 2


def test_the_size_is_counted_where_the_name_does_not_tell_it(tmp_path: Path) -> None:
    assert general_of(tmp_path, "thing")["general.size_label"] == "8.0B"


def test_the_card_s_entries_are_carried_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    entries = general(tmp_path, "x", "llama", 10**9, 0)
    found = {entry.key: entry for entry in entries}
    assert found["general.name"].value == "A Fine Model"
    assert found["general.license"].value == "apache-2.0"
    assert found["general.languages"] == KeyValue(
        "general.languages", ["en", "de"], GGUFValueType.ARRAY, GGUFValueType.STRING
    )
    assert found["general.base_model.0.name"].value == "Base 7B"
    assert found["general.sampling.temp"].value == 0.6
    assert found["general.file_type"].value == 0  # F32, which is no reason to leave it out


def test_nothing_of_the_machine_gets_in(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        directory = tmp_path / folder
        directory.mkdir()
        (directory / "README.md").write_text(
            f"---\nlicense_link: {directory}/LICENSE\nauthor: ~/me\n---\n", encoding="utf-8"
        )
        (directory / "config.json").write_text(json.dumps({"_name_or_path": f"{folder}/model"}))
    first, second = general_of(tmp_path / "one"), general_of(tmp_path / "two")
    assert first == second
    assert not any(str(tmp_path) in str(value) or "~" in str(value) for value in first.values())


def test_a_card_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\na: [\n---\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"README\.md or generation_config\.json cannot be used") as refused:
        general_of(tmp_path)
    assert "\n" not in str(refused.value)


def test_heads_are_as_wide_as_hidden_size_allows_unless_config_json_says_so() -> None:
    assert head_dim(SIZES) == 16
    assert head_dim({**SIZES, "head_dim": 32}) == 32
    assert head_dim(completed({**SIZES, "model_type": "qwen3"})) == 128
