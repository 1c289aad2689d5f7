"""The streamed Fisher information is what autograd through the whole model gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exlq.models.block import Block
from exlq.numerics import coupling
from exlq.pipeline import sensitivity
from exlq.pipeline.progress import silent
from exlq.workspace import Workspace
from tests.models.conftest import opened, streamed_states, whole_logits, whole_model
from tests.pipeline.conftest import TinyMaker

SEED = 5
FILE = "s.safetensors"
FUSED = {  # of the tiny phi3: 4 heads and 2 key heads of 16, 96 intermediate
    "self_attn.qkv_proj": {"q_proj": slice(0, 64), "k_proj": slice(64, 96), "v_proj": slice(96, 128)},
    "mlp.gate_up_proj": {"gate_proj": slice(0, 96), "up_proj": slice(96, 192)},
}


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(4, 260, (5, 32), generator=torch.Generator().manual_seed(1))


def autograd_gradients(directory: Path, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients (tokens, out_features) at every linear's outputs, by transformers' own module names."""
    model, gradients = whole_model(directory), dict[str, Tensor]()

    def watch(name: str, _module: nn.Module, _args: object, out: Tensor) -> None:
        out.register_hook(partial(gradients.__setitem__, name))  # type: ignore[no-untyped-call]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(partial(watch, name))
    logits = model(input_ids=rows, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: g.double().flatten(0, 1) for name, g in gradients.items()}


