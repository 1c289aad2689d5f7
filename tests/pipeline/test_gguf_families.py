"""Every family llama.cpp knows, from a tiny model to a GGUF file that predicts as the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq.evaluation import llamacpp
from exlq.models.families import FAMILIES
from exlq.pipeline.gguf_output import GgufOutput
from exlq.pipeline.plan import make_plan
from tests.models.conftest import streamed_logits, whole_logits
from tests.pipeline.conftest import TinyMaker
from tests.pipeline.helpers import Stored, convert, copied, settings
from tests.pipeline.test_families import CASES as KNOWN_TO_EXL2

CASES = [*KNOWN_TO_EXL2, ("gemma3", True), ("qwen2_moe", False)]
IN_LLAMA_CPP = {"qwen2", "gemma2", "gemma3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"}


def test_no_family_that_llama_cpp_knows_is_left_out() -> None:
    known = {name for name, family in FAMILIES.items() if family.gguf}
    assert known == {name for name, _ in CASES}


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_at_6_bits_per_weight_it_predicts_as_its_base(
    tiny: TinyMaker, ids_file: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    # llama.cpp wants tokens of its own in a model whose name has "phi3" in it.
    base, place = copied(tiny(family, tied), tmp_path / "tiny"), tmp_path / "out" / "gguf"
    config = settings(base, tmp_path / "out", ids_file, formats=("gguf",), measure=("gguf",))
    made = convert(config)["outputs"]["gguf"]
    stored = Stored.read(place)
    assert stored.types == made["types"]
    assert 5.8 < stored.decoder_bpw == made["bpw"] <= 6.0
    assert ("output.weight" in stored.types) != tied
    plan = make_plan(config)
    rows = plan.checked_rows()[0]
    wanted = whole_logits(base, rows)
    found = streamed_logits(GgufOutput(plan).opened(place), rows)
    assert 0 < kl(wanted, found) < 0.01
    if family in IN_LLAMA_CPP and llamacpp.available():
        check_in_llama_cpp(next(place.glob("*.gguf")), rows, wanted, found)


def check_in_llama_cpp(path: Path, rows: Tensor, base: Tensor, in_torch: Tensor) -> None:
    """llama.cpp reads the same weights; what it does to activations costs less than the weights' rounding."""
    with llamacpp.Runtime(path, context=rows.shape[1]) as runtime:
        found = torch.stack([runtime.logits(row) for row in rows])
    assert kl(base, found) < 0.02
    assert kl(in_torch, found) < 0.01


def kl(base: Tensor, other: Tensor) -> float:
    log_p, log_q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
