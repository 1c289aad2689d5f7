"""The law of a codec, kept by EXL2: what is unpacked is what the sweep left, in as many bits as announced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.codec import Role
from exlq.formats.exl2 import SUFFIXES
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import sweep
from exlq.types import LinearSpec, Option
from tests.numerics.helpers import correlated_hessian, heavy_tailed

CODEC = Exl2Codec()
SHAPES = [(32, 1), (64, 33), (192, 100), (416, 64)]  # in, out
ALL = [*OPTIONS, *HEAD_OPTIONS.values()]


def quantized(spec: LinearSpec, option: Option, parts: int) -> tuple[dict[str, Tensor], Tensor, Factor]:
    """Stored tensors, what the sweeps left (out, in) in the model's channel order, and the factor."""
    factor = hessian.factor(correlated_hessian(spec.in_features, seed=spec.in_features))
    weight = heavy_tailed(spec.in_features, spec.out_features, seed=1)[factor.perm]
    values, levels, grids, leader = torch.empty_like(weight), torch.empty(weight.shape).byte(), [], None
    for part in range(parts):
        rows = torch.arange(part, spec.out_features, parts)
        grid = CODEC.grid(spec, [option], factor, weight[:, rows], leader)
        values[:, rows] = sweep(weight[:, rows].contiguous(), factor, grid, 1).values[:, 0]
        levels[:, rows] = CODEC.levels(spec, option, grid, values[:, rows])
        grids.append((rows, grid))
        leader = leader or grid
    return CODEC.pack(spec, option, levels, grids, factor.perm), values[factor.perm.argsort()].T, factor


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("option", ALL, ids=lambda option: option.desc)
def test_unpacked_is_what_the_sweep_left_in_the_bits_announced(
    option: Option, shape: tuple[int, int]
) -> None:
    spec = LinearSpec("model.layers.0.mlp.up_proj", *shape)
    tensors, left, factor = quantized(spec, option, parts=1)
    assert tuple(tensors) == SUFFIXES
    assert torch.equal(CODEC.unpack(tensors, spec, option), left)
    stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert CODEC.storage_bits(spec, option) == 8 * stored_bytes
    assert torch.equal(tensors["q_invperm"].long()[factor.perm], torch.arange(spec.in_features))


@pytest.mark.parametrize("option", [OPTIONS[1], OPTIONS[5], OPTIONS[18], OPTIONS[29]], ids=lambda o: o.desc)
def test_rows_swept_in_parts_keep_the_law(option: Option) -> None:
    spec = LinearSpec("model.layers.0.mlp.up_proj", 192, 100)
    tensors, left, _ = quantized(spec, option, parts=3)
    assert torch.equal(CODEC.unpack(tensors, spec, option), left)


@pytest.mark.parametrize(("in_features", "complaint"), [(80, "multiple of 32"), (65568, "can address 65535")])
def test_a_matrix_exl2_cannot_hold_is_refused_by_name(in_features: int, complaint: str) -> None:
    spec = LinearSpec("model.layers.7.mlp.down_proj", in_features, 64)
    roles: tuple[Role, ...] = ("linear", "head", "tied head", "embedding")
    asked: list[Callable[[LinearSpec], tuple[Option, ...]]] = [CODEC.options]
    asked += [partial(CODEC.measured, role=role) for role in roles]
    for ask in asked:
        with pytest.raises(FormatError, match=f"model.layers.7.mlp.down_proj.*{complaint}"):
            ask(spec)


def test_the_tables_are_those_of_the_format() -> None:
    spec = LinearSpec("lm_head", 64, 100)
    assert CODEC.options(spec) == CODEC.measured(spec, "linear") == OPTIONS
    heads = tuple(CODEC.head_option(spec, bits) for bits in (2, 3, 4, 5, 6, 8))
    assert CODEC.measured(spec, "head") == CODEC.measured(spec, "tied head") == heads
    assert CODEC.measured(spec, "embedding") == (), "it stays in float16"


@pytest.mark.parametrize(
    ("key", "bias", "sorts"),
    [("mlp.down_proj", True, False), ("mlp.down_proj", False, True), ("mlp.up_proj", True, True)],
)
def test_only_a_biased_down_proj_keeps_its_channels_in_place(key: str, bias: bool, sorts: bool) -> None:
    """ExLlamaV2 applies its order to what gate and up give, but not to their biases."""
    assert CODEC.sorts_channels(LinearSpec(f"model.layers.3.{key}", 96, 64, bias)) == sorts