def autograd_fisher(directory: Path, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient of every linear's outputs."""
    return {name: g.square().mean(0) for name, g in autograd_gradients(directory, rows, labels).items()}


def unfused(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    apart: dict[str, Tensor] = {}
    for name, value in fisher.items():
        block, path = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        parent = path.split(".")[0]
        parts = FUSED.get(path, {path.split(".")[-1]: slice(None)})
        apart |= {f"{block}.{parent}.{part}": value[rows] for part, rows in parts.items()}
    return apart


@pytest.mark.parametrize("at_once", [1024, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_it_equals_autograd_through_the_whole_model(
    tiny: TinyMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Tensor,
    family: str,
    at_once: int,
) -> None:
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", at_once)
    directory = tiny(family, True)
    model = opened(directory)
    found = dict(sensitivity.fisher(model, rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent).outputs)
    *_, last = streamed_states(model, rows)
    labels = model.sample_labels(last, torch.Generator().manual_seed(SEED))
    wanted = autograd_fisher(directory, rows, labels)
    wanted.pop("lm_head")
    wanted = unfused(wanted)
    found.pop("lm_head")
    assert found.keys() == wanted.keys() == {s.spec.key for i in range(2) for s in model.linears(i)}
    for key, value in wanted.items():
        assert (found[key] - value).norm() < 1e-4 * value.norm(), key


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_heads_information_is_the_expected_variance_of_each_token(
    tiny: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Tensor, family: str
) -> None:
    monkeypatch.setattr("exlq.pipeline.information.HEAD_TOKENS", 7)
    directory = tiny(family, True)
    found = sensitivity.fisher(opened(directory), rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    p = whole_logits(directory, rows).double().softmax(-1).flatten(0, 1)
    wanted = (p * (1 - p)).mean(0)
    assert (found.outputs["lm_head"] - wanted).abs().max() < 1e-5 * wanted.max()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_embeddings_moment_is_that_of_autograds_gradients(
    tiny: TinyMaker, tmp_path: Path, rows: Tensor, family: str
) -> None:
    """Of the stored embedding: Gemma scales what it takes from it."""
    directory = tiny(family, family == "gemma2")
    model = opened(directory)
    found = sensitivity.fisher(model, rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    *_, last = streamed_states(model, rows)
    labels = model.sample_labels(last, torch.Generator().manual_seed(SEED))
    whole = whole_model(directory)
    stored = whole.get_input_embeddings().weight.detach()[rows].requires_grad_()
    scale = model.hidden_size**0.5 if family == "gemma2" else 1.0
    logits = whole(inputs_embeds=stored * scale, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert stored.grad is not None
    gradients = stored.grad.double().flatten(0, 1)
    wanted = gradients.T @ gradients / len(gradients)
    assert (found.embedding - wanted).norm() < 1e-4 * wanted.norm()


def test_the_heads_input_is_that_of_the_whole_model(llama: Path, tmp_path: Path, rows: Tensor) -> None:
    found = sensitivity.fisher(opened(llama), rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    whole, seen = whole_model(llama), list[Tensor]()
    whole.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        whole(input_ids=rows, use_cache=False)
    x = seen[0].double().flatten(0, 1)
    wanted = x.T @ x / len(x)
    assert (found.head_input - wanted).norm() < 1e-4 * wanted.norm()


def test_what_was_saved_is_loaded_again(llama: Path, tmp_path: Path, rows: Tensor) -> None:
    found = sensitivity.fisher(opened(llama), rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    loaded = sensitivity.Sensitivity.load(tmp_path / FILE)
    assert loaded.outputs.keys() == found.outputs.keys()
    assert all(torch.equal(loaded.outputs[key], found.outputs[key]) for key in found.outputs)
    assert torch.equal(loaded.embedding, found.embedding)
    assert torch.equal(loaded.head_input, found.head_input)
    assert all(path.name.endswith(FILE) for path in tmp_path.iterdir())


def test_it_depends_on_the_seed_alone_and_leaves_no_file(llama: Path, tmp_path: Path, rows: Tensor) -> None:
    model = opened(llama)
    one, same, other = (
        sensitivity.fisher(model, rows, Workspace(tmp_path), seed, tmp_path / FILE, silent)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one.outputs[key], same.outputs[key]) for key in one.outputs)
    assert torch.equal(one.embedding, same.embedding)
    key = "model.layers.0.mlp.down_proj"
    assert not torch.equal(one.outputs[key], other.outputs[key])
    assert not torch.equal(one.embedding, other.embedding)
    assert torch.equal(one.head_input, other.head_input), "no label has a part in it"
    assert all(path.name.endswith(FILE) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("n", "length", "wanted"),
    [(3, 20, (3, 20)), (300, 64, (128, 64)), (40, 700, (16, 512)), (1, 700, (1, 512))],
)
def test_its_rows_are_spread_over_all_and_within_the_limit(
    n: int, length: int, wanted: tuple[int, int]
) -> None:
    ids = torch.arange(n * length).reshape(n, length)
    rows = sensitivity.fisher_rows(ids)
    assert tuple(rows.shape) == wanted
    firsts = rows[:, 0] // length
    assert firsts[0] == 0
    assert firsts[-1] == (n - 1 if len(rows) > 1 else 0)
    assert torch.equal(rows, ids[firsts, : wanted[1]])
    assert len(set(firsts.tolist())) == len(firsts)


@pytest.mark.parametrize("run", [1024, 48])
def test_the_coupling_is_the_second_moment_of_autograds_gradients(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Tensor, run: int
) -> None:
    """Held against what an error costs that later rows of the run make up for as well as they can."""
    monkeypatch.setattr(coupling, "RUN", run)
    model = opened(llama)
    found = sensitivity.fisher(model, rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    *_, last = streamed_states(model, rows)
    labels = model.sample_labels(last, torch.Generator().manual_seed(SEED))
    gradients = autograd_gradients(llama, rows, labels)
    for key in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        g = gradients[key]
        whole = g.T @ g / len(g)
        coupled = found.coupling(key, torch.device("cpu"))
        assert coupled is not None
        assert coupled.out_features == len(whole)
        runs = torch.split(torch.arange(len(whole)), run)
        damped = torch.zeros_like(whole)
        for r in runs:
            damped[r[:, None], r] = whole[r][:, r]
            damped[r, r] += coupling.DAMPING * whole[r, r].mean()
        earlier: list[int] = []
        for step in coupled.steps():
            own = step.rows.tolist()
            later = [row for row in range(len(whole)) if row not in {*earlier, *own}]
            left = damped[own][:, own]
            if later:
                left = (
                    left - damped[own][:, later] @ damped[later][:, later].inverse() @ damped[later][:, own]
                )
            ridge = torch.cat([damped[r, r] - whole[r, r] for r in runs])[own]
            wanted = (left.diagonal() - ridge).clamp_min(0)
            assert (coupled.costs[own] - wanted).abs().max() < 2e-3 * whole.diagonal().max()
            earlier += own


def test_the_head_has_no_coupling(llama: Path, tmp_path: Path, rows: Tensor) -> None:
    found = sensitivity.fisher(opened(llama), rows, Workspace(tmp_path), SEED, tmp_path / FILE, silent)
    assert found.coupling("lm_head", torch.device("cpu")) is None


@pytest.mark.parametrize("stop", range(1, 4))
def test_an_interrupted_pass_goes_on_after_the_last_block(llama: Path, tmp_path: Path, stop: int) -> None:
    rows = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = sensitivity.fisher(
        opened(llama), rows, Workspace(tmp_path / "whole"), SEED, tmp_path / "whole" / FILE, silent
    )

    def stopped(stage: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    parts = Workspace(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        sensitivity.fisher(opened(llama), rows, parts, SEED, tmp_path / "parts" / FILE, stopped)
    model = opened(llama)
    backward, back = Block.backward, list[int]()

    def counted(self: Block, *given: Any) -> Tensor:
        back.append(1)
        return backward(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "backward", counted)
        found = sensitivity.fisher(model, rows, parts, SEED, tmp_path / "parts" / FILE, silent)
    assert len(back) == model.n_blocks - max(0, stop - model.n_blocks)
    for key, tensor in whole.outputs.items():
        assert torch.equal(found.outputs[key], tensor), key
    assert torch.equal(found.embedding, whole.embedding)
    assert torch.equal(found.head_input, whole.head_input)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
