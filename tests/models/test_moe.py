"""Models with experts: transformers' function, each expert's linears apart, from any form of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError
from exlq.models.families import FAMILIES
from exlq.models.model import Model
from exlq.models.moe import sparse_mlp
from exlq.models.open import open_model
from exlq.models.routed import RoutedTokens
from tests.helpers import SETTINGS, SIZES, edit_config, make_model
from tests.models.conftest import (
    CPU,
    SPARSE,
    TinyMaker,
    opened,
    streamed_logits,
    streamed_states,
    whole_logits,
    whole_model,
)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "router_jitter_noise": 0.5}),
    ("qwen2_moe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 6}),
    ("qwen3_moe", {"norm_topk_prob": True}),
]
MIXED: list[dict[str, Any]] = [
    {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    {"num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_our_sparse_mlp_is_that_of_transformers(family: str, changes: dict[str, Any]) -> None:
    model_type, extra = SETTINGS[family]
    config = CONFIG_MAPPING[model_type](**{**SIZES, **extra, **changes})
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().model.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    names = FAMILIES[family].experts
    assert names is not None
    ours, fused = sparse_mlp(names, config), dict(theirs.named_parameters())
    width = fused["experts.down_proj"].shape[-1]
    for number in range(len(ours.experts)):
        gate_up = fused["experts.gate_up_proj"][number]
        fused |= {
            f"experts.{number}.{names.gate}.weight": gate_up[:width],
            f"experts.{number}.{names.up}.weight": gate_up[width:],
            f"experts.{number}.{names.down}.weight": fused["experts.down_proj"][number],
        }
    ours.load_state_dict({name: fused[name] for name in ours.state_dict()})
    x = torch.randn(2, 40, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", MIXED)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_blocks_with_and_without_experts_follow_one_another_as_config_json_says(
    family: str, changes: dict[str, Any], tmp_path: Path, rows: Tensor
) -> None:
    directory = make_model(family, tmp_path / family, tied=False, **changes)
    model = opened(directory)
    assert torch.allclose(streamed_logits(model, rows), whole_logits(directory, rows), atol=1e-5, rtol=0)
    sparse = [any(stage.expert is not None for stage in model.stages(i)) for i in range(model.n_blocks)]
    theirs = whole_model(directory).model.layers
    assert sparse == ["Sparse" in type(block.mlp).__name__ for block in theirs]
    assert True in sparse
    assert False in sparse


def fuse(directory: Path, family: str) -> None:
    """The checkpoint as newer programs write it: all experts of a block in two tensors."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    whole = whole_model(directory)
    fused = {
        name: value for name, value in stored.items() if ".experts." not in name and ".gate." not in name
    }
    fused |= {n: p.data.contiguous() for n, p in whole.named_parameters() if ".mlp." in n and n not in fused}
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    assert not any(".experts.0." in name for name in fused)
    save_file(fused, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", SPARSE)
def test_experts_are_read_from_two_tensors_or_from_one_each(
    family: str, tmp_path: Path, rows: Tensor
) -> None:
    directory = make_model(family, tmp_path / family, tied=False)
    apart = opened(directory)
    fuse(directory, family)
    together = opened(directory)
    assert apart.weights.keys() == together.weights.keys()
    picked = torch.tensor([5, 0, 5])
    for key in apart.weights.keys():  # noqa: SIM118
        wanted = apart.weights.read(key)
        assert torch.equal(together.weights.read(key), wanted), key
        assert together.weights.shape(key) == tuple(wanted.shape)
        if ".experts." in key:
            assert torch.equal(together.weights.read(key, picked), wanted[picked])
            assert torch.equal(together.weights.read(key, slice(3, 9)), wanted[3:9])
    assert torch.equal(streamed_logits(apart, rows), streamed_logits(together, rows))


def test_a_fused_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    directory = make_model("qwen3_moe", tmp_path / "model", tied=False)
    fuse(directory, "qwen3_moe")
    edit_config(directory, moe_intermediate_size=24)
    with pytest.raises(
        ModelError, match=r"mlp\.experts\.(gate_up|down)_proj has the shape \(4, 64.*config.json wants"
    ):
        opened(directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 9}, "sends a token to 9 of 4 experts"),
        ({"num_local_experts": "many"}, "num_local_experts = many; wanted a whole number"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3; wanted a list"),
    ],
)
def test_settings_of_experts_that_cannot_be_are_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    directory = make_model("qwen3_moe", tmp_path / "model", tied=False)
    edit_config(directory, **changes)
    with pytest.raises(ModelError, match=said):
        opened(directory)


