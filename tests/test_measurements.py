"""The measurement that comes with the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from exlq import measurement
from exlq.checkpoint.hashes import file_hashes, tokenizer_hash
from exlq.default_calibration import default_calibration
from exlq.files import sha256_file
from tests.freeze_allocations import FROZEN, MEASUREMENT, ROOT, TARGETS, solved


@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_measurement_gives_the_frozen_allocation(target: float) -> None:
    frozen = next(entry for entry in json.loads(FROZEN.read_text()) if entry["target"] == target)
    found = solved(target)
    changed = {key for key, option in frozen["options"].items() if found["options"].get(key) != option}
    assert found["options"] == frozen["options"], f"{len(changed)} linears differ: {sorted(changed)[:3]}"
    assert found["bpw"] == frozen["bpw"]
    assert found["loss"] == pytest.approx(frozen["loss"], rel=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_bits_per_weight_are_never_above_the_target_and_under_a_hundredth_below(target: float) -> None:
    assert target - 0.01 < solved(target)["bpw"] <= target


def test_the_committed_measurement_is_of_the_bundled_model_and_text(tiny_llama: Path) -> None:
    record = measurement.load(MEASUREMENT)
    assert record.model["sha256"] == file_hashes(tiny_llama)
    assert record.model["tokenizer_sha256"] == tokenizer_hash(tiny_llama)
    assert record.calibration["sha256"] == sha256_file(default_calibration())


def test_at_least_twelve_exl2_options_of_a_linear_are_on_its_front_of_size_and_error() -> None:
    for linear in measurement.load(MEASUREMENT).linears:
        if not linear.key.startswith("model.layers."):
            continue
        options = [option for option in linear.options if option.format == "exl2"]
        ordered = sorted(options, key=lambda option: (option.total_bits, option.err_heldout))
        front = [
            option
            for i, option in enumerate(ordered)
            if all(option.err_heldout < smaller.err_heldout for smaller in ordered[:i])
        ]
        assert len(front) >= 12, f"{linear.key}: {[option.desc for option in front]}"


def test_the_documentation_explains_every_field_of_the_record() -> None:
    text = (ROOT / "docs" / "measurement.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*) \|$", text, re.M)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    tree = json.loads(MEASUREMENT.read_text(encoding="utf-8"))
    linear = next(entry for entry in tree["measurement"] if "options" in entry)
    sections = [tree, tree["model"], tree["calibration"], tree["settings"], linear, linear["options"][0]]
    fields = {name for section in sections for name in section}
    assert fields <= explained, f"not explained: {sorted(fields - explained)}"
