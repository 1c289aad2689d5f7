"""Whole files of every kind, made small, and the places where mutants stand in for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exlq import measurement
from exlq.formats.gguf import imatrix
from exlq.formats.gguf.imatrix import Entry, Imatrix
from exlq.recipes import stored
from exlq.recipes.solve import Targets, solve
from tests.helpers import make_model
from tests.pipeline.helpers import convert, made_up, settings, write_ids, write_texts

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled": ("llama", {"rope_parameters": {**SCALED, "original_max_position_embeddings": 64}}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
}


@dataclass(frozen=True)
class Valid:
    """Whole files, not to be changed, and a directory in which mutants stand in for them."""

    directory: Path
    model: Path
    text: Path
    ids: Path
    scratch: Path

    def mutant_of(self, name: str, content: bytes, whole: Path | None = None) -> Path:
        """A model directory, links to the valid one, in which one file is `content`."""
        made = self.scratch / "model"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for path in (whole or (self.directory / "sharded" if "index" in name else self.model)).iterdir():
            if path.name != name:
                (made / path.name).symlink_to(path)
        (made / name).write_bytes(content)
        return made


def make_valid(directory: Path) -> Valid:
    """Every kind of file, made small."""
    model = make_model("llama", directory / "whole", tied=False)
    (model / "generation_config.json").write_text('{"eos_token_id": [1], "temperature": 0.7}')
    for name, (family, changes) in FAMILIES.items():
        make_model(family, directory / name, tied=family == "gemma2", **changes)
    tensors = load_file(model / "model.safetensors")
    sharded = shutil.copytree(model, directory / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    names: list[str] = list(tensors)
    halves: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, sharded / f"model-{number}.safetensors")
        halves |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": halves}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    text = write_texts(directory / "text.parquet", ["Some words of text, then more of them.\n" * 40] * 4)
    valid = Valid(directory, model, text, write_ids(directory / "ids.parquet"), directory / "scratch")
    valid.scratch.mkdir()
    made_up(
        settings(model, directory / "none", valid.ids, formats=None, measure=None),
        directory / "measurement.json",
    )
    record = measurement.load(directory / "measurement.json")
    stored.save(
        stored.recipe_of(solve(record, Targets(bits=(5.0,))).answers, record), directory / "recipe.json"
    )
    for kind, name in (("Q4_0", "job"), ("F16", "f16")):
        plain: dict[str, Any] = {"bits": None, "formats": ("gguf",), "measure": None, "gguf_type": kind}
        convert(settings(model, directory / name, valid.ids, **plain))
    (file,) = (directory / "f16" / "gguf").glob("*.gguf")
    shutil.copyfile(file, directory / "model.gguf")
    sums = {f"blk.{i}.ffn_{part}.weight": torch.ones(1, 64) for i in (0, 1) for part in ("up", "gate")}
    found = Imatrix({name: Entry(s, torch.tensor([9.0])) for name, s in sums.items()}, ("a.txt",), 4, 300)
    for suffix in ("gguf", "dat"):
        imatrix.save(found, directory / f"imatrix.{suffix}")
    return valid