@pytest.mark.parametrize("family", SPARSE)
def test_gradients_at_experts_are_those_of_the_whole_models_weights(
    family: str, tiny: TinyMaker, rows: Tensor
) -> None:
    """Σ g xᵀ over the tokens of an expert is the gradient of its weight; transformers' own has all in one."""
    directory, labels = tiny(family, False), rows.roll(-1, 1)
    model, whole = opened(directory), whole_model(directory)
    logits = whole(input_ids=rows, use_cache=False).logits
    (-logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum()).backward()
    wanted = whole.model.layers[1].mlp.experts
    *states, last = streamed_states(model, rows)
    gradients: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    with model.block(1) as block:
        block.forward(states[1], on_expert=inputs.__setitem__)
        block.backward(states[1], model.head_backward(last, labels), gradients.__setitem__)
    for linear in model.linears(1):
        if (expert := next(s.expert for s in model.stages(1) if s.input_key == linear.stage)) is None:
            continue
        found = gradients[linear.spec.key].T @ inputs[linear.stage]
        both, down = wanted.gate_up_proj.grad[expert], wanted.down_proj.grad[expert]
        role = linear.spec.key.rpartition(".")[2]
        names = FAMILIES[family].experts
        assert names is not None
        places = {names.gate: both[: len(both) // 2], names.up: both[len(both) // 2 :], names.down: down}
        assert float((found - places[role]).norm() / places[role].norm()) < 1e-4, linear.spec.key


def test_a_pass_that_follows_another_gives_its_experts_the_same_tokens(tiny: TinyMaker, rows: Tensor) -> None:
    """What base and quantized model give an expert is compared token by token."""
    model = opened(tiny("mixtral", False))
    twin, states = model.twin(), model.embed(rows)
    other = states + 0.5 * torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    kept = [lambda _name, shape: torch.empty(shape)] * 2
    with model.block(0) as block, twin.block(0) as base:
        first = block.staged(kept[0])
        second = base.staged(kept[1], leader=first)
        for stage in block.stages:
            pairs = zip(
                first.inputs(stage.input_key, states), second.inputs(stage.input_key, other), strict=True
            )
            for (rows_here, x), (rows_there, y) in pairs:
                assert (rows_here, x.shape) == (rows_there, y.shape)
        out = torch.empty_like(other)
        second.outputs(other, out)
        assert (out - base.forward(other)).abs().max() < 1e-5  # by its own routing


def test_an_expert_of_few_tokens_borrows_of_each_kind_of_rows() -> None:
    chosen = torch.ones(800, 1, dtype=torch.int64)
    chosen[::100] = 0  # 8 tokens
    heldout = torch.arange(16) % 4 == 2
    routed = RoutedTokens(torch.randn(16, 50, 8), chosen, heldout)
    own = routed.own(0)
    assert int(own.sum()) == 8
    assert (routed.reached(0, 8), routed.reached(0, 9)) == (None, 8)
    assert torch.equal(routed.tokens(0, 4), own.nonzero()[:, 0])
    taken = routed.tokens(0, 40)  # 30 and 10 are wanted, 4 of each are its own
    assert set(own.nonzero()[:, 0].tolist()) < set(taken.tolist())
    assert len(taken) == 40
    assert int(routed.heldout[taken].sum()) == 10
    assert float(taken.diff().max()) < 60, "those that are borrowed are spread over all rows"
    assert len(routed.tokens(2, 40)) == 40  # none of its own
    assert len(routed.tokens(1, 40)) == 792


def test_a_part_of_a_block_is_loaded_alone(tiny: TinyMaker) -> None:
    model: Model = open_model(tiny("qwen3_moe", False), open_checkpoint(tiny("qwen3_moe", False)), device=CPU)
    with model.part(1, "mlp.experts.2") as expert:
        loaded = dict(expert.named_parameters())
        assert torch.equal(
            loaded["up_proj.weight"], model.linear_weight("model.layers.1.mlp.experts.2.up_proj")
        )
        assert sum(not p.is_meta for p in model._skeleton.model.layers.parameters()) == 3
    assert all(p.is_meta for p in model._skeleton.model.layers.parameters())
