"""What an error of the embedding is said to cost is what it does to the predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq.formats.gguf_codec import GgufCodec, type_option
from exlq.pipeline import sensitivity
from exlq.pipeline.embedding import EmbeddingCost, embedding_cost, quantized_embedding
from exlq.pipeline.plan import make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.sensitivity import Sensitivity
from exlq.workspace import Workspace
from tests.models.conftest import opened, whole_logits
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import copied, edit_tensors, settings

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(4, 260, (24, 48), generator=torch.Generator().manual_seed(1))


def found_of(directory: Path, rows: Tensor, scratch: Path) -> Sensitivity:
    scratch.mkdir()
    return sensitivity.fisher(
        opened(directory), rows, Workspace(scratch), 0, scratch / "s.safetensors", silent
    )


def predicted(cost: EmbeddingCost, error: Tensor) -> float:
    energies = torch.einsum("vi,ij,vj->v", error.double(), cost.hessian.double(), error.double())
    return float((energies * cost.rows).sum()) / 2


def divergence(base: Tensor, other: Tensor) -> float:
    log_p, log_q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("qwen2", False)]
)
def test_the_cost_of_a_small_error_is_the_divergence_it_makes(
    tiny: TinyMaker, tmp_path: Path, rows: Tensor, family: str, tied: bool
) -> None:
    base = tiny(family, tied)
    model = opened(base)
    cost = embedding_cost(model, found_of(base, rows, tmp_path / "scratch"), rows)
    weight = model.weights.read(EMBEDDING).float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    error = 0.02 * weight.std() * noise
    other = copied(base, tmp_path / "other")
    edit_tensors(other / "model.safetensors", **{EMBEDDING.replace(".", "__"): weight + error})
    measured = divergence(whole_logits(base, rows), whole_logits(other, rows))
    assert measured == pytest.approx(predicted(cost, error), rel=0.2)


def test_a_tokens_row_counts_by_how_often_it_occurs_and_never_nothing(
    tiny: TinyMaker, tmp_path: Path, rows: Tensor
) -> None:
    base = tiny("llama", False)
    often = rows.clone()
    often[:, ::2] = 77
    cost = embedding_cost(opened(base), found_of(base, rows, tmp_path / "scratch"), often)
    assert cost.rows.argmax() == 77
    assert cost.rows.sum() == pytest.approx(1, rel=1e-5)
    assert cost.rows.min() > 0
    assert cost.rows[77] > 50 * cost.rows.median()


@pytest.mark.parametrize("gptq", [True, False])
def test_the_embedding_is_stored_as_its_values_are_read(
    llama: Path, ids_file: Path, tmp_path: Path, gptq: bool
) -> None:
    plan = make_plan(settings(llama, tmp_path / "out", ids_file, gptq=gptq))
    found = found_of(llama, plan.measurement_rows.ids, tmp_path / "scratch")
    option, codec = type_option("Q4_1"), GgufCodec()
    tensors, restored = quantized_embedding(plan, codec, option, found)
    assert torch.equal(codec.unpack(tensors, plan.model.embedding, option), restored)
    weight = plan.model.weights.read(EMBEDDING)
    assert 0.01 < (restored - weight).norm() / weight.norm() < 0.1


def test_error_feedback_makes_the_embeddings_errors_cheaper(
    llama: Path, ids_file: Path, tmp_path: Path
) -> None:
    plans = [make_plan(settings(llama, tmp_path / "out", ids_file, gptq=gptq)) for gptq in (True, False)]
    found = found_of(llama, plans[0].measurement_rows.ids, tmp_path / "scratch")
    cost = embedding_cost(plans[0].model, found, plans[0].measurement_rows.ids)
    weight = plans[0].model.weights.read(EMBEDDING)
    swept, plain = (
        predicted(cost, quantized_embedding(plan, GgufCodec(), type_option("IQ4_NL"), found)[1] - weight)
        for plan in plans
    )
    assert swept < 0.9 * plain
