"""Triton's kernels against the plain forms in torch; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq.formats.codecs import CODECS
from exlq.formats.exl2_grid import Exl2Grid, levels_of
from exlq.formats.exl2_options import groups_of
from exlq.formats.gguf_blocks import BLOCK_TYPES
from exlq.formats.gguf_codec import GgufCodec, type_option
from exlq.numerics import hessian, kernels, scales
from exlq.numerics.descent import Lattice, descend
from exlq.numerics.hessian import Factor, energies, runs_of
from exlq.numerics.rounding import Grid, Rounded, sweep
from exlq.numerics.static_grid import Affine, StaticGrid
from exlq.pipeline import trial
from exlq.types import Group, LinearSpec
from tests.conftest import REPOSITORY
from tests.numerics.helpers import correlated_hessian, heavy_tailed
from tests.numerics.test_descent import FreeMoves
from tests.numerics.test_descent import problem as descent_problem
from tests.numerics.test_static_grid import KINDS, TABLE, affine, value_table

GPU = torch.device("cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu")
RUNS = kernels.TRITON and (kernels.INTERPRETED or GPU.type == "cuda")
on_triton = pytest.mark.skipif(not RUNS, reason="run by the first test of the file, or where there is a GPU")
PLACES = [f"exlq.numerics.{name}" for name in ("rounding", "static_grid", "scales", "descent")]
PLACES.append("exlq.formats.exl2_grid")
ALIKE = 0.999  # of the levels: ties in float32, summed in another order, explain the rest


@pytest.mark.slow
@pytest.mark.skipif(not kernels.TRITON, reason="triton is not installed: pip install exlq[triton]")
@pytest.mark.skipif(RUNS, reason="the tests below run as they are")
def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


@contextmanager
def plainly() -> Iterator[None]:
    """The forms in torch alone: neither Triton nor numba."""
    with pytest.MonkeyPatch.context() as patch:
        for place in PLACES:
            patch.setattr(f"{place}.for_triton", lambda _: False)
        for name in ("scales", "rounding", "descent"):
            patch.setattr(f"exlq.numerics.{name}.COMPILED", False)
        yield


def problem(in_features: int, out: int, seed: int = 0) -> tuple[Tensor, Factor]:
    """Weight (in, out) in processing order, factor in act-order."""
    factor = hessian.factor(correlated_hessian(in_features, seed).to(GPU))
    return heavy_tailed(in_features, out, seed=seed + 1).to(GPU)[factor.perm], factor


def exl2_layout(bits: list[int], shares: list[float], size: int, in_features: int) -> list[Group]:
    return groups_of({"bits": bits, "bits_prop": shares, "group_size": size}, in_features)


def layouts(in_features: int) -> list[list[Group]]:
    """All widths of EXL2, and groups of unlike sizes."""
    ways: list[tuple[list[int], list[float], int]] = [([bits], [1], 32) for bits in (2, 3, 4, 5, 6, 8)]
    ways += [([4, 2], [0.3, 0.7], 32), ([5, 4], [0.1, 0.9], 64), ([3], [1], 128)]
    return [exl2_layout(bits, shares, size, in_features) for bits, shares, size in ways]


@on_triton
def test_columns_without_feedback_are_rounded_bit_for_bit() -> None:
    """Halves between two levels, zero scales and weights beyond the ends among them."""
    weight, factor = problem(192, 40)
    options = [affine(kind, seed) for seed, kind in enumerate(KINDS)]
    moved = [Affine(o.scale.to(GPU), o.offset.to(GPU), o.low, o.high, o.table) for o in options]
    grid = StaticGrid(moved, factor.perm)
    values = 2 * weight[32:64].unsqueeze(1).repeat(1, len(options), 1)
    for i, option in enumerate(options):
        table = value_table(option, int(factor.perm[40]))
        values[8, i] = ((table[3] + table[4]) / 2).float()
    with plainly():
        wanted = torch.stack([grid.nearest(32 + i, column) for i, column in enumerate(values)])
    errors, energy = torch.empty_like(values), torch.zeros(len(options), 40, device=GPU)
    none, ones = torch.zeros(32, 32, device=GPU), torch.ones(32, device=GPU)
    before = values.clone()
    grid.kernel(32, 64)(values, errors, weight[32:64].contiguous(), none, ones, energy)
    assert torch.equal(values, wanted)
    assert torch.equal(errors, weight[32:64].unsqueeze(1) - wanted)
    assert torch.allclose(energy, (before - wanted).square().sum(0), rtol=1e-4, atol=0)


@on_triton
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6], ids=["normal", "small", "subnormal"])
def test_exl2_columns_without_feedback_are_rounded_bit_for_bit(scale: float) -> None:
    """Products that float16 holds as subnormals among them."""
    weight, factor = problem(64, 37)
    grids = Exl2Grid(layouts(64), factor.pivots, 37), Exl2Grid(layouts(64), factor.pivots, 37)
    weight *= scale
    values = weight.unsqueeze(1).repeat(1, 9, 1)
    with plainly():
        for grid in grids:
            grid.open(0, values)
        wanted = torch.stack([grids[0].nearest(i, column) for i, column in enumerate(values[:32])])
    errors, energy = torch.empty_like(values[:32]), torch.zeros(9, 70, device=GPU)
    none, ones = torch.zeros(32, 32, device=GPU), torch.ones(32, device=GPU)
    grids[1].kernel(0, 32)(values[:32], errors, weight[:32], none, ones, energy)
    assert torch.equal(values[:32], wanted)


def both(grids: list[Grid], weight: Tensor, factor: Factor, n_options: int) -> tuple[Rounded, Rounded]:
    """The outcome of the kernels and of the plain form; the grids are alike."""
    found = sweep(weight, factor, grids[0], n_options)
    with plainly():
        return found, sweep(weight, factor, grids[1], n_options)


@on_triton
@pytest.mark.parametrize(("in_features", "out"), [(96, 37), (32, 5)])
def test_a_sweep_over_exl2_grids_is_the_plain_one(in_features: int, out: int) -> None:
    weight, factor = problem(in_features, out)
    members = layouts(in_features)
    grids = [Exl2Grid(members, factor.pivots, out) for _ in range(2)]
    found, plain = both(list(grids), weight, factor, len(members))
    for option, groups in enumerate(members):
        codes, steps = grids[0].codes[option], grids[0].multipliers[option]
        same = (codes == grids[1].codes[option]).float().mean().item()
        assert same > 0.98, f"{same:.2%} of the scale codes of option {option}"
        levels, wanted = (
            levels_of(each.values[:, option], grid.codes[option], grid.multipliers[option], groups)
            for each, grid in zip((found, plain), grids, strict=True)
        )
        whole = (levels == wanted).float().mean().item()
        assert whole > 0.97, f"{whole:.2%} of the levels of option {option}, scales {steps[:2]}"
    assert torch.allclose(found.energy.sum(1), plain.energy.sum(1), rtol=0.01)
    assert torch.allclose(found.errors, weight.unsqueeze(1) - found.values, atol=0, rtol=0)


@on_triton
def test_a_sweep_on_scales_of_another_is_the_plain_one() -> None:
    """With the same scales, so that only the sums' order parts the two."""
    weight, factor = problem(96, 37)
    members = layouts(96)
    first = Exl2Grid(members, factor.pivots, 37)
    with plainly():
        plain = sweep(weight, factor, first, len(members))
    grid = _Fixed(first, members)
    found = sweep(weight, factor, grid, len(members))
    alike = (found.values == plain.values).float().mean().item()
    assert alike > ALIKE, f"{alike:.3%} of the values"


