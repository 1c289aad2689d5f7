"""Tiny models of every family, made once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from exlq.checkpoint.open import open_checkpoint
from exlq.models.families import FAMILIES
from exlq.models.model import Model
from exlq.models.open import open_model
from tests.helpers import edit_config

CPU = torch.device("cpu")
LENGTH = 24  # three windows of the tiny models
CASES = [
    (family, tied)
    for family in FAMILIES
    for tied in (True, False)
    if tied or family not in ("gemma", "gemma2", "gemma3")
]
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE_CASES = [case for case in CASES if case[0] not in SPARSE]
TinyMaker = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def rows() -> Tensor:
    return torch.randint(0, 272, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def opened(directory: Path) -> Model:
    return open_model(directory, open_checkpoint(directory), device=CPU)


def whole_model(directory: Path) -> Any:
    """The model as transformers loads it, in float32; a Yi as the Llama it is."""
    if "Yi" in (directory / "config.json").read_text(encoding="utf-8"):
        edit_config(directory, architectures=["LlamaForCausalLM"], model_type="llama")
        try:
            return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        finally:
            edit_config(directory, architectures=["YiForCausalLM"], model_type="Yi")
    softcapped = "Gemma2" in (directory / "config.json").read_text(encoding="utf-8")
    attention = "eager" if softcapped else None  # before 5.23 transformers chose a kernel that caps nothing
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)


def whole_logits(directory: Path, rows: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = whole_model(directory)(input_ids=rows, use_cache=False).logits
    return logits


def streamed_states(model: Model, rows: Tensor) -> Iterator[Tensor]:
    """The input of every block, then the output of the last."""
    hidden = model.embed(rows)
    yield hidden
    for index in range(model.n_blocks):
        with model.block(index) as block:
            hidden = block.forward(hidden)
        yield hidden


def streamed_logits(model: Model, rows: Tensor) -> Tensor:
    *_, hidden = streamed_states(model, rows)
    return model.logits(model.final_norm(hidden))
