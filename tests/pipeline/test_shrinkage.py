"""What a Hessian of few tokens is worth, on the inputs of a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq.calibration import cut_rows, load_tokenizer, read_stream
from exlq.checkpoint.open import open_checkpoint
from exlq.default_calibration import default_calibration
from exlq.formats.codecs import CODECS
from exlq.models.open import open_model
from exlq.numerics import hessian
from exlq.numerics.hessian import HessianSum
from exlq.pipeline import trial
from exlq.types import LinearSpec

CPU = torch.device("cpu")
ROWS, LENGTH = 24, 256


@pytest.fixture(scope="module")
def inputs(tiny_llama: Path) -> list[tuple[Tensor, Tensor]]:
    """Of the bundled model's second block, (tokens, 256) and the weight that is applied to it."""
    model = open_model(tiny_llama, open_checkpoint(tiny_llama), device=CPU)
    stream = read_stream(default_calibration(), load_tokenizer(tiny_llama), None, False)
    states = model.embed(cut_rows(stream, ROWS, LENGTH, "", 0, "spread").ids)
    found: dict[str, Tensor] = {}
    for index in range(2):
        with model.block(index) as block:
            states = block.forward(states, found.__setitem__)
    linears = {linear.stage: linear.spec.key for linear in model.linears(1)}
    return [
        (x.flatten(0, 1), model.linear_weight(linears[stage]).float()[:64])
        for stage, x in found.items()
        if x.shape[-1] == model.hidden_size
    ]


@pytest.mark.parametrize("kind", ["exl2", "gguf"])
@pytest.mark.parametrize("per_channel", [0.25, 1, 2])
def test_on_a_trained_models_inputs_shrinking_lowers_the_error_on_other_tokens(
    inputs: list[tuple[Tensor, Tensor]], per_channel: float, kind: str
) -> None:
    """Matrices rounded to about 3 bits, as a conversion rounds them."""
    ratios = []
    for x, weight in inputs:
        order = torch.randperm(len(x) // 2, generator=torch.Generator().manual_seed(0))
        seen, others = x[order[: int(per_channel * x.shape[1])]], x[len(x) // 2 :]
        errors = []
        for shrinks in (False, True):
            total = HessianSum.zeros(x.shape[1], CPU)
            total.add(seen)
            factor = hessian.factor(total.calibrated() if shrinks else total.mean())
            errors.append(heldout_error(kind, weight, factor, others))
        ratios.append(errors[1] / errors[0])
    assert sum(ratios) / len(ratios) < 0.95, ratios


def heldout_error(kind: str, weight: Tensor, factor: hessian.Factor, others: Tensor) -> float:
    codec, spec = CODECS[kind], LinearSpec("model.layers.1.mlp.up_proj", weight.shape[1], len(weight))
    options = codec.measured(spec, "linear")
    option = min(options, key=lambda each: abs(codec.storage_bits(spec, each) / spec.numel - 3))
    _, restored = trial.quantize(codec, spec, option, weight, factor)
    return float((others @ (weight - restored).T).square().mean())
