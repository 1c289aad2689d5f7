"""Which models with experts ExLlamaV2 0.3.2 computes as they are meant (its moe_mlp.py)."""

from __future__ import annotations

from transformers import PretrainedConfig

from exlq.errors import ModelError

SPARSE = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")


def require_readable_experts(read: PretrainedConfig, architecture: str) -> None:
    """Holds a config against that reader: experts in all blocks, a token's weights adding up to 1.

    Raises:
        ModelError: for what it would compute otherwise or not load.
    """
    if architecture not in SPARSE:
        return
    if getattr(read, "mlp_only_layers", None) or getattr(read, "decoder_sparse_step", 1) != 1:
        raise ModelError(
            "config.json has experts in some blocks alone (mlp_only_layers, decoder_sparse_step), "
            "ExLlamaV2 0.3.2 in every block: it cannot be written as EXL2"
        )
    if not getattr(read, "norm_topk_prob", True):
        raise ModelError(
            "config.json has norm_topk_prob = false, ExLlamaV2 0.3.2 always lets the weights of a token's "
            "experts add up to 1: it cannot be written as EXL2"
        )
