"""Predicted against measured KL divergence of changes of one linear alone.

Usage: python -m scripts.bench_prediction MODEL [-c CALIBRATION.parquet] [-e EVALUATION.parquet]
           [--format exl2 gguf] [--chunks 40] [--all] [--threads N]

Every decoder linear is rounded by options of 2, 3 and 4 bits as the measuring pass rounds it, and put
alone into the otherwise unquantized model. What the measurement predicts for it is held against the KL
divergence on text not calibrated on. Exit code 1 if Spearman's rank correlation is below 0.95 over all
changes of a format, or below 0.8 among those by one option.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exlq.calibration import evaluation_chunks, load_tokenizer
from exlq.evaluation.predictor import TOKENS_AT_ONCE
from exlq.formats.codec import Codec
from exlq.formats.codecs import CODECS
from exlq.models.layout import Linear
from exlq.models.model import Model
from exlq.numerics import hessian
from exlq.numerics.coupling import Coupling
from exlq.pipeline import measured, passes, trial
from exlq.pipeline.allocate import measured_loss
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.sensitivity import Sensitivity
from exlq.types import LinearSpec, Option
from exlq.workspace import Workspace

# One option a width, the same for all linears.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "exl2": ("1:2b 64g s4", "1:3b 32g s4", "1:4b 32g s4"),
    "gguf": ("Q2_K", "Q3_K", "Q4_K"),
}
OVER_ALL, WITHIN = 0.95, 0.8  # least correlations
CONTEXT = 512


@dataclass(frozen=True)
class Change:
    """One linear by one option; nats per token, `error` the standard error of the mean over chunks."""

    key: str
    option: str
    predicted: float
    measured: float
    error: float


def main() -> int:
    """Prints every change and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-c", "--calibration", type=Path)
    parser.add_argument("-e", "--evaluation", type=Path, help="else the calibration's held-out rows")
    parser.add_argument("--format", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--all", action="store_true", help="score whole chunks, not second halves alone")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="exlq-bench-") as scratch:
        found = changes_of(arguments, Path(scratch))
    good = [report(name, found[name]) for name in arguments.format]
    return int(not all(good))


def changes_of(arguments: argparse.Namespace, scratch: Path) -> dict[str, list[Change]]:
    """All changes of every format."""
    plan = make_plan(
        ConvertConfig(
            in_dir=arguments.model,
            out_dir=scratch / "out",
            calibration=arguments.calibration,
            output_measurement=scratch / "measurement.json",
            measure=tuple(arguments.format),
        )
    )
    record = measured.measured(plan, scratch, {}, told)
    base = Base.of(plan.model, _chunks(plan, arguments), 0 if arguments.all else None)
    print(f"{len(base.states[0])} chunks, noise of float32 {base.noise():.1e} nats")
    found: dict[str, list[Change]] = {name: [] for name in arguments.format}
    sensitivity = measured.sensitivities(plan, scratch, told)
    for codec, linear, option, weight in rounded_linears(plan, sensitivity, scratch, OPTIONS):
        predicted = measured_loss(record, linear.spec.key, option)
        assert predicted is not None
        kl = base.divergence(linear, weight)
        error = float(kl.std()) / len(kl) ** 0.5
        change = Change(linear.spec.key, option.desc, predicted, float(kl.mean()), error)
        found[codec.name].append(change)
        print(f"{change.key:36} {change.option:12} {predicted:.3e} {change.measured:.3e}", file=sys.stderr)
    return found


def _chunks(plan: Plan, arguments: argparse.Namespace) -> Tensor:
    if arguments.evaluation is None:
        return plan.checked_rows()[0][: arguments.chunks]
    tokenizer, context = load_tokenizer(arguments.model), min(CONTEXT, plan.model.max_length)
    return evaluation_chunks(arguments.evaluation, tokenizer, context, arguments.chunks)


def rounded_linears(
    plan: Plan, sensitivity: Sensitivity, scratch: Path, descs: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Codec[Any], Linear, Option, Tensor]]:
    """Every linear by every option wanted, its (out, in) float32 rounded weight on unquantized inputs.

    `descs` are the options' names by format.
    """
    rows = plan.measurement_rows
    ids = rows.ids[~rows.heldout]
    states = passes.embedded(plan.model, ids, Workspace(scratch), torch.float32)
    for index in range(plan.model.n_blocks):
        hessians = passes.BlockHessians(plan.model.device)
        with plan.model.block(index) as block:
            for batch in passes.batches(ids):
                listener = hessians.listener(torch.zeros(len(ids[batch]), dtype=torch.bool))
                states[batch] = block.forward(states[batch], listener).cpu()
        for stage, linears in passes.linears_by_stage(plan.model, index).items():
            total = hessians.by_stage[stage].calibration
            assert total is not None
            mean = total.mean()
            for codec in plan.codecs:
                factor = hessian.factor(mean, act_order=all(codec.sorts_channels(x.spec) for x in linears))
                for linear in linears:
                    weight = plan.model.linear_weight(linear.spec.key)
                    coupling = _coupling(plan, sensitivity, linear.spec)
                    for option in _named(plan, codec, linear.spec, descs):
                        _, restored = trial.quantize(codec, linear.spec, option, weight, factor, coupling)
                        yield codec, linear, option, restored


