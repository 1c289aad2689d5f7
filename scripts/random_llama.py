"""Llamas of random weights and real shapes, one shard a block, for scripts that measure time and memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers


@dataclass(frozen=True)
class Shape:
    """A Llama; `blocks` is how many a model of that shape usually has."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    blocks: int
    vocabulary: int

    @property
    def name(self) -> str:
        return f"{self.hidden} × {self.inner}"


def write_model(directory: Path, shape: Shape, blocks: int) -> None:
    """config.json, a one-letter tokenizer and one shard per block, random in bf16."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    index: dict[str, str] = {}
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    write_shard(directory, "ends.safetensors", ends, index)
    for block in range(blocks):
        tensors = block_shapes(shape, f"model.layers.{block}")
        write_shard(directory, f"block-{block}.safetensors", tensors, index)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def block_shapes(shape: Shape, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors."""
    hidden, inner = shape.hidden, shape.inner
    keys = hidden * shape.key_heads // shape.heads
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
    }


def write_shard(
    directory: Path, name: str, shapes: dict[str, tuple[int, ...]], index: dict[str, str]
) -> None:
    generator = torch.Generator().manual_seed(len(index))
    tensors = {
        key: (
            torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        ).bfloat16()
        for key, shape in shapes.items()
    }
    save_file(tensors, directory / name)
    index.update(dict.fromkeys(tensors, name))


def write_tokenizer(directory: Path) -> None:
    """Every byte a token: enough to make rows of the bundled calibration text."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
