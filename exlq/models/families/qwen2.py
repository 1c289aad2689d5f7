"""Qwen1.5, Qwen2 and Qwen2.5: biases on q, k and v."""

from exlq.models.family import Family
from exlq.types import GgufFamily

QWEN2 = Family(
    "qwen2", ("Qwen2ForCausalLM",), "qwen2", exl2_architecture="Qwen2ForCausalLM", gguf=GgufFamily("qwen2")
)
