"""Errors handed on between rows: against the plain definition, row by row, and by what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.gguf_codec import GgufCodec, type_option
from exlq.numerics import coupling, hessian
from exlq.numerics.coupling import Coupling, CouplingSum
from exlq.pipeline import trial
from exlq.types import LinearSpec

CPU = torch.device("cpu")
OUT, IN = 96, 256


@pytest.fixture
def gradients() -> Tensor:
    """Of outputs that hang together, as neurons of one layer do."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(2000, OUT, generator=generator) @ torch.randn(OUT, OUT, generator=generator)
    return mixed * torch.rand(OUT, generator=generator)


@pytest.fixture
def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3000, IN, generator=generator) @ torch.randn(IN, IN, generator=generator) / 16


def coupling_of(gradients: Tensor) -> Coupling:
    total = CouplingSum.zeros(gradients.shape[-1], CPU)
    for part in torch.split(gradients, 300):
        total.add(part.unsqueeze(0))
    found = Coupling.of(total.stored(), CPU)
    assert found is not None
    return found


def plain_targets(weight: Tensor, rounded: Tensor, second: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Rows about to be rounded and their best weights, by minimising the cost over all rows still free."""
    damped = second + coupling.DAMPING * second.diagonal().mean() * torch.eye(len(second))
    order = second.diagonal().argsort(descending=True, stable=True).tolist()
    cuts = [len(order) * i // coupling.GROUPS for i in range(coupling.GROUPS + 1)]
    for begin, end in pairwise(cuts):
        done, free = order[:begin], order[begin:]
        errors = (weight - rounded)[done].double()
        best = torch.linalg.solve(damped[free][:, free], damped[free][:, done] @ errors)
        yield order[begin:end], weight[order[begin:end]] + best[: end - begin].float()


def test_each_group_is_rounded_at_what_minimises_the_cost_of_all_that_is_left(gradients: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(OUT, IN, generator=generator)
    rounded = (weight * 2).round() / 2
    second = gradients.double().T @ gradients.double() / len(gradients)
    steps = coupling_of(gradients).steps()
    for step, (rows, wanted) in zip(steps, plain_targets(weight, rounded, second), strict=True):
        assert step.rows.tolist() == rows
        found = weight[rows] + step.handed_on(weight - rounded)
        assert (found - wanted).norm() < 2e-3 * (wanted - weight[rows]).norm().clamp_min(1)


def cost(error: Tensor, gradients: Tensor, inputs: Tensor) -> float:
    """½ E[(g · E x)²] over all pairs of tokens."""
    second, moment = gradients.T @ gradients / len(gradients), inputs.T @ inputs / len(inputs)
    return float(((second @ error @ moment) * error).sum()) / 2


@pytest.mark.parametrize("codec", [GgufCodec(), Exl2Codec()], ids=lambda codec: codec.name)
def test_it_lowers_the_cost_and_foretells_it(
    gradients: Tensor, inputs: Tensor, codec: GgufCodec | Exl2Codec
) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(6))
    spec = LinearSpec("model.layers.0.mlp.up_proj", IN, OUT)
    option = type_option("Q3_K") if codec.name == "gguf" else codec.options(spec)[6]
    factor = hessian.factor(inputs.T @ inputs / len(inputs))
    coupled = coupling_of(gradients)
    plain = weight - trial.quantize(codec, spec, option, weight, factor)[1]
    handed_on = weight - trial.quantize(codec, spec, option, weight, factor, coupled)[1]
    assert cost(handed_on, gradients, inputs) < 0.8 * cost(plain, gradients, inputs)
    foretold = float((factor.energies(plain.T[factor.perm]) * coupled.costs).sum()) / 2
    assert foretold == pytest.approx(cost(handed_on, gradients, inputs), rel=0.15)


def test_uncorrelated_rows_are_left_as_they_are() -> None:
    total = CouplingSum.zeros(8, CPU)
    total.add(torch.eye(8) * torch.arange(1.0, 9.0))
    found = Coupling.of(total.stored(), CPU)
    assert found is not None
    assert not any(step.handed_on(torch.ones(8, 4)).any() for step in found.steps())
    assert torch.allclose(found.costs, torch.arange(1.0, 9.0).square() / 8, rtol=1e-3)


def test_outputs_without_gradients_have_no_coupling() -> None:
    total = CouplingSum.zeros(8, CPU)
    total.add(torch.zeros(5, 8))
    assert Coupling.of(total.stored(), CPU) is None


def test_fewer_rows_than_groups_are_each_a_group_of_their_own(gradients: Tensor) -> None:
    found = coupling_of(gradients[:, :5])
    rows = torch.cat([step.rows for step in found.steps()])
    assert sorted(rows.tolist()) == list(range(5))
