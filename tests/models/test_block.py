"""One block: its inputs, its gradients, its weights replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exlq.models.model import Model
from tests.models.conftest import DENSE_CASES, TinyMaker, opened, streamed_states, whole_model


@pytest.mark.parametrize(("family", "tied"), DENSE_CASES)
def test_gradients_through_all_blocks_equal_autograds(
    tiny: TinyMaker, family: str, tied: bool, rows: Tensor
) -> None:
    directory = tiny(family, tied)
    labels = rows.roll(-1, 1)
    model = opened(directory)
    ours, grad = _streamed_gradients(model, rows, labels)
    wanted, wanted_grad = _autograd_gradients(directory, model, rows, labels)
    assert ours.keys() == wanted.keys()
    assert len(ours) == 7 * model.n_blocks
    assert _relative(grad, wanted_grad) < 1e-4
    for key, value in wanted.items():
        assert _relative(ours[key], value) < 1e-4, key


def _streamed_gradients(model: Model, rows: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    *states, last = streamed_states(model, rows)
    grad = model.head_backward(last, labels)
    found: dict[str, Tensor] = {}
    for index in reversed(range(model.n_blocks)):
        with model.block(index) as block:
            grad = block.backward(states[index], grad, found.__setitem__)
    return found, grad


def _autograd_gradients(
    directory: Path, model: Model, rows: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The whole model's own gradients, with respect to each linear's output and the first block's input."""
    whole = whole_model(directory)
    outputs: dict[str, Tensor] = {}
    first: list[Tensor] = []
    whole.model.layers[0].register_forward_pre_hook(lambda _m, args: first.append(args[0]))
    for name, module in _whole_linears(whole).items():
        module.register_forward_hook(lambda _m, _a, out, name=name: outputs.__setitem__(name, out))
    logits = whole(input_ids=rows, use_cache=False).logits
    loss = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum()
    *grads, grad_first = torch.autograd.grad(loss, [*outputs.values(), *first])
    by_module = dict(zip(outputs, grads, strict=True))
    split = {}
    for index in range(model.n_blocks):
        for linear in model.linears(index):
            value = by_module[f"model.layers.{index}.{linear.module}"]
            split[linear.spec.key] = value if linear.rows is None else value[..., linear.rows]
    return split, grad_first


def _whole_linears(whole: Any) -> dict[str, nn.Module]:
    modules = whole.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("family", "tied"), DENSE_CASES)
def test_every_stages_input_is_what_its_linears_see(
    tiny: TinyMaker, family: str, tied: bool, rows: Tensor
) -> None:
    directory = tiny(family, tied)
    model, whole = opened(directory), whole_model(directory)
    seen: dict[str, Tensor] = {}
    for name, module in _whole_linears(whole).items():
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        whole(input_ids=rows, use_cache=False)
    hidden = model.embed(rows)
    for index in range(model.n_blocks):
        found: list[tuple[str, Tensor]] = []
        with model.block(index) as block:
            hidden = block.forward(hidden, lambda key, x, found=found: found.append((key, x)))  # type: ignore[misc]
        assert [key for key, _ in found] == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
        inputs = dict(found)
        for linear in model.linears(index):
            wanted = seen[f"model.layers.{index}.{linear.module}"]
            assert (inputs[linear.stage] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_set_weight_replaces_that_linear_alone_and_only_while_open(tiny: TinyMaker, family: str) -> None:
    model = opened(tiny(family, False))
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    whole = whole_model(tiny(family, False))
    layer, call = whole.model.layers[1], model._call((1, 6))[1]
    with model.block(1) as block:
        plain = block.forward(hidden)
        for linear in model.linears(1):
            weight = 1.5 * model.linear_weight(linear.spec.key)
            block.set_weight(linear.spec.key, weight)
            target = layer.get_submodule(linear.module).weight.data
            (target if linear.rows is None else target[linear.rows]).mul_(1.5)
            with torch.no_grad():
                wanted = layer(hidden, **call.kwargs)
            assert (block.forward(hidden) - wanted).abs().max() < 1e-5
            assert (wanted - plain).abs().max() > 1e-3
    with model.block(1) as block:
        assert torch.equal(block.forward(hidden), plain)
