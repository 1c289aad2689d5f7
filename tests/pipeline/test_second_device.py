"""Rounding with all tensors on another device than the CPU: nothing is mixed, little is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exlq.formats.codecs import CODECS
from exlq.formats.exl2_options import OPTIONS
from exlq.numerics import hessian
from exlq.numerics.coupling import Coupling, CouplingSum
from exlq.numerics.drift import DriftSum
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import plan, trial
from exlq.types import LinearSpec, Option
from tests.far import DEVICE, Far, FarDevice
from tests.helpers import make_model
from tests.numerics.helpers import correlated_hessian, correlated_tokens, heavy_tailed
from tests.pipeline.helpers import convert, settings, write_ids

SPEC = LinearSpec("model.layers.0.mlp.up_proj", 256, 32)
KEPT = {"exl2": ("1:2b 64g s4", "0.25:5b/0.75:4b 32g s4", "1:8b 128g s4"), "gguf": ("Q2_K", "IQ4_XS", "Q6_K")}


WAITS = 60  # of the host for the device, in a sweep of 256 columns and all around it
GROUPS = 2  # of rows


def options_of(name: str) -> list[Option]:
    return [option for option in CODECS[name].options(SPEC) if option.desc in KEPT[name]]


def coupling_on(device: torch.device) -> Coupling:
    total = CouplingSum.zeros(32, device)
    total.add(correlated_tokens(400, 32, seed=3).to(device))
    made = Coupling.of(total.stored(), device)
    assert made is not None
    return made


def tried(name: str, device: torch.device, descends: bool) -> trial.Trials:
    factor = hessian.factor(correlated_hessian(256, 0).to(device))
    factor = factor if descends else factor._replace(curvature=None)
    heldout = correlated_hessian(256, 0).to(device)[factor.perm][:, factor.perm]
    weight = heavy_tailed(32, 256, seed=1).to(device)
    evidence, generator = trial.Evidence(factor, heldout), torch.Generator().manual_seed(0)
    return trial.try_options(
        CODECS[name], SPEC, options_of(name), weight, evidence, torch.linspace(1, 2, 32), generator
    )


@pytest.mark.parametrize("descends", [True, False], ids=["descent", "sweep alone"])
@pytest.mark.parametrize("name", ["exl2", "gguf"])
def test_options_are_tried_on_the_device_of_the_weight(name: str, descends: bool) -> None:
    near = tried(name, torch.device("cpu"), descends)
    with FarDevice() as device:
        far = tried(name, DEVICE, descends)
    for one, other in zip(far.options, near.options, strict=True):
        assert one.err == pytest.approx(other.err, rel=0.05)
    assert device.syncs.total() < WAITS, device.syncs


@pytest.mark.parametrize("name", ["exl2", "gguf"])
def test_a_matrix_is_rounded_for_good_on_the_device_of_its_factor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exlq.numerics.coupling.GROUPS", GROUPS)
    monkeypatch.setattr(f"exlq.formats.{name}_descent.ROUNDS", 1)
    weight, option = heavy_tailed(32, 256, seed=1), options_of(name)[1]
    with FarDevice() as device:
        total, drift = HessianSum.zeros(256, DEVICE), DriftSum(256, 32, DEVICE)
        for heldout in (False, True):
            x = correlated_tokens(1200, 256, seed=4).to(DEVICE)
            total.add(x)
            drift.add(x * 1.01, x, x[:, :32], heldout)
        factor = hessian.factor(total.calibrated())
        moved = drift.corrected(weight.to(DEVICE), factor)
        stored, restored = trial.quantize(CODECS[name], SPEC, option, moved, factor, coupling_on(DEVICE))
        assert isinstance(restored, Far)
        assert not any(isinstance(tensor, Far) for tensor in stored.values())
    assert torch.equal(CODECS[name].unpack(stored, SPEC, option), restored.near)
    assert device.syncs.total() < WAITS * GROUPS, device.syncs


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_conversion_stays_on_its_device(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, measurement, both second passes and the check of what was written."""
    for name in ("exl2", "gguf"):
        monkeypatch.setattr(f"exlq.formats.{name}_descent.ROUNDS", 1)
    monkeypatch.setattr("exlq.numerics.coupling.GROUPS", GROUPS)
    monkeypatch.setattr("exlq.formats.exl2_codec.OPTIONS", OPTIONS[6:27:10])
    made = make_model("llama", tmp_path / "model", tied=tied, num_hidden_layers=1)
    ids = write_ids(tmp_path / "ids.parquet")
    wanted: dict[str, Any] = {
        "bits": 4.5,
        "formats": ("exl2", "gguf"),
        "measure": None,
        "rows": 8,
        "measurement_rows": 16,
    }
    near = convert(settings(made, tmp_path / "near", ids, **wanted))
    monkeypatch.setattr(plan, "usable_devices", lambda config: [DEVICE])
    with FarDevice():
        far = convert(settings(made, tmp_path / "far", ids, **wanted))
    for name, output in near["outputs"].items():
        one, other = (each["evaluation"]["kl_mean"] for each in (output, far["outputs"][name]))
        assert other == pytest.approx(one, rel=0.2)
