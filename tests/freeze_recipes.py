"""Freezes what llama-quantize makes of true shapes: python -m tests.freeze_recipes LLAMA_QUANTIZE

Each model is a GGUF with a header and a hole for its data, each answer one `--dry-run`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from exlq.files import atomic_write_text
from tests.formats.gguf.recipe_models import MODELS, NAMES, Model, packed

FROZEN = Path(__file__).resolve().parent / "assets" / "gguf-recipes.json"
LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\S+), size = .*?(?:\((\w+)\))?$", re.MULTILINE
)
BPW = re.compile(r"quant size .*\((\d+\.\d+) BPW\)")


def write_header(model: Model, path: Path) -> None:
    """A file of F32 vectors and F16 matrices that are all hole."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.n_blocks)
    writer.add_context_length(4096)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_sliding_window(4096)
    writer.add_vocab_size(model.vocab)
    if model.n_experts:
        writer.add_expert_count(model.n_experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model.ffn)
    total = 0
    for tensor in model.tensors():
        is_matrix = len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
        dtype = np.dtype(np.float16 if is_matrix else np.float32)
        n_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes)
        total += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 64 + total)


def write_imatrix(path: Path) -> None:
    """One entry, enough to say that there is an importance matrix."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("blk.0.none.weight.in_sum2", np.ones((1, 32), np.float32))
    writer.add_tensor("blk.0.none.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dry_run(binary: str, *arguments: str) -> tuple[dict[str, str], float]:
    """The type llama-quantize would give each tensor, and the bits per weight it prints."""
    done = subprocess.run([binary, "--dry-run", *arguments], capture_output=True, text=True, check=True)
    text = re.sub(r"warning: .*?-> falling back to +\w+\n", "", done.stdout + done.stderr)
    types = {name: (new or old).upper() for name, old, new in LINE.findall(text)}
    found = BPW.search(text)
    assert found, text[-2000:]
    return types, float(found[1])


def frozen(binary: str, model: Model, scratch: Path) -> dict[str, Any]:
    """Every recipe's types of one model, with an importance matrix only where that changes them."""
    path, imatrix = scratch / "model.gguf", scratch / "imatrix.gguf"
    write_header(model, path)
    write_imatrix(imatrix)
    recipes: dict[str, Any] = {}
    for name in NAMES:
        answers = {
            name: dry_run(binary, str(path), name),
            f"{name} imatrix": dry_run(binary, "--imatrix", str(imatrix), str(path), name),
        }
        for key, (types, bpw) in answers.items():
            assert len(types) == len(model.tensors()), (model, name, len(types))
            recipes[key] = {"bpw": bpw, **packed(types, model)}
        if recipes[name] == recipes[f"{name} imatrix"]:
            del recipes[f"{name} imatrix"]
    path.unlink()
    return recipes


def text_of(answers: Mapping[str, Any]) -> str:
    """JSON with one recipe per line."""
    models = [
        f" {json.dumps(model)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(answer)}" for name, answer in recipes.items())
        + "\n }"
        for model, recipes in answers.items()
    ]
    return "{\n" + ",\n".join(models) + "\n}\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: frozen(sys.argv[1], model, Path(scratch)) for name, model in MODELS.items()}
    atomic_write_text(FROZEN, text_of(found))
