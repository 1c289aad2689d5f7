"""Rounded blocks against ggml's own, and the numbers that break float16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf_blocks import BLOCK_TYPES
from exlq.formats.gguf_blocks.block import BlockType, Fields
from exlq.formats.gguf_blocks.fit import SEARCHES, fit, underflows
from exlq.formats.gguf_blocks.searches import BEST, FAST
from tests.formats.gguf_blocks import stock

each_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
each_search = pytest.mark.parametrize("search", SEARCHES)
K_TYPES = [kind for kind in BLOCK_TYPES.values() if kind.sub_block]


def student(rows: int, in_features: int, seed: int = 0) -> Tensor:
    """Weights with heavier tails than a normal distribution's: Student's t of five degrees."""
    random = torch.Generator().manual_seed(seed)
    chi = torch.randn(rows, in_features, 5, generator=random).square().mean(-1)
    return 0.02 * torch.randn(rows, in_features, generator=random) / chi.sqrt()


def uneven(in_features: int, seed: int = 0) -> Tensor:
    """Importance as mean squares of activations are: lognormal, with a few channels far above."""
    random = torch.Generator().manual_seed(seed)
    importance = torch.randn(in_features, generator=random).exp()
    importance[torch.randint(in_features, (3,), generator=random)] *= 1000
    return importance


def error(weight: Tensor, values: Tensor, importance: Tensor | None = None) -> float:
    squares = (weight.double() - values.double()).square()
    return (squares if importance is None else squares * importance.double()).sum().item()


def compare(kind: BlockType, weight: Tensor, importance: Tensor | None) -> tuple[float, float]:
    """Errors of the fast and the best search over that of ggml with the same importance."""
    theirs = error(weight, kind.unpack(stock.quantize(kind, weight, importance)), importance)
    fast, best = (
        error(weight, kind.values(fit(kind, weight, importance, search=search)), importance)
        for search in ("fast", "best")
    )
    return fast / theirs, best / theirs


def matrices(model: Path, rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if len(tensors.get_slice(key).get_shape()) == 2:
                    yield key, tensors.get_tensor(key)[:rows].float()


@each_type
def test_error_is_below_ggmls_on_every_matrix_of_the_bundled_model(kind: BlockType, tiny_llama: Path) -> None:
    for seed, (key, weight) in enumerate(matrices(tiny_llama, rows=32)):
        for importance in (None, uneven(weight.shape[1], seed)):
            fast, best = compare(kind, weight, importance)
            assert best <= fast <= 1, f"{key}: {fast:.4f} and {best:.4f} of ggml's"


@pytest.mark.slow
@each_type
def test_error_is_below_ggmls_on_every_matrix_of_a_larger_model(kind: BlockType, shared: Path) -> None:
    for seed, (key, weight) in enumerate(matrices(shared / "models" / "wiki-18m")):
        for importance in (None, uneven(weight.shape[1], seed)):
            fast, best = compare(kind, weight, importance)
            assert best <= fast <= 1, f"{key}: {fast:.4f} and {best:.4f} of ggml's"


@each_type
def test_error_is_below_ggmls_on_weights_with_heavy_tails(kind: BlockType) -> None:
    weight = student(64, 1024)
    for importance in (None, uneven(1024), torch.ones(1024)):
        fast, best = compare(kind, weight, importance)
        assert best < fast < 1, f"{fast:.4f} and {best:.4f} of ggml's"


@each_search
@each_type
def test_fields_can_be_packed_and_their_levels_are_the_nearest(kind: BlockType, search: str) -> None:
    weight, importance = student(7, 768), uneven(768)
    fields = fit(kind, weight, importance, search=search)
    values = kind.values(fields)
    assert torch.equal(kind.unpack(kind.pack(fields)), values)
    for other in range(kind.levels.low, kind.levels.high + 1):
        levels = torch.full_like(fields.levels, other)
        moved = kind.values(Fields(**{**vars(fields), "levels": levels}))
        gain = (values - weight).abs() - (moved - weight).abs()
        assert gain.max() <= 1e-6 * weight.abs().max(), other


@each_search
@each_type
def test_channels_of_no_importance_still_hold_weights(kind: BlockType, search: str) -> None:
    weight, importance = student(5, 768), uneven(768)
    importance[256:512] = 0  # a whole block, of which ggml makes zeros
    values = kind.values(fit(kind, weight, importance, search=search))
    assert error(weight[:, 256:512], values[:, 256:512]) < 0.2 * weight[:, 256:512].square().sum()
    nothing = fit(kind, weight, torch.zeros(768), search=search)
    assert torch.equal(kind.values(nothing), kind.values(fit(kind, weight, search=search)))


@each_search
@each_type
def test_rows_of_zeros_stay_zeros(kind: BlockType, search: str) -> None:
    weight = student(3, 512)
    weight[1] = 0
    values = kind.values(fit(kind, weight, uneven(512), search=search))
    assert not values[1].any()
    assert values[0].any()
    assert not kind.values(fit(kind, torch.zeros(2, 256), search=search)).any()
    assert not underflows(kind, torch.zeros(2, 256))


@each_search
@each_type
def test_one_huge_weight_is_held_and_spoils_its_own_block_only(kind: BlockType, search: str) -> None:
    weight = student(4, 768)
    weight[2, 300] = 1e4
    values = kind.values(fit(kind, weight, search=search))
    if kind.table is None:  # a table without a zero would have to move all the others away from it
        assert abs(values[2, 300] - 1e4) <= 1e4 * 2**-10
    start = 300 // kind.block_size * kind.block_size
    others = torch.ones(4, 768, dtype=torch.bool)
    others[2, start : start + kind.block_size] = False
    assert torch.equal(values[others], kind.values(fit(kind, student(4, 768), search=search))[others])
    if not kind.sub_block:  # what integer scales multiply to is a matter of luck, theirs as well as ours
        assert error(weight, values) <= error(weight, kind.unpack(stock.quantize(kind, weight)))


@each_search
@pytest.mark.parametrize("deviation", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 1e-30])
@each_type
def test_small_weights_leave_no_more_error_than_zeros_or_ggml(
    kind: BlockType, deviation: float, search: str
) -> None:
    weight = deviation * student(8, 512) / 0.02
    scaled = (1 / deviation) * weight.double()
    ours = error(scaled, kind.values(fit(kind, weight, search=search)).double() / deviation)
    theirs = error(scaled, kind.unpack(stock.quantize(kind, weight)).double() / deviation)
    assert ours <= scaled.square().sum().item() * (1 + 1e-6)
    assert ours <= theirs


@each_type
def test_underflow_is_told_where_the_error_grows(kind: BlockType) -> None:
    """As measured against the same weights a thousand times as large, at each magnitude."""
    for power in range(-30, 0, 2):
        weight = student(16, 512) * 2.0**power
        large = error(student(16, 512), kind.values(fit(kind, student(16, 512))))
        grown = error(weight, kind.values(fit(kind, weight))) * 4.0**-power / large
        told = underflows(kind, weight)
        assert told or grown < 1.4, f"2^{power}: {grown:.3f} and not told"
        assert not told or grown > 1.1, f"2^{power}: {grown:.3f} and told"


def test_a_type_with_small_steps_underflows_before_one_with_large_steps() -> None:
    weight = 1e-6 * student(16, 512) / 0.02
    assert underflows(BLOCK_TYPES["Q6_K"], weight)
    assert not underflows(BLOCK_TYPES["Q4_0"], weight)


@each_type
def test_what_cannot_be_stored_is_refused(kind: BlockType) -> None:
    broken = student(2, 512)
    broken[0, 3], broken[1, 7] = float("nan"), float("inf")
    ragged = student(2, kind.block_size + 16)
    for weight, wanted in (
        (broken, "2 of 1024 weights are not finite"),
        (ragged, f"{kind.name} needs rows of whole blocks of {kind.block_size}"),
        (torch.full((1, 256), 1e12), f"{kind.name} holds weights up to"),
        (student(1, 256)[0], "whole blocks"),
    ):
        with pytest.raises(FormatError, match=wanted):
            fit(kind, weight)
        with pytest.raises(FormatError, match=wanted):
            underflows(kind, weight)


@each_search
@each_type
def test_large_weights_within_the_range_have_finite_steps(kind: BlockType, search: str) -> None:
    weight = student(4, 512)
    weight *= 60000 / weight.abs().max()
    values = kind.values(fit(kind, weight, uneven(512), search=search))
    assert values.isfinite().all()
    assert error(weight, values) < 0.3 * weight.square().sum()


@pytest.mark.parametrize(
    ("importance", "wanted"),
    [
        (torch.tensor([float("nan")] * 256), "256 of 256 importances are negative or not finite"),
        (torch.tensor([-1.0] + [1.0] * 255), "1 of 256 importances are negative or not finite"),
        (torch.ones(255), "importance has shape"),
    ],
)
def test_an_importance_that_means_nothing_is_refused(importance: Tensor, wanted: str) -> None:
    with pytest.raises(FormatError, match=wanted):
        fit(BLOCK_TYPES["Q4_K"], student(2, 256), importance)


def test_every_type_has_its_searches() -> None:
    assert FAST.keys() == BEST.keys() == BLOCK_TYPES.keys()


def test_a_matrix_of_no_rows_is_rounded_to_one_of_no_rows() -> None:
    for kind in BLOCK_TYPES.values():
        assert kind.pack(fit(kind, torch.zeros(0, 256))).shape[0] == 0
        assert not underflows(kind, torch.zeros(0, 256))


def test_inputs_are_not_changed_and_any_dtype_is_taken() -> None:
    weight, importance = student(3, 256).bfloat16().T.contiguous().T, uneven(256)
    before = weight.clone(), importance.clone()
    fields = fit(BLOCK_TYPES["Q4_K"], weight, importance)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
    again = fit(BLOCK_TYPES["Q4_K"], weight.float(), importance.double())
    assert torch.equal(fields.levels, again.levels)
