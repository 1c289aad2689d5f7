"""The law of a codec, kept by GGUF blocks: what is unpacked is what the sweep left, in the bits announced."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf_blocks import BLOCK_TYPES, TYPES
from exlq.formats.gguf_blocks.fit import fit
from exlq.formats.gguf_codec import GgufCodec, plainly_rounded, type_of, type_option
from exlq.numerics import hessian
from exlq.numerics.float_grid import FloatGrid
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import sweep
from exlq.numerics.static_grid import Affine, StaticGrid
from exlq.types import LinearSpec, Option
from tests.numerics.helpers import (
    correlated_hessian,
    damped,
    energy_of,
    heavy_tailed,
    one_column_at_a_time,
)

CODEC = GgufCodec()
UP = LinearSpec("model.layers.0.mlp.up_proj", 512, 40)


def quantized(
    spec: LinearSpec, name: str, factor: Factor, parts: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors, and what the sweeps left, (out, in) in the model's channel order."""
    option = type_option(name)
    weight = heavy_tailed(spec.in_features, spec.out_features, seed=1)[factor.perm]
    values, grids, levels = torch.empty_like(weight), [], torch.empty(weight.shape, dtype=torch.int16)
    for part in range(parts):
        rows = torch.arange(part, spec.out_features, parts)
        turned = weight[:, rows].contiguous()
        grid = CODEC.grid(spec, [option], factor, turned, None)
        values[:, rows] = sweep(turned, factor, grid, 1).values[:, 0]
        found = CODEC.levels(spec, option, grid, values[:, rows])
        levels = levels.to(found.dtype)
        levels[:, rows] = found
        grids.append((rows, grid))
    return CODEC.pack(spec, option, levels, grids, factor.perm), values[factor.perm.argsort()].T


