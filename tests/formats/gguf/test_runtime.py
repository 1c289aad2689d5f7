"""F32 files run in llama.cpp give transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exlq.evaluation.llamacpp import Runtime, available
from exlq.models.families import FAMILIES
from tests.formats.gguf.exported import raw_config, write_f32
from tests.helpers import make_model
from tests.models.conftest import whole_logits

pytestmark = pytest.mark.skipif(not available(), reason="llama.cpp is not installed (package xllamacpp)")

LENGTH, CONTEXT = 48, 64
ALWAYS_TIED = ("gemma", "gemma2")
NEVER_TIED = ("qwen2_moe",)
CASES = [
    (family, tied)
    for family in FAMILIES
    for tied in (True, False)
    if family not in (NEVER_TIED if tied else ALWAYS_TIED)
]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn, own magnitude": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.4}}),
    "llama yarn, mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "mistral long window": ("mistral", {"sliding_window": None}),
    "qwen2 linear": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
    "gemma heads": ("gemma", {"head_dim": 32}),
    "gemma2 linear": ("gemma2", {"rope_parameters": LINEAR}),
    "gemma2 caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 27B": (
        "gemma2",
        {
            "num_hidden_layers": 46,
            "hidden_size": 32,
            "intermediate_size": 32,
            "query_pre_attn_scalar": 8,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 23,
        },
    ),
    "gemma3 six": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        },
    ),
    "gemma3 capped": ("gemma3", {"final_logit_softcapping": 2.0}),
    "gemma3 global": ("gemma3", {"layer_types": ["full_attention"] * 2}),
    "gemma3 local": ("gemma3", {"layer_types": ["sliding_attention"] * 2}),
    "gemma3 three": (
        "gemma3",
        {
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        },
    ),
    "gemma3 bases": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    "phi3 short": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 300, "max_position_embeddings": 512},
    ),
    "phi3 long": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    ),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(4, 272, (LENGTH,), generator=torch.Generator().manual_seed(3))


def assert_same_logits(directory: Path, path: Path, ids: Tensor) -> None:
    wanted = whole_logits(directory, ids[None])[0]
    with Runtime(path, context=CONTEXT) as runtime:
        found = runtime.logits(ids)
    difference = (found - wanted).square().mean().sqrt() / wanted.std()
    assert difference < 2e-3, f"rms difference {difference:.2e} of the spread"


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_every_family_runs_as_in_transformers(family: str, tied: bool, tmp_path: Path, ids: Tensor) -> None:
    settings: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    directory = make_model(family, tmp_path / "model", tied=tied, **settings)
    write_f32(directory, tmp_path / "model.gguf")
    assert_same_logits(directory, tmp_path / "model.gguf", ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_of_config_json_reach_the_runtime(variant: str, tmp_path: Path, ids: Tensor) -> None:
    family, settings = VARIANTS[variant]
    directory = make_model(family, tmp_path / "model", tied=family in ALWAYS_TIED, **settings)
    write_f32(directory, tmp_path / "model.gguf")
    assert_same_logits(directory, tmp_path / "model.gguf", ids)


def test_shards_run_as_the_whole(tmp_path: Path, ids: Tensor) -> None:
    directory = make_model("llama", tmp_path / "model", tied=False)
    paths = write_f32(directory, tmp_path / "model.gguf", split_bytes=60_000)
    assert len(paths) > 2
    assert_same_logits(directory, paths[0], ids)


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("llama yarn", {"rope_theta": 10000.0, "rope_scaling": {**YARN, "type": "yarn"}}),
        ("llama llama3", {"rope_theta": 10000.0, "rope_scaling": LLAMA3}),
        (
            "gemma3 bases",
            {
                "rope_theta": 5e4,
                "rope_local_base_freq": 300.0,
                "rope_scaling": {"type": "linear", "factor": 8.0},
            },
        ),
        ("phi3 long", {"rope_theta": 10000.0, "rope_scaling": {**LONG, "type": "su", "rope_type": None}}),
    ],
)
def test_config_json_of_transformers_4_gives_the_same_file(
    variant: str, form: dict[str, Any], tmp_path: Path, ids: Tensor
) -> None:
    family, settings = VARIANTS[variant]
    directory = make_model(family, tmp_path / "model", tied=False, **settings)
    older = {key: value for key, value in raw_config(directory).items() if key != "rope_parameters"}
    write_f32(directory, tmp_path / "model.gguf", config={**older, **form})
    assert_same_logits(directory, tmp_path / "model.gguf", ids)
