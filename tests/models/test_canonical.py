"""Fused, split, renamed, tied and missing tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.errors import ModelError
from exlq.models.layout import Linear
from exlq.models.model import Model
from tests.helpers import edit_config, make_model
from tests.models.conftest import TinyMaker, opened, streamed_logits

Q = "model.layers.0.self_attn.q_proj.weight"


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Put tensors in the model's file, or drop those given as None."""
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def test_a_phi3_stored_split_is_the_phi3_stored_fused(tmp_path: Path, rows: Tensor) -> None:
    directory = make_model("phi3", tmp_path, tied=False)
    fused = opened(directory)
    wanted = streamed_logits(fused, rows)
    split: dict[str, Tensor] = {}
    for linear in _linears(fused):
        if linear.tie:
            split[f"{linear.spec.key}.weight"] = fused.linear_weight(linear.spec.key).clone()
    dropped = dict.fromkeys(f"{linear.tie}.weight" for linear in _linears(fused) if linear.tie)
    rewrite(directory, **split, **dropped)
    model = opened(directory)
    assert torch.equal(streamed_logits(model, rows), wanted)
    up = "model.layers.1.mlp.up_proj"
    assert torch.equal(model.linear_weight(up), split[f"{up}.weight"])


def _linears(model: Model) -> list[Linear]:
    return [linear for index in range(model.n_blocks) for linear in model.linears(index)]


def test_the_parts_of_a_fused_matrix_share_a_tie_and_cover_it(tiny: TinyMaker) -> None:
    model, stored = opened(tiny("phi3", False)), load_file(tiny("phi3", False) / "model.safetensors")
    for tie in ("model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"):
        parts = [model.linear_weight(item.spec.key) for item in model.linears(1) if item.tie == tie]
        assert torch.equal(torch.cat(parts), stored[f"{tie}.weight"])
    assert {item.spec.key for item in model.linears(1) if item.tie is None} == {
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    }


def test_rows_of_a_part_are_counted_from_its_own_start(tiny: TinyMaker) -> None:
    weights = opened(tiny("phi3", False)).weights
    name = "model.layers.0.self_attn.k_proj.weight"
    whole = weights.read(name)
    assert weights.shape(name) == tuple(whole.shape) == (32, 64)
    assert torch.equal(weights.read(name, slice(3, 9)), whole[3:9])
    assert torch.equal(weights.read(name, slice(-4, None)), whole[-4:])
    assert torch.equal(weights.read(name, torch.tensor([7, 0, 7])), whole[[7, 0, 7]])


def test_the_first_yi_names_for_norms_are_known(tmp_path: Path, rows: Tensor) -> None:
    directory = make_model("yi", tmp_path, tied=False)
    wanted = streamed_logits(opened(directory), rows)
    old: dict[str, Tensor | None] = {}
    for name, value in load_file(directory / "model.safetensors").items():
        renamed = name.replace("post_attention_layernorm", "ln2").replace("input_layernorm", "ln1")
        if renamed != name:
            old[renamed], old[name] = value, None
    assert len(old) == 8
    rewrite(directory, **old)
    assert torch.equal(streamed_logits(opened(directory), rows), wanted)


def test_a_head_of_its_own_goes_before_the_tied_one(tmp_path: Path, rows: Tensor) -> None:
    directory = make_model("llama", tmp_path, tied=True)
    tied = streamed_logits(opened(directory), rows)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, **{"lm_head.weight": -embedding})
    assert not opened(directory).tied
    assert (streamed_logits(opened(directory), rows) + tied).abs().max() < 1e-5


def test_a_tied_model_may_hold_the_head_alone(tmp_path: Path, rows: Tensor) -> None:
    directory = make_model("llama", tmp_path, tied=True)
    wanted = streamed_logits(opened(directory), rows)
    name = "model.embed_tokens.weight"
    rewrite(directory, **{"lm_head.weight": load_file(directory / "model.safetensors")[name], name: None})
    assert opened(directory).tied
    assert torch.equal(streamed_logits(opened(directory), rows), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {Q: None},
            r"^no tensor model\.layers\.0\.self_attn\.q_proj\.weight among the 20 stored, and 1 of the 21",
        ),
        ({Q: None, "model.norm.weight": None}, r"q_proj\.weight among the 19 stored, and 2 of the 21"),
        (
            {Q: torch.zeros(64, 63)},
            r"^\S+q_proj\.weight has the shape \(64, 63\); config.json wants \(64, 64\)$",
        ),
        (
            {Q: torch.zeros(64, 64, dtype=torch.int8)},
            r"^\S+q_proj\.weight in .* is I8; wanted bf16, fp16 or fp32",
        ),
        ({"lm_head.weight": None}, r"^no tensor lm_head\.weight among"),
    ],
)
def test_a_tensor_missing_misshapen_or_quantized_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    directory = make_model("llama", tmp_path, tied=False)
    rewrite(directory, **changes)
    with pytest.raises(ModelError, match=message):
        opened(directory)


def test_a_fused_matrix_of_the_wrong_height_is_refused_whole(tmp_path: Path) -> None:
    directory = make_model("phi3", tmp_path, tied=False)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    rewrite(directory, **{name: torch.zeros(160, 64)})
    with pytest.raises(
        ModelError, match=r"qkv_proj.weight has the shape \(160, 64\); config.json wants \(128, 64\)"
    ):
        opened(directory)
    edit_config(directory, num_key_value_heads=3)
    with pytest.raises(ModelError):
        opened(directory)
