"""Fisher information of linears that only some tokens reach."""

from __future__ import annotations

import torch
from torch import Tensor

from exlq.models.layout import Linear
from exlq.numerics.coupling import RUN, CouplingSum
from exlq.pipeline.information import information
from exlq.types import LinearSpec

N_TOKENS = 200


def linear(name: str, tie: str | None = None) -> Linear:
    return Linear(LinearSpec(name, 8, 6), "a stage", name, tie=tie)


def added(gradient: Tensor) -> CouplingSum:
    total = CouplingSum.zeros(6, torch.device("cpu"))
    total.add(gradient)
    return total


def test_it_is_the_mean_over_all_tokens_and_never_less_than_an_average_tokens_part() -> None:
    gradients = torch.randn(N_TOKENS, 6, generator=torch.Generator().manual_seed(0))
    few, other = 3 * gradients[:50], gradients[50:60]
    linears = [linear("whole"), *(linear(name, "stack") for name in ("few", "none", "tiny"))]
    sums = {"whole": added(gradients), "few": added(few), "tiny": added(1e-6 * other)}
    found = information(linears, sums, N_TOKENS)
    assert list(found) == ["whole", "few", "none", "tiny"]
    torch.testing.assert_close(found["whole"], gradients.square().mean(0))
    torch.testing.assert_close(found["few"], few.square().sum(0) / N_TOKENS)
    floor = few.square().mean(1).sum() / 60 / N_TOKENS  # of the 60 tokens that reach any of the stack
    torch.testing.assert_close(found["none"], floor.expand(6))
    torch.testing.assert_close(found["tiny"], floor.expand(6))


def test_rows_are_coupled_where_tokens_enough_were_seen() -> None:
    small = added(torch.randn(5, 6))
    assert small.couples(5)
    assert not small.couples(6)
    assert added(torch.randn(6, 6)).couples(N_TOKENS)
    large = CouplingSum.zeros(RUN + 1, torch.device("cpu"))
    large.add(torch.randn(RUN - 1, RUN + 1))
    assert not large.couples(2 * RUN)


def test_sums_over_more_tokens_are_those_with_gradients_of_zero() -> None:
    gradients = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    padded = added(torch.cat([gradients, torch.zeros(60, 6)]))
    spread = added(gradients).over(100)
    torch.testing.assert_close(spread.fisher(), padded.fisher())
    for name, value in padded.stored().items():
        torch.testing.assert_close(spread.stored()[name], value)
