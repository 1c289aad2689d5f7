"""config.json for ExLlamaV2, evaluated as its reader does and compared with transformers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from exlq.errors import ModelError
from exlq.formats.exl2_config import exl2_config, require_known

FAMILIES = {
    "llama": ("LlamaForCausalLM", LlamaRotaryEmbedding),
    "mistral": ("MistralForCausalLM", MistralRotaryEmbedding),
    "qwen2": ("Qwen2ForCausalLM", Qwen2RotaryEmbedding),
    "qwen3": ("Qwen3ForCausalLM", Qwen3RotaryEmbedding),
    "gemma": ("GemmaForCausalLM", GemmaRotaryEmbedding),
    "gemma2": ("Gemma2ForCausalLM", Gemma2RotaryEmbedding),
    "phi3": ("Phi3ForCausalLM", Phi3RotaryEmbedding),
}
SERVED = 512  # max_position_embeddings
THETA = 5e4
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}
YARNS: dict[str, dict[str, Any]] = {
    "as a card tells: the length served is still the original": {"original_max_position_embeddings": SERVED},
    "extended": {"original_max_position_embeddings": 128},
    "nearly the length served": {"original_max_position_embeddings": 511},
    "attention factor given": {"original_max_position_embeddings": 128, "attention_factor": 1.3},
    "no attention factor": {"original_max_position_embeddings": 128, "attention_factor": 1.0},
    "betas given": {"original_max_position_embeddings": 128, "beta_fast": 8, "beta_slow": 2},
    "mscales given": {"original_max_position_embeddings": 128, "mscale": 1.4, "mscale_all_dim": 0.7},
    "ramp not truncated": {"original_max_position_embeddings": 128, "truncate": False},
}


def source_config(family: str, **changes: Any) -> dict[str, Any]:
    dims = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": SERVED}
    return {"model_type": family, "architectures": [FAMILIES[family][0]]} | dims | heads | ids | changes


def with_rope(family: str, form: str, kind: str, **rope: Any) -> dict[str, Any]:
    """A source config in the old form, in the one with both spellings of the kind, or in the recent one."""
    if form == "recent":
        return source_config(family, rope_parameters={"rope_type": kind, "rope_theta": THETA} | rope)
    spellings = {
        "type": {"type": kind},
        "rope_type": {"rope_type": kind},
        "both": {"type": kind, "rope_type": kind},
    }
    scaling = {"rope_scaling": spellings[form] | rope} if kind != "default" else {"rope_scaling": None}
    return source_config(family, rope_theta=THETA, **scaling)


def rewritten(source: Mapping[str, Any], architecture: str | None = None) -> dict[str, Any]:
    """As it lies on disk, JSON and back."""
    settings: dict[str, Any] = {
        "bits": 4.0,
        "head_bits": 6,
        "rows": 100,
        "length": 2048,
        "dataset": "a.parquet",
    }
    architecture = architecture or source["architectures"][0]
    config = exl2_config(source, **settings, version="0.1", architecture=architecture)
    return dict(json.loads(json.dumps(config)))


def as_exllamav2(config: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor of cos and sin, at the length served, from top-level keys alone.

    Facts of ExLlamaV2 0.3.2, config.py `prepare` and rope.py: see the docstring of exlq.formats.exl2_config.
    """
    theta = float(config.get("rope_theta", 10000))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dim = int(head_dim * config.get("partial_rotary_factor", 1.0))
    served = config["max_position_embeddings"]
    plain = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    scaling = config.get("rope_scaling") or {}
    assert not ("type" in scaling and "rope_type" in scaling), "the reader asserts this"
    kind = scaling.get("type") or scaling.get("rope_type")
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return torch.tensor([_llama3(f, scaling) for f in plain.tolist()], dtype=torch.float64), 1.0
    if kind == "yarn" and served > scaling["original_max_position_embeddings"]:
        return _yarn(plain, theta, served, scaling["factor"])
    if kind in ("su", "longrope"):
        original = config["original_max_position_embeddings"]
        if served <= original:
            return plain / torch.tensor(scaling["short_factor"], dtype=torch.float64), 1.0
        attention = math.sqrt(1 + math.log(served / original) / math.log(original))
        return plain / torch.tensor(scaling["long_factor"], dtype=torch.float64), attention
    return plain, 1.0


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return float(frequency * (kept + (1 - kept) / factor))


