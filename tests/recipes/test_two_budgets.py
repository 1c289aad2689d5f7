"""A model split between GPU and CPU, against trying every split of every choice."""

from __future__ import annotations

import pytest

from exlq.errors import ConfigError, MeasurementError, TargetError
from exlq.recipes.room import Room, Wishes, parse_pins, room_of
from exlq.recipes.sheet import Options, block_of, sheet_of
from exlq.recipes.two_budgets import Budgets, within_budgets
from tests.recipes.helpers import OVERHEAD, every_choice, record

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def room(seed: int = 0, tied: bool = False, *pins: str) -> Room:
    made = record(2, ("self_attn.v_proj", "mlp.down_proj"), seed=seed, tied=tied)
    return room_of(sheet_of(made, "gguf"), Wishes(pins=parse_pins(pins, made)))


def sides(options: Options, n: int, tied: bool) -> tuple[int, int]:
    """Bytes on the GPU and beside it with the last n of two blocks and the head there."""
    on_gpu = {key for key in options if (block := block_of(key)) is not None and block >= 2 - n}
    on_cpu = set(options) - on_gpu
    if n > 2:
        on_gpu.add(EMBEDDING if tied else HEAD)
        on_cpu.discard(HEAD)
    gpu, cpu = (sum(options[key].total_bits for key in side) // 8 for side in (on_gpu, on_cpu))
    return gpu, cpu + OVERHEAD["gguf"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [None, 0, 1, 3, 99])
@pytest.mark.parametrize(("gpu", "cpu"), [(14_000, 20_000), (25_000, 11_000), (0, 40_000), (10**6, 10**6)])
def test_no_split_loses_less(gpu: int, cpu: int, n: int | None, seed: int, tied: bool) -> None:
    here, budgets = room(seed, tied), Budgets(gpu, cpu, n)
    possible = range(4) if n is None else [min(n, 3)]
    losses = {
        (layers, here.sheet.loss(options))
        for options in every_choice(here)
        for layers in possible
        if all(used <= most for used, most in zip(sides(options, layers, tied), (gpu, cpu), strict=True))
    }
    if not losses:
        with pytest.raises(TargetError, match="fits in no split"):
            within_budgets(here, budgets)
        return
    found = within_budgets(here, budgets)
    assert found.split is not None
    best = min(loss for _, loss in losses)
    assert here.sheet.loss(found.options) == pytest.approx(best, rel=1e-12)
    assert found.split[1:] == sides(found.options, found.split.n_gpu_layers, tied)
    assert found.split.gpu_bytes <= gpu
    assert found.split.cpu_bytes <= cpu


def test_of_equal_answers_the_one_with_more_on_the_gpu_is_taken() -> None:
    found = within_budgets(room(), Budgets(10**9, 10**9))
    assert found.split is not None
    assert found.split.n_gpu_layers == 3
    assert {option.desc for option in found.options.values()} >= {"Q8_0"}


def test_pins_stay_on_their_side() -> None:
    found = within_budgets(room(0, False, "lm_head=Q2_K", r"layers\.0=Q6_K"), Budgets(10**9, 10**9))
    assert found.options[HEAD].desc == "Q2_K"
    assert found.options["model.layers.0.mlp.down_proj"].desc == "Q6_K"


def test_budgets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--n-gpu-layers -1: 0 or more"):
        Budgets(1, 1, -1)
    with pytest.raises(TargetError, match="--gpu-bytes 1 --cpu-bytes 2: the smallest file, "):
        within_budgets(room(), Budgets(1, 2))
    older = room_of(sheet_of(record(extra={}), "gguf"), Wishes())
    with pytest.raises(MeasurementError, match="--gpu-bytes: the measurement lacks overhead_bytes"):
        within_budgets(older, Budgets(10**6, 10**6))
