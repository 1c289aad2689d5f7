"""The formulas of the arithmetic floor, against torch's own count and slow loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exlq.checkpoint.open import open_checkpoint
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.sizing import flops
from tests.helpers import make_model

ROWS, LENGTH, HIDDEN = 3, 40, 64


class Nowhere:
    """In place of a counter's tracker of modules, which cannot follow `torch.autograd.grad`."""

    parents = ("Global",)

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = make_model("llama", tmp_path_factory.mktemp("flops") / "model", tied=False)
    return open_model(directory, open_checkpoint(directory), device=torch.device("cpu"))


def counted(run: Callable[[], object]) -> dict[str, int]:
    """Operations of matrix products as torch counts them, by the name of its operator."""
    run()  # what is made once
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Nowhere()  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}


def expected_of(found: dict[str, int]) -> float:
    """Torch counts the masked pairs of tokens too, which are all but length + 1 of 2 · length."""
    return found["aten.mm"] + found["aten.bmm"] * (LENGTH + 1) / (2 * LENGTH)


def test_a_block_forward_is_what_torch_counts(model: Model) -> None:
    specs = [linear.spec for linear in model.linears(0)]
    states = torch.randn(ROWS, LENGTH, HIDDEN)
    with model.block(0) as block:
        found = counted(lambda: block.forward(states))
    assert flops.forward(sum(spec.numel for spec in specs), ROWS * LENGTH) == found["aten.mm"]
    assert flops.block(specs, ROWS, LENGTH) == expected_of(found)


def test_a_block_there_and_back_is_what_torch_counts(model: Model) -> None:
    specs = [linear.spec for linear in model.linears(0)]
    states = torch.randn(ROWS, LENGTH, HIDDEN)
    with model.block(0) as block:
        found = counted(lambda: block.backward(states, states, lambda key, gradient: None))
    assert flops.block_backward(specs, ROWS, LENGTH) == expected_of(found)


@pytest.mark.parametrize("size", [64, 512])
def test_triangles_are_what_loops_over_columns_count_but_for_lower_orders(size: int) -> None:
    cholesky = sum(2 * rest * column for column, rest in enumerate(range(size, 0, -1)))
    assert flops.factor(size) == pytest.approx(cholesky, rel=2 / size)
    assert flops.sweep(size, 5, 3) == pytest.approx(15 * sum(2 * c for c in range(size)), rel=2 / size)
    half = sum(2 * 7 * (column + 1) for column in range(size))  # of a symmetric sum over 7 tokens
    assert flops.second_moment(size, 7) == pytest.approx(half, rel=2 / size)


def test_whole_products_are_what_torch_counts() -> None:
    size, rows = 48, 5
    hessian, errors = torch.eye(size), torch.randn(size, rows)
    assert flops.energies(size, rows) == counted(lambda: hessian @ errors)["aten.mm"]
    assert flops.descent(size, rows, walks=3) == 4 * counted(lambda: hessian @ errors)["aten.mm"]
    x, y = torch.randn(9, size), torch.randn(9, 16)
    assert flops.cross_moment(16, size, 9) == counted(lambda: y.T @ x)["aten.mm"]
