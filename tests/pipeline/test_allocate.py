"""The bits spent: never above what was asked, and on a real model nearly all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from exlq import measurement
from exlq.errors import MeasurementError
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import OPTIONS
from exlq.measurement import Measurement
from exlq.pipeline.allocate import Choice
from exlq.pipeline.exl2_output import Exl2Output
from exlq.pipeline.plan import Plan, make_plan
from exlq.types import Option
from tests.helpers import make_model
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import settings, stored_bits

CODEC = Exl2Codec()
TARGETS = [2.5, 3.0, 3.7, 4.25, 5.0, 6.0, 7.5]


@pytest.fixture(scope="module")
def bundled_plan(bundled: Finished) -> Plan:
    return make_plan(bundled.config)


@pytest.fixture(scope="module")
def record(bundled: Finished) -> Measurement:
    return measurement.load(bundled.measurement)


def at(plan: Plan, bits: float) -> Plan:
    return replace(plan, config=replace(plan.config, bits=bits))


def allocate(plan: Plan, record: Measurement) -> Choice:
    return Exl2Output(plan).allocate(record)


def recounted(plan: Plan, choice: Choice) -> int:
    """Bits of the choice as the codec counts them, which is as the files hold them."""
    return sum(CODEC.storage_bits(spec, choice.options[spec.key]) for spec in plan.linears)


@pytest.mark.parametrize("bits", TARGETS)
def test_the_bundled_model_comes_within_a_hundredth_of_a_bit_below(
    bundled_plan: Plan, record: Measurement, bits: float
) -> None:
    choice = allocate(at(bundled_plan, bits), record)
    total = recounted(bundled_plan, choice)
    assert choice.allocation is not None
    assert choice.allocation.total_bits == total
    assert choice.bpw == total / bundled_plan.numel
    assert bits - 0.01 < total / bundled_plan.numel <= bits


def test_more_bits_lose_less(bundled_plan: Plan, record: Measurement) -> None:
    losses = [allocate(at(bundled_plan, bits), record).loss or 0.0 for bits in TARGETS]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5 * losses[3] > 25 * losses[-1] > 0


def test_what_the_files_of_the_bundled_model_hold_is_what_was_allocated(bundled: Finished) -> None:
    bits = stored_bits(bundled.model)
    del bits["lm_head"]
    with safe_open(bundled.config.in_dir / "model.safetensors", "pt") as source:
        numel = sum(source.get_tensor(f"{key}.weight").numel() for key in bits)
    assert bundled.summary["outputs"]["exl2"]["bpw"] == sum(bits.values()) / numel
    assert 3.99 < sum(bits.values()) / numel <= 4.0


def test_the_lowest_target_in_reach_is_reached(finished: Finished) -> None:
    plan = make_plan(finished.config)
    record = measurement.load(finished.measurement)
    sizes = [[CODEC.storage_bits(spec, option) for option in OPTIONS] for spec in plan.linears]
    low, high = (sum(map(of, sizes)) for of in (min, max))
    assert recounted(plan, allocate(at(plan, low / plan.numel), record)) == low
    assert recounted(plan, allocate(at(plan, high / plan.numel), record)) <= high


def test_the_predicted_loss_is_the_sum_over_the_linears_and_the_head(finished: Finished) -> None:
    plan = make_plan(finished.config)
    record = measurement.load(finished.measurement)
    choice = allocate(plan, record)
    wanted = 0.0
    for linear in record.linears:
        if linear.key in choice.options:
            option = choice.options[linear.key]
            wanted += next(o.loss for o in linear.options if o.desc == option.desc)
    assert choice.loss == pytest.approx(wanted, rel=1e-12)
    assert choice.options.keys() == {spec.key for spec in plan.linears} | {"lm_head"}


def test_a_record_that_lacks_something_is_refused_by_name(finished: Finished) -> None:
    plan = make_plan(finished.config)
    record = measurement.load(finished.measurement)
    first, *others = record.linears
    with pytest.raises(MeasurementError, match=r"lacks model\.layers\.0\.self_attn\.q_proj"):
        allocate(plan, replace(record, linears=tuple(others)))
    headless = tuple(linear for linear in record.linears if linear.key != "lm_head")
    with pytest.raises(MeasurementError, match="lacks lm_head"):
        allocate(plan, replace(record, linears=headless))
    gguf = replace(first.options[0], qparams={"type": "Q4_K"})
    with pytest.raises(MeasurementError, match=r"no exl2 options of .*q_proj: .* without --measure"):
        allocate(plan, replace(record, linears=(replace(first, options=(gguf,)), *others)))


def test_a_record_of_a_model_of_another_size_is_refused(
    finished: Finished, ids_file: Path, tmp_path: Path
) -> None:
    wider = make_model("llama", tmp_path / "wider", tied=False, intermediate_size=128)
    plan = make_plan(settings(wider, tmp_path / "out", ids_file))
    with pytest.raises(MeasurementError, match=r"mlp\.gate_proj has 6144 weights, this model's 8192"):
        allocate(plan, measurement.load(finished.measurement))


def test_options_come_out_of_the_record_as_the_codec_takes_them(finished: Finished) -> None:
    plan = make_plan(finished.config)
    choice = allocate(plan, measurement.load(finished.measurement))
    for spec in plan.linears:
        assert choice.options[spec.key] in CODEC.options(spec)
    assert isinstance(choice.options["lm_head"], Option)
