"""The shapes read from config.json are those of the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exlq.errors import ModelError
from exlq.formats.gguf.tensors import file_tensors
from exlq.models.families import FAMILIES
from exlq.models.layout import layout_of
from exlq.models.skeleton import build_skeleton
from exlq.sizing.shapes import DEFAULTS, ModelShape, read_shape, shape_of
from tests.helpers import SETTINGS, SIZES

BIASED = {"attention_bias": True, "mlp_bias": True}
EVERY = [(family, tied) for family in SETTINGS for tied in (False, True)]
ALWAYS_TIED = (("gemma", False), ("gemma2", False))  # llama.cpp has no head of its own for them
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 16}


class Shapes:
    """A layout as weights that have no data."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]


def config_of(family: str, tied: bool, **changes: Any) -> Any:
    model_type, extra = SETTINGS[family]
    return CONFIG_MAPPING[model_type](**{**SIZES, **extra, "tie_word_embeddings": tied, **changes})


def shape_and_layout(family: str, tied: bool, **changes: Any) -> tuple[ModelShape, Any, Any]:
    config = config_of(family, tied, **changes)
    skeleton = build_skeleton(config, FAMILIES[family], torch.device("cpu"))
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)), FAMILIES[family])
    return shape, layout_of(skeleton, config, FAMILIES[family]), config


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize(("family", "tied"), EVERY)
def test_linears_and_vectors_are_those_of_transformers(
    family: str, tied: bool, changes: dict[str, Any]
) -> None:
    shape, layout, _ = shape_and_layout(family, tied, **changes)
    assert shape.linears == tuple(linear.spec for block in layout.blocks for linear in block)
    linears = {f"{spec.key}.weight" for spec in (*shape.linears, shape.head, shape.embedding)}
    vectors = {name: tuple(size) for name, size in layout.wanted.items() if name not in linears}
    assert {tensor.name: tensor.shape for tensor in shape.vectors} == vectors
    assert shape.tied is tied


@pytest.mark.parametrize(("family", "tied"), [case for case in EVERY if case not in ALWAYS_TIED])
def test_the_tensors_of_a_gguf_file_are_those_that_are_written(family: str, tied: bool) -> None:
    shape, layout, config = shape_and_layout(family, tied)
    ties = {linear.spec.key: linear.tie for block in layout.blocks for linear in block if linear.tie}
    gguf = FAMILIES[family].gguf
    assert gguf is not None
    entries = file_tensors(Shapes(dict(layout.wanted)), config.to_dict(), gguf, ties, tied)  # type: ignore[arg-type]
    assert {tensor.name: tensor.shape for tensor in shape.file_tensors} == {e.name: e.shape for e in entries}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
    ],
)
def test_what_scales_positions_is_counted(family: str, scaling: dict[str, Any]) -> None:
    scaling = {**scaling, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    changes = {"rope_parameters": scaling, "original_max_position_embeddings": 64}
    shape, layout, config = shape_and_layout(family, False, **changes)
    ties = {linear.spec.key: linear.tie for block in layout.blocks for linear in block if linear.tie}
    gguf = FAMILIES[family].gguf
    assert gguf is not None
    entries = file_tensors(Shapes(dict(layout.wanted)), config.to_dict(), gguf, ties, False)  # type: ignore[arg-type]
    computed = {entry.name: entry.shape for entry in entries if entry.value is not None}
    assert {tensor.name: tensor.shape for tensor in shape.rope_tensors} == computed != {}


@pytest.mark.parametrize("family", SETTINGS)
def test_what_config_json_leaves_out_is_what_transformers_assumes(family: str) -> None:
    model_type = SETTINGS[family][0]
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assumed = CONFIG_MAPPING[model_type](**{**sizes, "num_attention_heads": 32})
    for key, value in DEFAULTS.get(model_type, {}).items():
        if key not in sizes:
            assert getattr(assumed, key) == value, key
    raw = {**sizes, "num_attention_heads": 32, "hidden_size": 64, "model_type": model_type}
    shape = shape_of(raw, FAMILIES[family])
    assert shape.tied == assumed.tie_word_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(assumed)
    keys = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name and "weight" in name)
    counted = sum(spec.numel for spec in shape.linears if "self_attn" in spec.key)
    counted += sum(tensor.numel for tensor in shape.vectors if "self_attn.q_norm" in tensor.name) * 2
    assert counted == keys


# Of the model cards, which count every parameter.
WITH_EXPERTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "mixtral",
        46_702_792_704,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000},
    ),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        14_315_784_192,
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        30_532_122_624,
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_published_models_with_experts_have_as_many_parameters_as_their_cards_say(name: str) -> None:
    family, wanted, config = WITH_EXPERTS[name]
    common = {"num_attention_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768}
    raw = {**common, **config, "model_type": FAMILIES[family].model_type}
    shape = shape_of(raw, FAMILIES[family])
    matrices = shape.numel + shape.embedding.numel + shape.head.numel
    assert matrices + sum(vector.numel for vector in shape.vectors) == wanted


def test_windows_are_counted_where_the_runtimes_have_them() -> None:
    shape = shape_of({**config_of("gemma3", True).to_dict()}, FAMILIES["gemma3"])
    assert (shape.n_windowed, shape.window) == (1, 8)
    plain = {**SIZES, "num_hidden_layers": 12, "head_dim": 16, "sliding_window": 8}
    assert shape_of(plain, FAMILIES["gemma2"]).n_windowed == 6
    assert shape_of(plain, FAMILIES["gemma3"]).n_windowed == 10
    assert shape_of(plain, FAMILIES["mistral"]).n_windowed == 0


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert read_shape(tmp_path).n_blocks == 2


@pytest.mark.parametrize("value", [None, "64", 0, True])
def test_a_number_that_is_missing_is_named(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": value}), encoding="utf-8")
    with pytest.raises(ModelError, match="hidden_size"):
        read_shape(tmp_path)
