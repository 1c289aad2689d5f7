"""A whole model of transformers, filled with the weights of an EXL2 or a Hugging Face directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import ModelError
from exlq.formats.exl2_directory import Exl2Weights, is_exl2
from exlq.models.canonical import CanonicalWeights
from exlq.models.config import family_of
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY, Layout, layout_of
from exlq.models.open import read_config
from exlq.models.skeleton import build_skeleton
from exlq.sizes import format_bytes
from exlq.types import Weights

MEMINFO = Path("/proc/meminfo")
HEAD, EMBEDDING = f"{HEAD_KEY}.weight", f"{EMBEDDING_KEY}.weight"


@dataclass(frozen=True)
class Outline:
    """A model that is known to be whole and of which no weights have been read yet."""

    directory: Path
    exl2: bool
    config: Any
    module: Any  # transformers' model, its parameters on the meta device
    layout: Layout
    weights: CanonicalWeights

    @property
    def max_length(self) -> int:
        return int(self.config.max_position_embeddings)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all parameters in `dtype`, a matrix that is head and embedding counted once."""
        sizes = {name: prod(shape) for name, shape in self.layout.wanted.items()}
        total = sum(sizes.values()) - (sizes[HEAD] if self.weights.tied else 0)
        return total * dtype.itemsize

    def cache_bytes(self, dtype: torch.dtype, context: int) -> int:
        """Bytes of the keys and values of `context` tokens, as much in blocks with a sliding window."""
        specs = [linear.spec for block in self.layout.blocks for linear in block]
        wide = sum(spec.out_features for spec in specs if spec.key.endswith(("k_proj", "v_proj")))
        return wide * context * dtype.itemsize

    def reading_bytes(self) -> int:
        """What reading takes beside the result: the largest tensor as it is stored and in float32."""
        return 6 * max(prod(shape) for shape in self.layout.wanted.values())


def outline(directory: Path, device: torch.device) -> Outline:
    """The model of an EXL2 or a Hugging Face directory, every tensor checked to be there.

    Raises:
        ModelError: for an architecture that is not supported, or a directory that is not whole.
        FormatError: for EXL2 tensors that break the rules of the format.
    """
    family = family_of(directory)
    config = read_config(directory, family)
    module = build_skeleton(config, family, device)
    layout = layout_of(module, config, family)
    exl2 = is_exl2(directory)
    stored: Weights = Exl2Weights(directory) if exl2 else open_checkpoint(directory)
    return Outline(directory, exl2, config, module, layout, CanonicalWeights(stored, layout))


def check_room(made: Outline, device: torch.device, dtype: torch.dtype, context: int) -> str:
    """What running it will take of memory, in words.

    Raises:
        ModelError: if that is more than there is.
    """
    weights, cache = made.weight_bytes(dtype), made.cache_bytes(dtype, context)
    needed, free = weights + cache + made.reading_bytes(), free_bytes(device)
    if free is not None and needed > free:
        raise ModelError(
            f"{made.directory} takes {format_bytes(needed)} on {device} as {str(dtype)[6:]} with a "
            f"context of {context}, {format_bytes(free)} is free; take a smaller "
            "--dtype or --ctx-size, or a GGUF file"
        )
    return f"{format_bytes(weights)} of weights, {format_bytes(cache)} of cache for {context} tokens"


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def fill(made: Outline, device: torch.device, dtype: torch.dtype) -> Any:
    """The outline's model with its weights, ready to generate; the outline's own module is changed."""
    module = made.module
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    state = {
        name: _parameter(made, name).to(device, dtype)
        for name in names
        if name != HEAD or not made.weights.tied
    }
    module.load_state_dict(state, strict=False, assign=True)
    if made.weights.tied:
        module.lm_head.weight = module.model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in module.parameters()), "a parameter was not filled"
    module.requires_grad_(False)
    return module


def _parameter(made: Outline, name: str) -> Tensor:
    """A parameter as the module names it, put together where it is fused there."""
    stored = [made.weights.read(part) for part in made.layout.sources(name)]
    return stored[0].clone() if len(stored) == 1 else torch.cat(stored)


def stop_ids(directory: Path, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: of generation_config.json, else of config.json, and the tokenizer's.

    Raises:
        ModelError: if generation_config.json is no JSON object.
    """
    path = directory / "generation_config.json"
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as exc:
        raise ModelError(f"{path} is no JSON object ({exc}); download it again") from exc
    found: list[int] = []
    for ids in (settings.get("eos_token_id", config.eos_token_id), tokenizer.eos_token_id):
        found += ids if isinstance(ids, list) else [ids]
    return sorted({int(token) for token in found if token is not None})
