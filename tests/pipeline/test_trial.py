"""One linear rounded, tried and written, against direct float64 sums over its errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from exlq.errors import VerifyError
from exlq.formats.exl2 import dequantize_linear
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.exl2_options import OPTIONS
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor
from exlq.pipeline import parts, trial
from exlq.pipeline.trial import RowSample, Trial, Trials
from exlq.types import LinearSpec, Option
from tests.numerics.helpers import correlated_tokens, energy_of, heavy_tailed

CODEC = Exl2Codec()
SOME = (OPTIONS[1], OPTIONS[4], OPTIONS[8], OPTIONS[15], OPTIONS[18], OPTIONS[25])


@dataclass(frozen=True)
class Problem:
    """A linear with rows of different sizes, its inputs' Hessians and its outputs' Fisher information."""

    spec: LinearSpec
    weight: Tensor
    calibration: Tensor
    heldout: Tensor
    factor: Factor
    fisher: Tensor

    @classmethod
    def make(cls, in_features: int, out_features: int, seed: int = 0, spread: float = 0.5) -> Problem:
        """`spread` is how far rows differ in size."""
        generator = torch.Generator().manual_seed(seed)
        tokens = correlated_tokens(5 * in_features, in_features, seed)
        own, held = tokens[in_features:], tokens[:in_features] * 1.3
        of = own.T @ own / len(own)
        sizes = torch.randn(out_features, 1, generator=generator).mul(spread).exp()
        return cls(
            LinearSpec("model.layers.0.mlp.up_proj", in_features, out_features),
            heavy_tailed(out_features, in_features, seed=seed + 1) * sizes,
            of,
            held.T @ held / len(held),
            hessian.factor(of),
            torch.rand(out_features, generator=generator).mul(6 * spread).exp(),
        )

    def tried(self, options: Sequence[Option], seed: int = 0, feedback: bool = True) -> Trials:
        heldout = self.heldout[self.factor.perm][:, self.factor.perm]
        evidence = trial.Evidence(self.factor, heldout, feedback)
        generator = torch.Generator().manual_seed(seed)
        return trial.try_options(CODEC, self.spec, options, self.weight, evidence, self.fisher, generator)

    def restored(self, option: Option, feedback: bool = True) -> Tensor:
        factor = self.factor if feedback else self.factor.without_feedback()
        return trial.quantize(CODEC, self.spec, option, self.weight, factor)[1]

    def energy(self, error: Tensor, of: Tensor) -> Tensor:
        """(out,) energies of the rows of `error`, (out, in)."""
        return energy_of(error.T, of)


@pytest.mark.parametrize(
    "name", ["30_gptq_b4_g32_128x64", "31_gptq_mlpdown_632_256x96", "33_gptq_b5b4_bias_192x64"]
)
def test_our_rounding_is_better_than_the_references(shared: Path, name: str) -> None:
    with safe_open(shared / "vectors" / "exl2" / f"{name}.safetensors", "pt") as file:
        option = Option(file.metadata()["desc"], json.loads(file.metadata()["qparams"]))
        vector = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weight = vector["weight_fp16_out_in"]
    of = vector["hessian_sum"] / vector["num_batches"]
    spec = LinearSpec(name, weight.shape[1], weight.shape[0])
    tensors, restored = trial.quantize(CODEC, spec, option, weight, hessian.factor(of))
    assert torch.equal(dequantize_linear(tensors).float(), restored)
    for suffix in ("q_weight", "q_groups", "q_scale"):
        assert tensors[suffix].shape == vector[suffix].shape
    whole = energy_of(weight.T, of).sum()
    ours = energy_of((weight - restored).T, of).sum() / whole
    theirs = energy_of((weight - vector["dequantized"].T).T, of).sum() / whole
    print(f"{name}: tr(E H Eᵀ)/tr(W H Wᵀ) is {ours:.4e} here, {theirs:.4e} there")
    assert ours < theirs


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", [(192, 96), (416, 40)])
def test_errors_are_those_of_the_weights_that_would_be_written(
    shape: tuple[int, int], feedback: bool
) -> None:
    problem = Problem.make(*shape)
    tried = problem.tried(SOME, feedback=feedback)
    whole = problem.energy(problem.weight, problem.calibration)
    for option, found in zip(SOME, tried.options, strict=True):
        error = problem.weight - problem.restored(option, feedback)
        rows = problem.energy(error, problem.calibration)
        heldout = problem.energy(error, problem.heldout).sum()
        whole_heldout = problem.energy(problem.weight, problem.heldout).sum()
        loss = (rows * problem.fisher).sum() / 2 * heldout / rows.sum()
        assert found.err == pytest.approx(float(rows.sum() / whole.sum()), rel=5e-3), option.desc
        assert found.err_heldout == pytest.approx(float(heldout / whole_heldout), rel=5e-3), option.desc
        assert found.loss == pytest.approx(float(loss), rel=5e-3), option.desc
        assert found.err_se == 0
    assert tried.sensitivity == pytest.approx(float((whole * problem.fisher).sum()) / 2, rel=1e-4)


def test_more_bits_err_less() -> None:
    errors = [found.err for found in Problem.make(192, 64, seed=5).tried(OPTIONS[1:30:4]).options]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_estimates_the_whole_within_its_standard_error(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    problem = Problem.make(64, 1100, seed, spread=0.2)
    options = (OPTIONS[1], OPTIONS[8], OPTIONS[15])
    monkeypatch.setattr(trial, "SAMPLED_ROWS", 2000)
    truth = problem.tried(options).options
    monkeypatch.setattr(trial, "SAMPLED_ROWS", 64)
    monkeypatch.setattr(trial, "HELDOUT_ROWS", 32)
    estimates = [problem.tried(options, seed=s).options for s in range(20)]
    for i, whole in enumerate(truth):
        found = [each[i] for each in estimates]
        far = [each for each in found if abs(each.err - whole.err) > 4 * each.err_se]
        assert len(far) <= 1, f"{len(far)} of 20: {whole.err:.4e}, {far}"
        spread = torch.tensor([each.err for each in found]).std()
        claimed = sum(each.err_se for each in found) / 20
        assert 0.5 < claimed / spread < 2.5, f"spread {spread:.3e}, claimed {claimed:.3e}"
        for figure in ("err", "err_heldout", "loss"):
            mean = sum(getattr(each, figure) for each in found) / 20
            assert mean == pytest.approx(getattr(whole, figure), rel=0.1), figure


def test_a_seed_fixes_the_sample_and_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SAMPLED_ROWS", 32)
    problem = Problem.make(64, 200, seed=3)
    assert problem.tried(SOME, seed=4) == problem.tried(SOME, seed=4)
    assert problem.tried(SOME, seed=4) != problem.tried(SOME, seed=5)


def test_a_sample_has_one_row_of_every_run_of_rows_alike_in_size() -> None:
    size = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    sample = RowSample.draw(size, 64, torch.Generator().manual_seed(1))
    ranks = size.argsort().argsort()[sample.rows]
    edges = torch.cat([torch.zeros(1), sample.weights.cumsum(0)])
    assert sample.weights.sum() == 1000
    assert sample.weights.max() - sample.weights.min() <= 1
    assert ((ranks >= edges[:-1]) & (ranks < edges[1:])).all()


def test_every_row_is_drawn_as_often_as_its_weight_says() -> None:
    size, generator = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.Generator()
    counts = torch.zeros(50)
    for _ in range(4000):
        sample = RowSample.draw(size, 12, generator)
        counts[sample.rows] += sample.weights
    assert (counts / 4000 - 1).abs().max() < 0.15


def test_a_matrix_of_few_rows_is_tried_whole() -> None:
    sample = RowSample.draw(torch.rand(64), 64, torch.Generator())
    assert sample.rows.tolist() == list(range(64))
    assert (sample.weights == 1).all()


@pytest.mark.parametrize("option", OPTIONS[1::7], ids=lambda o: o.desc)
def test_sweeping_in_parts_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch, option: Option) -> None:
    problem = Problem.make(96, 600, seed=7)
    at_once = problem.energy(problem.weight - problem.restored(option), problem.calibration).sum()
    monkeypatch.setattr(parts, "SWEEP_BYTES", 200 * 96 * 8)
    tensors, restored = trial.quantize(CODEC, problem.spec, option, problem.weight, problem.factor)
    assert torch.equal(CODEC.unpack(tensors, problem.spec, option), restored)
    in_parts = problem.energy(problem.weight - restored, problem.calibration).sum()
    assert at_once != in_parts
    assert in_parts < 1.05 * at_once, f"{in_parts / at_once:.3f} times the error"


def test_trials_in_parts_and_batches_of_options_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, options = Problem.make(96, 600, seed=8), OPTIONS[1::9]
    problem.weight[5] *= 8
    whole = problem.tried(options).options
    monkeypatch.setattr(parts, "SWEEP_BYTES", 2 * 300 * 96 * 8)
    monkeypatch.setattr(parts, "FEWEST_ROWS", 300)
    assert [len(batch) for batch in parts.option_batches(options, 96, torch.device("cpu"))] == [2, 2]
    monkeypatch.setattr(parts, "FEWEST_ROWS", 150)  # four options at once, in four parts
    assert len(parts.parts(problem.weight, problem.factor.perm, 4)) == 4
    for found, expected in zip(problem.tried(options).options, whole, strict=True):
        assert found.err == pytest.approx(expected.err, rel=0.05)
        assert found.err_heldout == pytest.approx(expected.err_heldout, rel=0.05)


@pytest.mark.parametrize(("out", "n_options"), [(600, 1), (600, 4), (31, 30), (600, 1000)])
def test_every_row_is_swept_once_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, out: int, n_options: int
) -> None:
    monkeypatch.setattr(parts, "SWEEP_BYTES", 1 << 20)
    weight = heavy_tailed(out, 256, seed=13)
    pieces = parts.parts(weight, torch.randperm(256), n_options)
    assert sorted(torch.cat(pieces).tolist()) == list(range(out))
    for rows in pieces:
        assert len(rows) <= max(32, (1 << 20) // (8 * 256 * n_options))


def test_any_float_dtype_is_rounded_as_its_values_in_float32() -> None:
    problem = Problem.make(64, 40, seed=9)
    for dtype in (torch.bfloat16, torch.float16):
        short = problem.weight.to(dtype)
        tensors, restored = trial.quantize(CODEC, problem.spec, SOME[2], short, problem.factor)
        plain, _ = trial.quantize(CODEC, problem.spec, SOME[2], short.float(), problem.factor)
        assert all(torch.equal(tensors[suffix], plain[suffix]) for suffix in plain)
        assert restored.dtype == torch.float32


@pytest.mark.parametrize(("bias", "sorted_"), [(True, False), (False, True)])
def test_a_biased_down_proj_is_stored_with_its_channels_in_place(bias: bool, sorted_: bool) -> None:
    problem = Problem.make(96, 40, seed=10)
    spec = LinearSpec("model.layers.0.mlp.down_proj", 96, 40, bias)
    factor = hessian.factor(problem.calibration, act_order=CODEC.sorts_channels(spec))
    tensors, _ = trial.quantize(CODEC, spec, SOME[2], problem.weight, factor)
    identity = torch.arange(96, dtype=torch.int32)
    assert torch.equal(tensors["q_invperm"], identity) != sorted_


def test_a_linear_of_zeros_costs_nothing() -> None:
    problem = Problem.make(64, 40, seed=11)
    problem.weight.zero_()
    tried = problem.tried(SOME)
    assert tried == Trials(tuple(Trial(0.0, 0.0, 0.0, 0.0) for _ in SOME), 0.0)
    assert (problem.restored(SOME[0]) == 0).all()


def test_tensors_that_do_not_give_the_weights_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.make(64, 40, seed=12)
    unpack = Exl2Codec.unpack
    monkeypatch.setattr(Exl2Codec, "unpack", lambda *args: unpack(*args) + 1e-6)
    with pytest.raises(VerifyError, match="up_proj: the packed tensors do not give back"):
        problem.restored(SOME[0])


def test_two_threads_measure_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SWEEP_BYTES", 2 * 256 * 96 * 8)
    monkeypatch.setattr(parts, "FEWEST_ROWS", 256)
    problem = Problem.make(96, 256, seed=9)
    alone = problem.tried(OPTIONS[::4])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert problem.tried(OPTIONS[::4]) == alone
    finally:
        torch.set_num_threads(before)
