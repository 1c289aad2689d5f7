"""The options of EXL2: their groups by the format's row counts, their sizes, and the front they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import FormatError
from exlq.formats import exl2
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS, WIDTHS, groups_of
from exlq.models.open import open_model
from exlq.names import HEAD_BITS
from exlq.numerics import hessian
from exlq.pipeline import trial
from exlq.types import Option

ALL = [*OPTIONS, *HEAD_OPTIONS.values()]


def described(option: Option) -> str:
    """An option's description as its parameters have it."""
    bits, shares = option.qparams["bits"], option.qparams["bits_prop"]
    mix = "/".join(f"{share:g}:{width}b" for share, width in zip(shares, bits, strict=True))
    return f"{mix} {option.qparams['group_size']}g s4"


def walked(qparams: dict[str, Any], in_features: int) -> list[tuple[int, int]]:
    """(bits, rows) of each group, counted down width by width."""
    remaining, groups = in_features, []
    for width, share in zip(qparams["bits"], qparams["bits_prop"], strict=True):
        size = qparams["group_size"]
        size = size if isinstance(size, int) else size[str(width)]
        for _ in range(math.ceil(min(in_features * share, remaining) / size)):
            groups.append((width, min(size, remaining)))
            remaining -= groups[-1][1]
    return groups


@st.composite
def mixes(draw: Any) -> dict[str, Any]:
    bits = sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1, max_size=4)), reverse=True)
    cuts = sorted(draw(st.lists(st.integers(0, 20), min_size=len(bits) - 1, max_size=len(bits) - 1)))
    shares = [(b - a) / 20 for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
    sizes = st.sampled_from([32, 64, 96, 128])
    size = draw(st.one_of(sizes, st.fixed_dictionaries({str(width): sizes for width in bits})))
    return {"group_size": size, "bits": bits, "bits_prop": shares, "scale_bits": 4}


@settings(max_examples=200, deadline=None)
@given(mixes(), st.integers(1, 40).map(lambda blocks: 32 * blocks))
def test_groups_follow_the_row_counts_of_the_format(qparams: dict[str, Any], in_features: int) -> None:
    groups = groups_of(qparams, in_features)
    assert [(group.bits, group.size) for group in groups] == walked(qparams, in_features)
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    assert groups[-1].stop == in_features


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.desc)
def test_every_option_makes_groups_the_kernels_accept(option: Option) -> None:
    for in_features in [*range(32, 1025, 32), 4096, 11008, 14336]:
        groups = groups_of(option.qparams, in_features)
        assert groups[-1].stop == in_features
        assert all(group.size % 32 == 0 and group.size > 0 for group in groups)
        widths = [group.bits for group in groups]
        assert widths == sorted(widths, reverse=True)
        assert set(widths) <= {2, 3, 4, 5, 6, 8}


def test_group_sizes_may_be_given_by_width_as_numbers_or_as_json_has_them() -> None:
    qparams = {"group_size": {"6": 32, "3": 64, "2": 64}, "bits": [6, 3, 2], "bits_prop": [0.05, 0.2, 0.75]}
    numbers = qparams | {"group_size": {6: 32, 3: 64, 2: 64}}
    expected = [(6, 32), (3, 64), (2, 64), (2, 64), (2, 32)]
    for each in (qparams, numbers):
        assert [(group.bits, group.size) for group in groups_of(each, 256)] == expected


