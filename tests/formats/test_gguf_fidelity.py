"""GPTQ on GGUF blocks beside stock llama.cpp's rounding, on a trained model's matrices and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from exlq.evaluation import llamacpp
from exlq.formats.gguf_blocks import BLOCK_TYPES
from exlq.formats.gguf_codec import GgufCodec, type_option
from exlq.numerics import hessian
from exlq.numerics.hessian import energies
from exlq.pipeline import passes, trial
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import make_plan
from exlq.types import LinearSpec

MODEL = Path(__file__).parent.parent / "assets" / "tiny-llama"
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CODEC = GgufCodec()

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="needs xllamacpp, the stock quantizer")


class Problem(NamedTuple):
    spec: LinearSpec
    weight: Tensor  # (out, in)
    seen: Tensor  # (in, in), the Hessian rounded by
    unseen: Tensor  # (in, in), of rows held out


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Every linear of the bundled model with Hessians of its input on the bundled text."""
    torch.set_num_threads(1)
    plan = make_plan(ConvertConfig(MODEL, Path("unused"), gguf_type="Q4_K_M", rows=96))
    model, rows = plan.model, plan.rows
    states = model.embed(rows.ids)
    found = []
    for index in range(model.n_blocks):
        gathered = passes.BlockHessians(model.device)
        with model.block(index) as block:
            for batch in passes.batches(rows.ids):
                states[batch] = block.forward(states[batch], gathered.listener(rows.heldout[batch]))
        for stage, linears in passes.linears_by_stage(model, index).items():
            seen, unseen = gathered.by_stage[stage].means(stage)
            for linear in linears:
                weight = model.linear_weight(linear.spec.key).float()
                found.append(Problem(linear.spec, weight, seen, unseen))
    return found


def gptq_errors(problem: Problem, name: str) -> Tensor:
    """(out, in) weights minus what our rounding stores."""
    factor = hessian.factor(problem.seen)
    _, restored = trial.quantize(CODEC, problem.spec, type_option(name), problem.weight, factor)
    return problem.weight - restored


def stock_errors(problem: Problem, name: str) -> Tensor:
    blocks = llamacpp.quantize_chunk(name, problem.weight, problem.seen.diagonal().contiguous())
    return problem.weight - BLOCK_TYPES[name].unpack(blocks)


@pytest.mark.parametrize("name", K_TYPES)
def test_output_errors_are_under_half_of_stock_s_and_nowhere_near_them(
    problems: list[Problem], name: str
) -> None:
    ratios = []
    for problem in problems:
        ours, stock = gptq_errors(problem, name), stock_errors(problem, name)
        ratios.append([float(energies(ours.T, h).sum() / energies(stock.T, h).sum()) for h in problem[2:]])
    seen, unseen = torch.tensor(ratios).T
    print(
        f"{name}: geometric means {seen.log().mean().exp():.3f} and {unseen.log().mean().exp():.3f} held out,"
    )
    print(f"largest {seen.max():.3f} and {unseen.max():.3f}")
    for values in (seen, unseen):
        assert values.log().mean().exp() < 0.5
        assert values.max() < 0.9
