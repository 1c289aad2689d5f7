"""GGUF files of the bundled model, written by the `gguf` package alone, for runs in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Store = Callable[[str, Tensor], tuple[Any, gguf.GGMLQuantizationType]]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_f32(_name: str, tensor: Tensor) -> tuple[Any, gguf.GGMLQuantizationType]:
    return tensor.numpy(), gguf.GGMLQuantizationType.F32


def write_llama(
    directory: Path, path: Path, store: Store = as_f32, vocabulary: bool = True, **writer_settings: Any
) -> Path:
    """A Llama checkpoint as GGUF; `store` says how each matrix is stored, by its GGUF name."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama", **writer_settings)
    _add_sizes(writer, config)
    if vocabulary:
        _add_vocabulary(writer, directory, config)
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored_name = gguf_name(name)
        values = tensor.float()
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name:
                values = paired(values, config[heads])
        data, kind = store(stored_name, values) if values.ndim == 2 else as_f32(stored_name, values)
        writer.add_tensor(stored_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.weight"


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of rotary pairs: (0, D/2), (1, D/2 + 1) …"""
    rows, in_features = weight.shape
    w = weight.reshape(heads, 2, rows // heads // 2, in_features)  # (heads, half, D/2, in)
    return w.transpose(1, 2).reshape(rows, in_features)


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: gguf.GGUFWriter, directory: Path, config: dict[str, Any]) -> None:
    whole = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, i in whole["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in whole["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(_opens_with_bos(whole))


def _opens_with_bos(whole: dict[str, Any]) -> bool:
    return "SpecialToken" in json.dumps(whole.get("post_processor"))


def by_packer(type_name: str, pack: Callable[[str, Tensor], Tensor]) -> Store:
    """Every matrix in one type, packed by `pack(type_name, weight)`."""

    def store(_name: str, tensor: Tensor) -> tuple[Any, gguf.GGMLQuantizationType]:
        packed = pack(type_name, tensor)
        assert packed.dtype == torch.uint8
        return np.ascontiguousarray(packed.numpy()), gguf.GGMLQuantizationType[type_name]

    return store