def _yarn(plain: Tensor, theta: float, served: int, factor: float) -> tuple[Tensor, float]:
    dim = 2 * len(plain)

    def place(turns: int) -> float:
        return dim * math.log(served / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), dim - 1)
    span = high - low if high != low else 0.001
    slowed = [min(max((i - low) / span, 0.0), 1.0) for i in range(len(plain))]
    scale = torch.tensor([1 - s + s / factor for s in slowed], dtype=torch.float64)
    return plain * scale, 0.1 * math.log(factor) + 1


def as_transformers(config: PretrainedConfig, family: str) -> tuple[Tensor, float]:
    """Of the model's own rotary embedding, after it has seen a sequence of the length served."""
    rotary = FAMILIES[family][1](config)
    rotary(torch.zeros(1, 1, 1), torch.arange(SERVED).unsqueeze(0))
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def assert_same_rope(source: dict[str, Any], family: str, directory: Path) -> dict[str, Any]:
    before = copy.deepcopy(source)
    config = rewritten(source)
    assert source == before
    (directory / "config.json").write_text(json.dumps(config))
    expected, attention = as_transformers(AutoConfig.for_model(**copy.deepcopy(source)), family)
    read_again = as_transformers(AutoConfig.from_pretrained(directory), family)
    for found, factor in (as_exllamav2(config), read_again):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        assert factor == pytest.approx(attention, rel=1e-6)
    return config


@pytest.mark.parametrize("form", ["type", "both", "recent"])
@pytest.mark.parametrize("kind", list(ROPES))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_exllamav2_and_transformers_find_the_source_s_rope(
    family: str, kind: str, form: str, tmp_path: Path
) -> None:
    config = assert_same_rope(with_rope(family, form, kind, **ROPES[kind]), family, tmp_path)

    assert config["rope_theta"] == THETA
    assert ("rope_scaling" in config) == (kind != "default")


@pytest.mark.parametrize("case", list(YARNS))
@pytest.mark.parametrize("form", ["rope_type", "recent"])
def test_every_yarn_is_found_though_exllamav2_reads_only_two_of_its_parameters(
    case: str, form: str, tmp_path: Path
) -> None:
    source = with_rope("qwen2", form, "yarn", factor=4.0, **YARNS[case])

    config = assert_same_rope(source, "qwen2", tmp_path)

    kept = case == "nearly the length served"
    assert config["rope_scaling"]["rope_type"] == ("yarn" if kept else "longrope")


@pytest.mark.parametrize("original", [128, SERVED])
@pytest.mark.parametrize("form", ["type", "recent"])
def test_phi3_keeps_its_long_and_short_factors(form: str, original: int, tmp_path: Path) -> None:
    lists = {"long_factor": [1 + i / 4 for i in range(24)], "short_factor": [1 + i / 9 for i in range(24)]}
    source = with_rope("phi3", form, "longrope", **lists)
    source |= {"original_max_position_embeddings": original, "partial_rotary_factor": 0.75}

    config = assert_same_rope(source, "phi3", tmp_path)

    assert config["original_max_position_embeddings"] == original
    assert config["partial_rotary_factor"] == 0.75
    assert {name: config["rope_scaling"][name] for name in lists} == lists


@pytest.mark.parametrize("form", ["type", "recent"])
def test_phi3_without_scaling_has_the_default_rope(form: str, tmp_path: Path) -> None:
    assert "rope_scaling" not in assert_same_rope(with_rope("phi3", form, "default"), "phi3", tmp_path)