def _coupling(plan: Plan, sensitivity: Sensitivity, spec: LinearSpec) -> Coupling | None:
    coupled = plan.config.couples_rows
    return sensitivity.coupling(spec.key, plan.model.device) if coupled else None


def _named(
    plan: Plan, codec: Codec[Any], spec: LinearSpec, descs: Mapping[str, Sequence[str]]
) -> list[Option]:
    return [option for option in codec.measured(spec, plan.role(spec)) if option.desc in descs[codec.name]]


@dataclass(frozen=True)
class Base:
    """The unquantized model on the chunks: what enters each block, and what leaves the last."""

    model: Model
    states: list[Tensor]  # blocks + 1 of (chunks, context, hidden) float32
    start: int  # the first position scored

    @classmethod
    def of(cls, model: Model, chunks: Tensor, start: int | None = None) -> Base:
        """`start` is the middle of a chunk where not given."""
        states = [model.embed(chunks)]
        for index in range(model.n_blocks):
            with model.block(index) as block:
                states.append(_through(block.forward, states[-1]))
        return cls(model, states, chunks.shape[1] // 2 if start is None else start)

    def divergence(self, linear: Linear, weight: Tensor) -> Tensor:
        """(chunks,) float64 mean KL divergence of each chunk with one linear's weight replaced."""
        return self._against(self._changed(linear, weight))

    def _changed(self, linear: Linear, weight: Tensor) -> Tensor:
        """The hidden states after the last block."""
        first = next(i for i in range(self.model.n_blocks) if linear in self.model.linears(i))
        states = self.states[first]
        for index in range(first, self.model.n_blocks):
            with self.model.block(index) as block:
                if index == first:
                    block.set_weight(linear.spec.key, weight)
                states = _through(block.forward, states)
        return states

    def _against(self, states: Tensor) -> Tensor:
        means = []
        for own, other in zip(self.states[-1], states, strict=True):
            log_p, log_q = (self._log_probabilities(x[self.start : -1]) for x in (own, other))
            means.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        return torch.stack(means)

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """Float64: rounding errors of float32 would be as large as the divergences of high bits."""
        return self.model.logits(self.model.final_norm(states)).double().log_softmax(-1)

    def noise(self) -> float:
        """Mean KL divergence of the model from itself with the last binary digit of its inputs changed."""
        states = self.states[0] * (1 + torch.finfo(torch.float32).eps)
        for index in range(self.model.n_blocks):
            with self.model.block(index) as block:
                states = _through(block.forward, states)
        return abs(float(self._against(states).mean()))


def _through(forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    at_once = max(1, TOKENS_AT_ONCE // states.shape[1])
    return torch.cat([forward(batch) for batch in torch.split(states, at_once)])


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation of values without ties."""
    ranks = torch.stack(
        [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (left, right)]
    )
    return float(torch.corrcoef(ranks)[0, 1])


def report(name: str, changes: Sequence[Change]) -> bool:
    """The table and the correlations of one format; whether all are high enough."""
    print(f"\n{name}\n\n| linear | option | predicted KL | measured KL | predicted / measured |")
    print("|---|---|--:|--:|--:|")
    for c in changes:
        ratio = c.predicted / c.measured
        found = f"{c.measured:.3e} ± {c.error:.0e}"
        print(f"| {c.key} | {c.option} | {c.predicted:.3e} | {found} | {ratio:.2f} |")
    print(f"\n| {name} | changes | Spearman | wanted | predicted / measured, sums |\n|---|--:|--:|--:|--:|")
    groups = {"all": changes} | {
        desc: [c for c in changes if c.option == desc] for desc in dict.fromkeys(c.option for c in changes)
    }
    good = []
    for desc, group in groups.items():
        wanted = OVER_ALL if desc == "all" else WITHIN
        rank = spearman([c.predicted for c in group], [c.measured for c in group])
        ratio = sum(c.predicted for c in group) / sum(c.measured for c in group)
        print(f"| {desc} | {len(group)} | {rank:.4f} | {wanted} | {ratio:.3f} |")
        good.append(rank >= wanted)
    return all(good)


def told(stage: str, done: int, total: int) -> None:
    """One line per finished stage, on stderr."""
    if done == total:
        print(f"{stage} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
