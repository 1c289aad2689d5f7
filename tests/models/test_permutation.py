"""Models with channels reordered inside: the same function, the same tensors in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.models.permutation import channel_order
from tests.helpers import make_model
from tests.models.conftest import CASES, TinyMaker, opened, streamed_logits, whole_logits

WIDER = {"intermediate_size": 192, "head_dim": 64}
QWEN2 = {"intermediate_size": 192, "hidden_size": 128, "num_attention_heads": 4}  # heads of 32
MLP = "model.layers.1.mlp"
ATTENTION = "model.layers.1.self_attn"
ATTENTION_OUT = f"{ATTENTION}.o_proj.weight"


def permuted(directory: Path) -> Model:
    return open_model(directory, open_checkpoint(directory), device=torch.device("cpu"), permute_mlp=True)


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with heads of 64 channels."""
    return make_model("llama", tmp_path_factory.mktemp("wider"), tied=False, **WIDER)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_logits_are_those_of_the_model_itself(family: str, tied: bool, tiny: TinyMaker, rows: Tensor) -> None:
    directory = tiny(family, tied)
    wanted = whole_logits(directory, rows)
    found = streamed_logits(permuted(directory), rows)
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", WIDER), ("gemma2", WIDER), ("phi3", QWEN2), ("qwen2", QWEN2)]
)
def test_channels_do_move_inside_heads_too_and_the_logits_stay(
    family: str, settings: dict[str, Any], tmp_path: Path, rows: Tensor
) -> None:
    directory = make_model(family, tmp_path / family, tied=False, **settings)
    base, model = opened(directory), permuted(directory)
    for key in (f"{MLP}.up_proj", f"{MLP}.down_proj", f"{ATTENTION}.v_proj", f"{ATTENTION}.o_proj"):
        assert not torch.equal(model.linear_weight(key), base.linear_weight(key)), key
    wanted = streamed_logits(base, rows)
    assert torch.allclose(streamed_logits(model, rows), wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_biases_of_the_channels_move_with_them(tmp_path: Path, rows: Tensor) -> None:
    directory = make_model(
        "llama", tmp_path / "biased", tied=True, mlp_bias=True, attention_bias=True, **WIDER
    )
    base, model = opened(directory), permuted(directory)
    for key in (f"{MLP}.gate_proj", f"{MLP}.up_proj", f"{ATTENTION}.v_proj"):
        bias, moved = base.linear_bias(key), model.linear_bias(key)
        assert bias is not None
        assert moved is not None
        assert not torch.equal(moved, bias)
        assert torch.equal(moved.sort().values, bias.sort().values)
    for key in (f"{MLP}.down_proj", f"{ATTENTION}.o_proj"):
        assert torch.equal(model.weights.read(f"{key}.bias"), base.weights.read(f"{key}.bias"))
    wanted = streamed_logits(base, rows)
    assert torch.allclose(streamed_logits(model, rows), wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_all_query_heads_of_a_value_head_have_its_order(wider: Path) -> None:
    base, model = opened(wider).weights, permuted(wider).weights
    values, before = (w.read(f"{ATTENTION}.v_proj.weight").view(2, 64, -1) for w in (model, base))
    output, stored = (w.read(ATTENTION_OUT).view(-1, 2, 2, 64) for w in (model, base))
    for head in range(2):
        order = (values[head].unsqueeze(1) == before[head]).all(2).long().argmax(1)  # by the rows' content
        assert sorted(order.tolist()) == list(range(64)), "no channel leaves its head"
        for query in range(2):
            assert torch.equal(output[:, head, query], stored[:, head, query][:, order])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_parts_of_tensors_are_parts_of_the_whole_ones(family: str, tiny: TinyMaker) -> None:
    weights = permuted(tiny(family, True)).weights
    rows = torch.tensor([5, 0, 31, 5])
    for key in list(weights.keys()):
        whole = weights.read(key)
        assert weights.shape(key) == tuple(whole.shape)
        assert weights.dtype(key) == whole.dtype
        assert torch.equal(weights.read(key, slice(3, 29)), whole[3:29]), key
        assert torch.equal(weights.read(key, rows), whole[rows]), key


def test_a_first_read_of_a_part_finds_the_same_order(wider: Path) -> None:
    for key in (f"{MLP}.gate_proj.weight", f"{MLP}.down_proj.weight", ATTENTION_OUT):
        whole = permuted(wider).weights.read(key)
        assert torch.equal(permuted(wider).weights.read(key, slice(7, 40)), whole[7:40])


def test_tied_models_stay_tied_and_others_do_not_become_so(tiny: TinyMaker) -> None:
    assert permuted(tiny("llama", True)).tied
    assert permuted(tiny("gemma2", True)).tied
    assert not permuted(tiny("llama", False)).tied


def test_everything_but_the_channels_is_as_it_was(wider: Path) -> None:
    base, model = opened(wider).weights, permuted(wider).weights
    assert list(model.keys()) == list(base.keys())
    moved = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
    for key in list(base.keys()):
        if not any(name in key for name in moved):
            assert torch.equal(model.read(key), base.read(key)), key


def test_a_model_that_lacks_a_tensor_is_refused_as_ever(wider: Path, tmp_path: Path) -> None:
    tensors = load_file(wider / "model.safetensors")
    del tensors[f"{MLP}.up_proj.weight"]
    for path in wider.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight"):
        permuted(tmp_path)


def test_channels_with_large_weights_in_the_same_rows_come_together() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.randperm(64, generator=generator) % 4  # of each 16 columns, scattered
    loud = torch.arange(32).unsqueeze(1) % 4 == kind
    weight = torch.randn(32, 64, generator=generator) * torch.where(loud, 4.0, 0.5)
    size = torch.empty(64)  # one of each kind in every tier
    for each in range(4):
        size[kind == each] = torch.arange(16.0) + each / 4
    order = channel_order(weight, size)
    assert all(len(set(run.tolist())) == 1 for run in kind[order].view(4, 16))


def test_every_run_has_one_channel_of_each_tier() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, size = torch.randn(24, 163, generator=generator), torch.rand(163, generator=generator)
    order = channel_order(weight, size)
    assert sorted(order.tolist()) == list(range(163))
    falling = size.argsort(descending=True)
    tier = torch.empty(163, dtype=torch.long)
    tier[falling] = torch.arange(163) // 10
    assert torch.equal(tier[order[:160]].view(10, 16).sort(1).values, torch.arange(16).expand(10, 16))
    assert order[160:].tolist() == falling[160:].tolist(), "the least come last"


def test_more_blocks_than_are_filled_at_once_have_each_tier_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlq.models.permutation.BLOCKS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(2)
    size = torch.rand(128, generator=generator)
    order = channel_order(torch.randn(16, 128, generator=generator), size)
    tier = size.argsort(descending=True).argsort() // 8
    assert torch.equal(tier[order].view(8, 16).sort(1).values, torch.arange(16).expand(8, 16))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_columns_of_nothing_or_broken_ones_only_find_some_place(value: float) -> None:
    weight = torch.ones(8, 64)
    weight[:, 10] = value
    assert sorted(channel_order(weight, weight.norm(dim=0)).tolist()) == list(range(64))
