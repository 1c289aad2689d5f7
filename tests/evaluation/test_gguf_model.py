"""GGUF files in torch: every family's tensors find their places again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.evaluation.gguf_model import open_gguf, with_weights
from exlq.formats.gguf.tensors import Entry, file_tensors, shifted, to_file
from exlq.models.config import read_json
from exlq.models.model import Model
from tests.conftest import TinyMaker
from tests.models.conftest import opened, streamed_logits, whole_logits

FAMILIES = [("llama", False), ("qwen2", True), ("gemma3", True), ("phi3", False)]


def entries_of(model: Model, directory: Path) -> tuple[Entry, ...]:
    assert model.family.gguf is not None
    linears = [linear for index in range(model.n_blocks) for linear in model.linears(index)]
    ties = {linear.spec.key: linear.tie for linear in linears if linear.tie}
    return file_tensors(model.weights, read_json(directory), model.family.gguf, ties, model.tied)


def exported(
    directory: Path, path: Path, change: Callable[[str, Tensor], Tensor | None] = lambda _, values: values
) -> Path:
    """The checkpoint's tensors in F32 under llama.cpp's names; a changed one may be left out."""
    model = opened(directory)
    writer = gguf.GGUFWriter(path, "llama")
    for entry in entries_of(model, directory):
        if entry.value is None:
            values = torch.cat([model.weights.read(source) for source in entry.sources])
            stored = change(entry.name, to_file(entry, shifted(entry, values)))
            if stored is not None:
                writer.add_tensor(entry.name, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_the_model_from_the_file_is_the_model_from_the_directory(
    family: str, tied: bool, tiny: TinyMaker, tmp_path: Path
) -> None:
    directory = tiny(family, tied)
    rows = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = whole_logits(directory, rows)
    with open_gguf(exported(directory, tmp_path / "model.gguf")) as file:
        found = streamed_logits(with_weights(opened(directory), directory, file), rows)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.std()))


def test_a_file_of_another_model_is_refused(tiny: TinyMaker, tmp_path: Path) -> None:
    directory = tiny("llama", False)

    def refused(path: Path, base: Path, why: str) -> None:
        with open_gguf(path) as file, pytest.raises(ModelError, match=why):
            with_weights(opened(base), base, file)

    whole = exported(directory, tmp_path / "whole.gguf")
    less = exported(
        directory, tmp_path / "less.gguf", lambda name, x: None if name == "blk.1.ffn_up.weight" else x
    )
    short = exported(
        directory, tmp_path / "short.gguf", lambda name, x: x[:-1] if name == "blk.0.attn_q.weight" else x
    )
    refused(less, directory, r"no tensor blk.1.ffn_up.weight.*was it made of")
    refused(short, directory, r"blk.0.attn_q.weight has the shape")
    refused(whole, tiny("llama", True), "has a head apart from its embedding")


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("plain text, long enough to hold a header", encoding="utf-8")
    with pytest.raises(ModelError, match=r"text.gguf is not a whole GGUF file"):
        open_gguf(tmp_path / "text.gguf")