def test_a_source_without_any_rope_key_gets_the_family_s_default(tmp_path: Path) -> None:
    assert assert_same_rope(source_config("llama"), "llama", tmp_path)["rope_theta"] == 10000.0


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_gemma2_alternates_as_transformers_has_it(layers: int) -> None:
    config = rewritten(source_config("gemma2", num_hidden_layers=layers))

    kinds = AutoConfig.for_model(**source_config("gemma2", num_hidden_layers=layers)).layer_types
    # model.py: sliding unless the layer's number, counted from one, is a multiple of the pattern
    pattern = config["sliding_window_pattern"]
    assert pattern > 1
    assert [kind == "sliding_attention" for kind in kinds] == [(i + 1) % pattern != 0 for i in range(layers)]
    assert config["sliding_window"] == 4096
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


def test_keys_left_to_transformers_defaults_are_written_out() -> None:
    source = source_config("mistral")
    del source["num_key_value_heads"]

    assert rewritten(source)["num_key_value_heads"] == 8


def test_the_quantization_and_the_data_type_are_stated_and_the_rest_is_kept() -> None:
    source = source_config("llama", dtype="bfloat16", mlp_bias=False, something={"of": "others"})
    config = rewritten(source | {"architectures": ["LlamaForCausalLM", "Other"]}, "LlamaForCausalLM")

    assert config["quantization_config"] == {
        "quant_method": "exl2",
        "version": "0.1",
        "bits": 4.0,
        "head_bits": 6,
        "calibration": {"rows": 100, "length": 2048, "dataset": "a.parquet"},
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config
    assert config["something"] == {"of": "others"}


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "OlmoForCausalLM"])
def test_an_architecture_exllamav2_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"ExLlamaV2 0\.3\.2 does not know {name} by name"):
        require_known(name)
    with pytest.raises(ModelError, match="does not know"):
        rewritten(source_config("llama"), name)


def test_yi_is_known_and_written_as_the_llama_that_transformers_runs() -> None:
    source = source_config("llama", auto_map={"AutoConfig": "configuration_yi.YiConfig"}) | {
        "model_type": "Yi"
    }

    require_known("YiForCausalLM")
    config = rewritten(source, "LlamaForCausalLM")

    assert config["model_type"] == "llama"
    assert "auto_map" not in config


def test_one_rope_given_by_layer_kind_is_that_rope_and_two_are_refused() -> None:
    one = {"rope_type": "default", "rope_theta": 7e4}
    nested = {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": one},
    }
    same = source_config("qwen3", **nested)
    same["rope_parameters"]["sliding_attention"] = dict(one)
    other = copy.deepcopy(same)
    other["rope_parameters"]["sliding_attention"]["rope_theta"] = 1e4

    assert rewritten(same)["rope_theta"] == 7e4
    with pytest.raises(ModelError, match="differ by layer kind"):
        rewritten(other)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            with_rope("llama", "recent", "proportional", factor=2.0),
            "rope_type 'proportional' has no expression",
        ),
        (with_rope("llama", "recent", "yarn", attention_factor=0.8, **ROPES["yarn"]), "attention factor 0.8"),
        (source_config("llama") | {"model_type": "nothing"}, "model_type 'nothing'"),
        (
            source_config("gemma2", layer_types=["full_attention"] * 4),
            r"full attention in layers \[0, 1, 2, 3\]",
        ),
    ],
)
def test_what_exllamav2_cannot_be_told_is_refused_in_one_line(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        rewritten(source)
    assert "\n" not in str(caught.value)


def test_a_longrope_attention_factor_exllamav2_would_not_find_is_refused() -> None:
    lists: dict[str, Any] = {"long_factor": [1.0] * 32, "short_factor": [1.0] * 32, "attention_factor": 2.0}
    source = with_rope("phi3", "recent", "longrope", **lists) | {"original_max_position_embeddings": 128}

    with pytest.raises(ModelError, match=r"attention factor 2: ExLlamaV2 0\.3\.2 derives"):
        rewritten(source)
