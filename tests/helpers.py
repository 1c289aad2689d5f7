"""Tiny random models of every family, for tests that need a whole model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

transformers.utils.logging.disable_progress_bar()

# Per family: transformers' model_type and what a tiny model of it needs beyond SIZES.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "yi": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def make_model(family: str, directory: Path, *, tied: bool, seed: int = 0, **config_overrides: Any) -> Path:
    """Save a tiny random model of `family`, float32 safetensors, with a byte tokenizer, in `directory`.

    The weights are large enough that no part of the model is without effect on the logits.
    """
    model_type, extra = SETTINGS[family]
    settings = {**SIZES, **extra, "tie_word_embeddings": tied, **config_overrides}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or name.endswith("bias") else parameter.shape[-1] ** -0.5
            centre = parameter.mean() if "norm" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if family == "yi":
        edit_config(directory, architectures=["YiForCausalLM"], model_type="Yi")
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: ids 0 to 3 are special, BOS is added, then one id per byte."""
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def edit_config(directory: Path, *, without: tuple[str, ...] = (), **settings: Any) -> None:
    """Change config.json: drop the keys in `without`, then set the others."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in without}
    path.write_text(json.dumps({**config, **settings}, indent=2), encoding="utf-8")