@pytest.mark.parametrize(
    ("bits", "shares", "in_features", "complaint"),
    [
        ([7], [1], 64, "EXL2 has widths"),
        ([4, 5], [0.5, 0.5], 64, "falling"),
        ([4], [0.5, 0.5], 64, "EXL2 has widths"),
        ([4], [1], 80, "80 input features: EXL2 needs a multiple of 32"),
        ([4, 3], [0.25, 0.25], 256, "leave 128 of 256 rows"),
        ([4, 3], [1.2, -0.2], 256, r"shares \[1.2, -0.2\]"),
        (4, [1], 256, "no parameters of an EXL2 option"),
    ],
)
def test_parameters_that_fit_no_matrix_are_refused(
    bits: Any, shares: Sequence[float], in_features: int, complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        groups_of({"group_size": 32, "bits": bits, "bits_prop": shares}, in_features)


@pytest.mark.parametrize(
    ("group_size", "complaint"),
    [(48, "groups of 48"), (0, "groups of 0"), (None, "groups of None"), ({"5": 32}, "no parameters")],
)
def test_group_sizes_the_kernels_cannot_take_are_refused(group_size: Any, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        groups_of({"group_size": group_size, "bits": [4], "bits_prop": [1]}, 256)


def test_descriptions_say_what_the_parameters_say_and_differ() -> None:
    assert [option.desc for option in ALL] == [described(option) for option in ALL]
    assert len({option.desc for option in OPTIONS}) == len(OPTIONS)
    assert OPTIONS[0].desc == "1:2b 128g s4"
    assert HEAD_OPTIONS[6].desc == "0.15:8b/0.85:6b 32g s4"


def test_shares_add_up_to_exactly_one_and_name_real_widths() -> None:
    for option in ALL:
        assert sum(option.qparams["bits_prop"]) == 1.0
        assert option.qparams["scale_bits"] == 4


@pytest.mark.parametrize("options", [OPTIONS, tuple(HEAD_OPTIONS.values())], ids=["decoder", "head"])
@pytest.mark.parametrize("shape", [(4096, 4096), (2048, 5632)])
def test_options_come_with_fewest_bits_first(options: tuple[Option, ...], shape: tuple[int, int]) -> None:
    bits = [exl2.storage_bits(groups_of(option.qparams, shape[0]), shape[1]) for option in options]
    assert bits == sorted(set(bits))


def test_options_reach_from_about_two_to_eight_bits() -> None:
    bpw = [exl2.storage_bits(groups_of(o.qparams, 4096), 4096) / 4096**2 for o in OPTIONS]
    assert bpw[0] < 2.15
    assert bpw[-1] > 8
    steps = [after - before for before, after in pairwise(bpw)]
    assert max(steps) < 1.05
    assert {width for o in OPTIONS for width in o.qparams["bits"]} == {2, 3, 4, 5, 6, 8}
    assert {o.qparams["group_size"] for o in OPTIONS} == {32, 64, 128}


def test_a_head_has_about_the_bits_asked_for() -> None:
    assert tuple(HEAD_OPTIONS) == HEAD_BITS
    for asked, option in HEAD_OPTIONS.items():
        bpw = exl2.storage_bits(groups_of(option.qparams, 4096), 32000) / (4096 * 32000)
        assert asked <= bpw < asked + 0.75


def test_at_least_twelve_options_lie_on_the_convex_front_of_a_real_linear(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, open_checkpoint(tiny_llama), device=torch.device("cpu"))
    ids = torch.randint(4, model.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    total = hessian.HessianSum.zeros(model.hidden_size, torch.device("cpu"))
    with model.block(0) as block:
        block.forward(model.embed(ids), lambda stage, x: total.add(x) if stage == "attn_in" else None)
    factor = hessian.factor(total.mean())
    spec = next(linear.spec for linear in model.linears(0) if linear.spec.key.endswith("q_proj"))
    evidence = trial.Evidence(factor, total.mean()[factor.perm][:, factor.perm])
    codec, weight = Exl2Codec(), model.linear_weight(spec.key).float()
    fisher, generator = torch.ones(spec.out_features), torch.Generator()
    tried = trial.try_options(codec, spec, OPTIONS, weight, evidence, fisher, generator)
    points = [
        (codec.storage_bits(spec, option), result.err)
        for option, result in zip(OPTIONS, tried.options, strict=True)
    ]
    assert len(convex_front(points)) >= 12, convex_front(points)


def convex_front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that are best for some price of a bit: the lower convex hull, as far as it falls."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        if not hull or y < hull[-1][1]:
            hull.append((x, y))
    return hull