def foreign_values(name: str, blocks: Tensor) -> Tensor:
    """(out, in) float32 as the gguf package reads the blocks."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


@pytest.fixture(scope="module")
def factor() -> Factor:
    return hessian.factor(correlated_hessian(UP.in_features, seed=3))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", TYPES)
def test_unpacked_is_what_the_sweep_left_in_the_bits_announced(name: str, parts: int, factor: Factor) -> None:
    tensors, left = quantized(UP, name, factor, parts)
    assert torch.equal(CODEC.unpack(tensors, UP, type_option(name)), left)
    assert torch.equal(foreign_values(name, tensors["blocks"]), left), "another reader reads the same"
    assert CODEC.storage_bits(UP, type_option(name)) == 8 * tensors["blocks"].numel()


def affine(name: str, factor: Factor) -> Affine:
    turned = heavy_tailed(UP.in_features, UP.out_features, seed=1)[factor.perm]
    grid = CODEC.grid(UP, [type_option(name)], factor, turned, None)
    assert isinstance(grid, StaticGrid)
    return grid.options[0]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_level_a_block_can_hold_is_found_again_from_its_value(name: str, factor: Factor) -> None:
    kind, made = BLOCK_TYPES[name], affine(name, factor)
    generator = torch.Generator().manual_seed(4)
    shape = (UP.out_features, UP.in_features)
    levels = torch.randint(kind.levels.low, kind.levels.high + 1, shape, generator=generator)
    values = kind.values(replace(made.fields, levels=levels))
    found = made.levels(values.T.contiguous()).T
    dead = made.scale.T.repeat_interleave(UP.in_features // len(made.scale), 1) == 0
    assert torch.equal(found[~dead].long(), levels[~dead])
    assert dead.double().mean() < 0.05
    assert torch.equal(kind.values(replace(made.fields, levels=found)), values)


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "Q8_0", "Q5_1", "IQ4_NL", "IQ4_XS"])
def test_a_sweep_in_act_order_gives_the_levels_of_the_published_loop(name: str, factor: Factor) -> None:
    """On the scales the codec chose; what a block can hold is asked of the format itself, level by level."""
    of, kind, made = correlated_hessian(UP.in_features, seed=3), BLOCK_TYPES[name], affine(name, factor)
    every = range(kind.levels.low, kind.levels.high + 1)
    filled = torch.zeros(UP.out_features, UP.in_features, dtype=torch.int16)
    table = torch.stack([kind.values(replace(made.fields, levels=filled + level)).T for level in every])
    table = table.double()  # (levels, in, out)

    def nearest(column: int, weights: Tensor) -> Tensor:
        values = table[:, factor.perm[column]]
        return values.gather(0, (values - weights).abs().argmin(0)[None])[0]

    weight = heavy_tailed(UP.in_features, UP.out_features, seed=1)[factor.perm]
    slow = one_column_at_a_time(weight, damped(of, factor), (), lambda _column, _current: None, nearest)
    _, left = quantized(UP, name, factor)
    found = left[:, factor.perm].T.double()
    step = made.scale.abs().T.repeat_interleave(UP.in_features // len(made.scale), 1)[:, factor.perm].T
    share = ((found - slow.values).abs() <= step / 2).double().mean().item()
    assert share > 0.995, f"{share:.2%} of the levels agree"


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "IQ4_NL"])
def test_error_feedback_costs_less_than_rounding_weight_by_weight(name: str, factor: Factor) -> None:
    of = correlated_hessian(UP.in_features, seed=3)
    weight = heavy_tailed(UP.in_features, UP.out_features, seed=1)
    _, swept = quantized(UP, name, factor)
    plain = plainly_rounded(UP, type_option(name), weight.T, of.diagonal())
    errors = [
        energy_of(weight - values.T, of).sum()
        for values in (swept, CODEC.unpack(plain, UP, type_option(name)))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_without_feedback_a_sweep_is_the_plain_rounding(factor: Factor) -> None:
    """Up to ties: both take the nearest value of the same scales."""
    weight = heavy_tailed(UP.in_features, UP.out_features, seed=1)
    for name in ("Q4_K", "IQ4_XS", "Q8_0"):
        _, left = quantized(UP, name, factor.without_feedback())
        importance = factor.diagonal()[factor.perm.argsort()]
        plain = CODEC.unpack(
            plainly_rounded(UP, type_option(name), weight.T, importance), UP, type_option(name)
        )
        assert (left == plain).double().mean() > 0.999


@pytest.mark.parametrize("name", TYPES)
def test_plain_rounding_is_read_alike_by_another_reader_with_and_without_importance(name: str) -> None:
    weight = heavy_tailed(UP.out_features, UP.in_features, seed=5)
    option = type_option(name)
    for importance in (None, correlated_hessian(UP.in_features, seed=6).diagonal()):
        tensors = plainly_rounded(UP, option, weight.half(), importance)
        restored = CODEC.unpack(tensors, UP, option)
        assert torch.equal(foreign_values(name, tensors["blocks"]), restored)
        assert (restored - weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("importance", [None, torch.arange(512.0) + 1])
@pytest.mark.parametrize("name", ["Q2_K", "Q5_0", "IQ4_XS"])
def test_plain_rounding_takes_the_best_search_there_is(name: str, importance: Tensor | None) -> None:
    weight = heavy_tailed(UP.out_features, UP.in_features, seed=5)
    found = plainly_rounded(UP, type_option(name), weight, importance)["blocks"]
    kind = BLOCK_TYPES[name]
    assert torch.equal(found, kind.pack(fit(kind, weight, importance, search="best")))


SHAPES = {
    512: ["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"],
    96: ["IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"],
    40: ["F16"],
}


@pytest.mark.parametrize("in_features", SHAPES)
def test_what_is_tried_fits_the_rows_and_takes_more_bits_one_after_the_other(in_features: int) -> None:
    spec = LinearSpec("model.layers.0.mlp.up_proj", in_features, 24)
    options = CODEC.options(spec)
    assert [option.desc for option in options] == SHAPES[in_features]
    sizes = [CODEC.storage_bits(spec, option) for option in options]
    assert sizes == sorted(set(sizes))
    for option, bits in zip(options, sizes, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[option.desc]]
        assert bits == 8 * size * spec.numel // block
    assert CODEC.measured(spec, "linear") == CODEC.measured(spec, "head") == options
    assert CODEC.measured(spec, "embedding") == options
    assert CODEC.measured(spec, "tied head") == (), "the file has one tensor for both"


HEADS = {
    (2, 512): "Q2_K",
    (3, 512): "Q3_K",
    (4, 512): "Q4_K",
    (5, 512): "Q5_K",
    (6, 512): "Q6_K",
    (8, 512): "Q8_0",
    (4, 96): "Q5_0",
    (6, 96): "Q8_0",
    (6, 40): "F16",
}


@pytest.mark.parametrize(("bits", "in_features"), HEADS)
def test_a_head_is_stored_as_its_bits_say_or_as_its_rows_admit(bits: int, in_features: int) -> None:
    spec = LinearSpec("lm_head", in_features, 100)
    assert CODEC.head_option(spec, bits) == type_option(HEADS[bits, in_features])


def test_a_matrix_of_rows_no_block_divides_goes_through_a_float_grid(factor: Factor) -> None:
    spec = LinearSpec("model.layers.0.mlp.down_proj", 40, 24)
    odd = hessian.factor(correlated_hessian(40, seed=7))
    grid = CODEC.grid(spec, CODEC.options(spec), odd, heavy_tailed(40, 24, seed=1), None)
    assert isinstance(grid, FloatGrid)
    tensors, left = quantized(spec, "F16", odd, parts=2)
    assert torch.equal(foreign_values("F16", tensors["blocks"].view(torch.float16)), left)


def test_what_a_type_cannot_hold_is_refused_by_the_matrixs_name() -> None:
    spec = LinearSpec("model.layers.7.mlp.down_proj", 96, 64)
    with pytest.raises(FormatError, match=r"layers\.7\.mlp\.down_proj has 96 .* blocks of 256; choose Q5_0"):
        CODEC.storage_bits(spec, type_option("Q4_K"))
    with pytest.raises(FormatError, match="no parameters of a GGUF option"):
        type_of(Option("6b", {"bits": [6]}))
    broken = heavy_tailed(64, 96, seed=1)
    broken[3, 5] = float("nan")
    factor = hessian.factor(correlated_hessian(96, seed=8))
    with pytest.raises(FormatError, match=r"layers\.7\.mlp\.down_proj: 1 of 6144 weights are not finite"):
        plainly_rounded(spec, type_option("Q5_0"), broken, None)
    with pytest.raises(FormatError, match=r"layers\.7\.mlp\.down_proj: 1 of 6144 weights are not finite"):
        CODEC.grid(spec, [type_option("Q5_0")], factor, broken.T[factor.perm], None)
