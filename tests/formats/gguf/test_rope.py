"""Rotary embeddings: the two forms of config.json, and frequencies against transformers'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gguf import GGUFValueType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exlq.errors import ModelError
from exlq.formats.gguf.rope import Rope, read_rope, rope_metadata, rope_tensors

LENGTH = {"max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0]}


def said(rope: Rope, architecture: str = "llama", head_dim: int = 64) -> dict[str, Any]:
    """Entries by the rest of their key."""
    entries = rope_metadata(rope, architecture, head_dim)
    return {entry.key.removeprefix(f"{architecture}.rope."): entry.value for entry in entries}


@pytest.mark.parametrize("scaling", [{}, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_both_forms_of_config_json_say_the_same(scaling: dict[str, Any]) -> None:
    older = {key if key != "rope_type" else "type": value for key, value in scaling.items()}
    four = read_rope({**LENGTH, "rope_theta": 5e5, "rope_scaling": older or None})
    five = read_rope({**LENGTH, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, **scaling}})
    assert four.kind == five.kind
    assert said(four) == said(five)
    assert four.base == 5e5
    assert four.original_length == scaling.get("original_max_position_embeddings", 4096)
    for name, value in rope_tensors(four, "llama", 64).items():
        assert torch.equal(value, rope_tensors(five, "llama", 64)[name])


def test_the_base_of_local_blocks_is_read_in_both_forms() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    four = {**LENGTH, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear}
    nested = {
        "full_attention": {"rope_theta": 1e6, **linear},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    expected = {
        "dimension_count": 64,
        "freq_base": 1e6,
        "freq_base_swa": 1e4,
        "scaling.type": "linear",
        "scaling.factor": 8.0,
    }
    for config in (four, {**LENGTH, "rope_parameters": nested}):
        assert said(read_rope(config), "gemma3") == expected


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("original", [64, 512, 4096])
def test_llama3_factors_are_transformers_s(base: float, original: int) -> None:
    parameters = {**LLAMA3, "rope_theta": base, "original_max_position_embeddings": original}
    config = CONFIG_MAPPING["llama"](**LENGTH, head_dim=64, rope_parameters=dict(parameters))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = base ** -(torch.arange(0, 64, 2) / 64)
    rope = read_rope({**LENGTH, "rope_parameters": parameters})
    (factors,) = rope_tensors(rope, "llama", 64).values()
    torch.testing.assert_close(plain / factors, scaled, rtol=2e-6, atol=0)
    assert said(rope) == {"dimension_count": 64, "freq_base": base}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_factor": 1.4},
        {"mscale": 0.7, "mscale_all_dim": 0.3},
        {"factor": None},
        {"factor": 0.5},
    ],
)
def test_yarn_s_magnitude_comes_out_as_in_transformers(settings: dict[str, Any]) -> None:
    """llama.cpp scales by attn_factor × (1 + 0.1 ln factor), which is 1 for no growth."""
    parameters = {**YARN, "rope_theta": 1e4, **settings}
    config = CONFIG_MAPPING["llama"](**LENGTH, head_dim=64)
    config.rope_parameters = dict(parameters)  # past the check of what this library calls valid
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    entries = said(read_rope({**LENGTH, "rope_parameters": parameters}))
    own = 1 + 0.1 * math.log(max(entries["scaling.factor"], 1))
    assert entries.get("scaling.attn_factor", 1.0) * own == pytest.approx(wanted, rel=1e-6)
    assert entries["scaling.original_context_length"] == 1024


@pytest.mark.parametrize("settings", [{}, {"attention_factor": 1.3}, {"factor": 2.0}])
def test_longrope_s_magnitude_and_factors_are_transformers_s(settings: dict[str, Any]) -> None:
    parameters = {**LONG, "rope_theta": 1e4, **settings}
    config = CONFIG_MAPPING["llama"](**LENGTH, head_dim=4)
    config.rope_parameters = {**parameters, "original_max_position_embeddings": 512}
    _, wanted = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    rope = read_rope({**LENGTH, "original_max_position_embeddings": 512, "rope_scaling": parameters})
    entries = said(rope, "phi3", 4)
    assert entries["scaling.type"] == "longrope"
    assert entries["scaling.attn_factor"] == pytest.approx(wanted, rel=1e-6)
    assert "scaling.factor" not in entries
    tensors = rope_tensors(rope, "phi3", 4)
    assert tensors["rope_factors_long.weight"].tolist() == [2.0, 8.0]
    assert tensors["rope_factors_short.weight"].tolist() == [1.0, 1.5]


def test_the_older_name_of_longrope_is_known() -> None:
    rope = read_rope({**LENGTH, "rope_scaling": {**LONG, "rope_type": None, "type": "su"}})
    assert said(rope, "phi3", 4)["scaling.type"] == "longrope"


def test_a_part_of_the_channels_is_rotated_where_config_json_says_so() -> None:
    for config in (
        {**LENGTH, "partial_rotary_factor": 0.75},
        {**LENGTH, "rope_parameters": {"partial_rotary_factor": 0.75}},
    ):
        assert said(read_rope(config), "phi3", 128)["dimension_count"] == 96


def test_values_have_the_types_llama_cpp_reads() -> None:
    types = {
        entry.key: entry.type
        for entry in rope_metadata(read_rope({**LENGTH, "rope_scaling": YARN}), "llama", 8)
    }
    assert types == {
        "llama.rope.dimension_count": GGUFValueType.UINT32,
        "llama.rope.freq_base": GGUFValueType.FLOAT32,
        "llama.rope.scaling.type": GGUFValueType.STRING,
        "llama.rope.scaling.factor": GGUFValueType.FLOAT32,
        "llama.rope.scaling.original_context_length": GGUFValueType.UINT32,
    }


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' cannot be said"),
        ("qwen2", {"rope_scaling": LLAMA3}, "no 'llama3' rope scaling for the architecture qwen2"),
        ("llama", {"rope_scaling": LONG}, "no 'longrope' rope scaling for the architecture llama"),
        ("gemma3", {"rope_scaling": YARN}, "no 'yarn' rope scaling for the architecture gemma3"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates whole heads for llama"),
        ("qwen3", {"rope_local_base_freq": 7.0}, "one rope base for qwen3"),
        ("llama", {"rope_scaling": {**YARN, "truncate": False}}, "truncate = True"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast = 32, config.json says 16"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [1.0]}}, "has 1 factors in config.json, 2"),
        ("phi3", {"rope_scaling": {**LONG, "short_factor": None}}, "without a list short_factor"),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 8}},
            "without low_freq_factor, high_freq_factor",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear"}}},
            "the sliding blocks scale positions",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    architecture: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        rope_tensors(read_rope({**LENGTH, **config}), architecture, 4)
