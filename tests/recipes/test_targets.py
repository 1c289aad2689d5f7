"""The least loss within a size and the smallest size within a loss, against trying everything."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from exlq.errors import ConfigError, MeasurementError, TargetError
from exlq.recipes.frontier import frontier
from exlq.recipes.room import Room, Wishes, parse_pins, parse_types, room_of
from exlq.recipes.sheet import sheet_of
from exlq.recipes.targets import within_bits, within_bytes, within_kl
from exlq.recipes.two_budgets import Budgets, within_budgets
from tests.recipes.helpers import every_choice, large, record

FORMATS = ("exl2", "gguf")


def room(format: str, seed: int = 0, bits: float | None = None, pins: tuple[str, ...] = ()) -> Room:
    made = record(1, seed=seed)
    wishes = Wishes(parse_types(None, made), parse_pins(pins, made))
    return room_of(sheet_of(made, format), wishes, bits)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [3.9, 4.8])
@pytest.mark.parametrize("format", FORMATS)
def test_no_choice_within_the_bits_loses_less(format: str, bits: float, seed: int) -> None:
    here = room(format, seed, min(bits, 4.1) if format == "exl2" else bits)
    bits = min(bits, 4.1) if format == "exl2" else bits
    found = within_bits(here, bits)
    assert found.bpw <= bits
    sheet = here.sheet
    best = min(sheet.loss(options) for options in every_choice(here) if sheet.bpw(options) <= bits)
    assert sheet.loss(found.options) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pins", [(), ("v_proj=Q6_K", "v_proj=4"), (r"lm_head=8", r"lm_head=Q2_K")])
def test_no_choice_within_the_bytes_loses_less(format: str, pins: tuple[str, ...], seed: int) -> None:
    here = room(format, seed, pins=pins)
    sheet, choices = here.sheet, list(every_choice(here))
    sizes = sorted(sheet.n_bytes(options) for options in choices)
    for size in (sizes[0], sizes[len(sizes) // 3], sizes[-1] + 5):
        found = within_bytes(here, size)
        assert found.n_bytes <= size
        best = min(sheet.loss(options) for options in choices if sheet.n_bytes(options) <= size)
        assert sheet.loss(found.options) == pytest.approx(best, rel=1e-12)
        assert all(found.options[key] == option for key, option in here.fixed.items())
    with pytest.raises(TargetError, match=f"has {sizes[0]}; ask for that or more"):
        within_bytes(here, sizes[0] - 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("format", FORMATS)
def test_no_smaller_choice_is_predicted_so_little(format: str, seed: int) -> None:
    here = room(format, seed)
    sheet, choices = here.sheet, list(every_choice(here))
    kls = sorted(_kl(here, sheet.loss(options)) for options in choices)
    for kl in (kls[len(kls) // 50] * 1.01, kls[len(kls) // 2] * 1.01, 2 * kls[-1]):
        found = within_kl(here, kl)
        assert _kl(here, sheet.loss(found.options)) <= kl
        best = min(
            (sheet.n_bytes(options), sheet.loss(options))
            for options in choices
            if _kl(here, sheet.loss(options)) <= kl
        )
        assert (found.n_bytes, sheet.loss(found.options)) == pytest.approx(best, rel=1e-12)
    with pytest.raises(TargetError, match="at best; ask for that"):
        within_kl(here, kls[0] / 2)


@pytest.mark.parametrize("format", FORMATS)
def test_no_choice_is_below_the_frontier_and_its_points_are_choices(format: str) -> None:
    here = room(format)
    points, sheet = frontier(here), here.sheet
    choices = {(sheet.n_bytes(o), sheet.bpw(o), f"{sheet.loss(o):.12e}") for o in every_choice(here)}
    for point in points:
        assert (point.n_bytes, point.bpw, f"{point.loss:.12e}") in choices
        least = min(float(loss) for size, _, loss in choices if size <= point.n_bytes)
        assert least == pytest.approx(point.loss, rel=1e-11)
    assert [point.n_bytes for point in points] == sorted({point.n_bytes for point in points})


def test_tied_linears_take_one_type_in_gguf_alone() -> None:
    made = record(1, ties=("self_attn.q_proj", "self_attn.v_proj"))
    here = room_of(sheet_of(made, "gguf"), Wishes())
    found = within_bytes(here, 30_000)
    sheet = here.sheet
    best = min(sheet.loss(o) for o in every_choice(here) if sheet.n_bytes(o) <= 30_000)
    assert sheet.loss(found.options) == pytest.approx(best, rel=1e-12)
    kinds = {found.options[f"model.layers.0.self_attn.{part}_proj"].desc for part in "qv"}
    assert len(kinds) == 1
    assert all(linear.tie is None for linear in sheet_of(made, "exl2").linears)


def test_bits_out_of_reach_are_refused_with_the_range() -> None:
    with pytest.raises(TargetError, match=r"-b 2: as gguf 2\.6250 to 8\.5000 bits per weight can be met"):
        within_bits(room("gguf", bits=2), 2)
    with pytest.raises(TargetError, match="-b nan"):
        within_bits(room("gguf", bits=4), float("nan"))


def test_bytes_want_a_record_that_tells_what_is_beside_the_matrices() -> None:
    older = room_of(sheet_of(replace(record(), extra={}), "gguf"), Wishes())
    with pytest.raises(MeasurementError, match="--file-size: the measurement lacks overhead_bytes of gguf"):
        within_bytes(older, 10**6)
    assert within_kl(older, 1.0).n_bytes > 0


@pytest.mark.parametrize("value", [1.5, -1, "many", True, float("inf")])
def test_bytes_beside_the_matrices_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(MeasurementError, match="overhead_bytes of gguf is"):
        sheet_of(record(extra={"overhead_bytes": {"gguf": value}}), "gguf")


def test_output_errors_predict_no_divergence() -> None:
    here = room_of(sheet_of(record(settings={"objective": "output-error"}), "gguf"), Wishes())
    assert within_bytes(here, 30_000).predicted is None
    with pytest.raises(ConfigError, match="--objective output-error; measure again"):
        within_kl(here, 0.1)


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan"), float("inf")])
def test_a_divergence_that_cannot_be_is_refused(kl: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        within_kl(room("gguf"), kl)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_of_7_billion_weights_is_solved_within_a_second(format: str) -> None:
    made = large(0)
    for solve in (
        lambda: within_bits(room_of(sheet_of(made, format), Wishes(), 4.2), 4.2),
        lambda: within_bytes(room_of(sheet_of(made, format), Wishes()), 4 << 30),
        lambda: within_kl(room_of(sheet_of(made, format), Wishes()), 0.01),
        lambda: frontier(room_of(sheet_of(made, format), Wishes())),
        lambda: within_budgets(room_of(sheet_of(made, "gguf"), Wishes()), Budgets(2 << 30, 2 << 30)),
    ):
        begin = time.process_time()
        solve()
        assert time.process_time() - begin < 1.5, "0.1 to 0.6 s on an idle machine"


def _kl(here: Room, loss: float) -> float:
    found = here.sheet.predict(loss)
    assert found is not None
    return found.kl