class _Fixed:
    """An EXL2 grid whose scales are those that another has chosen."""

    def __init__(self, of: Exl2Grid, members: list[list[Group]]) -> None:
        self.edges, self._of, self._members = of.edges, of, members
        self.nearest, self.kernel = of.nearest, of.kernel

    def open(self, column: int, current: Tensor) -> None:
        of = self._of
        for option, groups in enumerate(self._members):
            for index, group in enumerate(groups):
                if group.start == column:
                    scale = (of.codes[option][index].int() + 1).square().half() * of.multipliers[option][
                        index
                    ]
                    of._scale[option] = scale.float()
                    of._low[option] = -(2.0 ** (group.bits - 1))

    def of_rows(self, rows: Tensor) -> Exl2Grid:
        return self._of.of_rows(rows)


@on_triton
def test_a_sweep_over_gguf_types_is_the_plain_one() -> None:
    names = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q8_0")
    weight, factor = problem(256, 20)
    spec = LinearSpec("a", 256, 20)
    grid = GgufCodec().grid(spec, [type_option(name) for name in names], factor, weight, None)
    found, plain = both([grid, grid], weight, factor, len(names))
    assert isinstance(grid, StaticGrid)
    for option, name in enumerate(names):
        assert BLOCK_TYPES[name].name == name
        levels, wanted = (
            grid.options[option].levels(each.values[:, option][factor.perm.argsort()])
            for each in (found, plain)
        )
        alike = (levels == wanted).float().mean().item()
        assert alike > ALIKE, f"{alike:.3%} of the levels of {name}"
    assert torch.allclose(found.energy, plain.energy, rtol=0.02)


