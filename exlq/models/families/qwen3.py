"""Qwen3, dense: norms on the heads of q and k."""

from exlq.models.family import Family
from exlq.types import GgufFamily

QWEN3 = Family(
    "qwen3", ("Qwen3ForCausalLM",), "qwen3", exl2_architecture="Qwen3ForCausalLM", gguf=GgufFamily("qwen3")
)
