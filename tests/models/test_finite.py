"""A value that is no number is found when it is read, and named by tensor, row and column."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.models.finite import FiniteWeights, is_finite, require_finite


class Held:
    """Weights of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def keys(self) -> Collection[str]:
        return ("a.weight",)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensor.dtype

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        return self.tensor if rows is None else self.tensor[rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [None, slice(5, None), slice(1, -2, 3), torch.tensor([2, 7, 9])])
def test_the_first_bad_weight_is_named_by_its_place_in_the_whole_tensor(
    dtype: torch.dtype, bad: float, rows: slice | Tensor | None
) -> None:
    tensor = torch.ones(12, 6, dtype=dtype)
    tensor[7, 4] = bad
    with pytest.raises(ModelError, match=rf"a\.weight has {bad} at row 7, column 4, 1 of the \d+ values"):
        FiniteWeights(Held(tensor)).read("a.weight", rows)


def test_rows_without_it_are_read_and_so_is_a_vector_but_for_its_place() -> None:
    tensor = torch.ones(12, 6)
    tensor[7, 4] = torch.nan
    assert torch.equal(FiniteWeights(Held(tensor)).read("a.weight", slice(7)), torch.ones(7, 6))
    with pytest.raises(ModelError, match="has nan at row 3, 1 of"):
        FiniteWeights(Held(torch.tensor([1.0, 2.0, 3.0, torch.nan]))).read("a.weight")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 4)])
def test_whole_numbers_and_nothing_at_all_are_finite(shape: tuple[int, ...]) -> None:
    assert is_finite(torch.ones(shape))
    assert is_finite(torch.ones(shape, dtype=torch.int32))


def test_the_first_bad_row_of_activations_is_named_with_its_token_and_channel() -> None:
    x = torch.ones(3, 5, 8)
    assert require_finite(x, "block 3, mlp.down_proj", str) is x
    x[2, 0, 0] = torch.nan
    x[1, 4, 6] = torch.inf
    with pytest.raises(ModelError, match=r"^block 3, mlp: inf in row 21, token 4, channel 6: the weights"):
        require_finite(x, "block 3, mlp", lambda row: f"row {20 + row}")