@on_triton
@pytest.mark.parametrize(("size", "out"), [(32, 300), (128, 37)])
def test_scales_are_those_of_the_plain_search(size: int, out: int) -> None:
    bits = [2, 3, 4, 5, 6, 8]
    weights = heavy_tailed(size, len(bits), out, seed=33).to(GPU)
    weights[:, 2] *= 1e-6  # scales of float16's smallest
    weights[:, 3, :5] = 0
    importance = torch.rand(size, generator=torch.Generator().manual_seed(34)).to(GPU)
    multiplier, codes = scales.fit_squared_scales(weights, importance, bits)
    given = scales.fit_squared_scales(weights, importance, bits, multiplier * 1.1)[1]
    with plainly():
        wanted = scales.fit_squared_scales(weights, importance, bits)
        same = scales.fit_squared_scales(weights, importance, bits, multiplier * 1.1)[1]
    assert torch.equal(multiplier, wanted[0])
    assert (codes == wanted[1]).float().mean() > 0.99
    assert (given == same).float().mean() > 0.99


class _AtFloat16:
    """Moves whose values are float16's, as EXL2's are."""

    def __init__(self, of: FreeMoves) -> None:
        self._of, self.take = of, of.take

    def candidates(self, index: int) -> Lattice:
        found = self._of.candidates(index)
        return found._replace(offset=torch.zeros_like(found.offset), float16=True)


@on_triton
@pytest.mark.parametrize(
    ("run", "table", "float16"), [(16, None, False), (32, TABLE, False), (24, None, True)], ids=str
)
def test_a_descent_is_the_plain_one(run: int, table: tuple[int, ...] | None, float16: bool) -> None:
    weight, of, moves = descent_problem(96, 37, run, table)
    weight, of = weight.to(GPU), of.to(GPU)
    scale, offset = moves.scale.to(GPU), moves.offset.to(GPU)
    free = [FreeMoves(scale, offset, run, table) for _ in range(2)]
    first, other = ([_AtFloat16(each) for each in free]) if float16 else free
    runs, start = runs_of(of, [run] * (96 // run)), free[0].rounded(weight)
    before = weight.clone(), start.clone()
    found, cost = descend(weight, start, of, runs, first, rounds=1)
    with plainly():
        plain, plain_cost = descend(weight, start, of, runs, other, rounds=1)
    alike = (found == plain).float().mean().item()
    assert alike > 0.98, f"{alike:.2%} of the values"
    assert (free[0].scale == free[1].scale).float().mean() > 0.98
    torch.testing.assert_close(cost.sum(), plain_cost.sum(), rtol=0.01, atol=0)
    torch.testing.assert_close(cost, energies(weight - found, of), rtol=1e-3, atol=1e-6)
    assert torch.equal(weight, before[0])
    assert torch.equal(start, before[1])


@on_triton
@pytest.mark.parametrize(("name", "desc"), [("exl2", "0.25:5b/0.75:4b 32g s4"), ("gguf", "Q4_K")])
def test_what_sweep_and_descent_leave_is_what_a_file_gives_back(
    name: str, desc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantize` raises where a value is not, bit for bit, one that the format has."""
    monkeypatch.setattr(f"exlq.formats.{name}_descent.ROUNDS", 1)
    codec, spec = CODECS[name], LinearSpec("a", 256, 32)
    (option,) = (each for each in codec.options(spec) if each.desc == desc)
    factor = hessian.factor(correlated_hessian(256, 0).to(GPU))
    weight = heavy_tailed(32, 256, seed=1).to(GPU)
    _, restored = trial.quantize(codec, spec, option, weight, factor)
    with plainly():
        _, plain = trial.quantize(codec, spec, option, weight, factor)
    lost, known = (
        energies((weight - x).T, correlated_hessian(256, 0).to(GPU)).sum() for x in (restored, plain)
    )
    torch.testing.assert_close(lost, known, rtol=0.02, atol=0)
