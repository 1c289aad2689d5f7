"""Mistral: Llama with a sliding window."""

from exlq.models.family import Family
from exlq.types import GgufFamily

MISTRAL = Family(
    "mistral",
    ("MistralForCausalLM",),
    "mistral",
    exl2_architecture="MistralForCausalLM",
    gguf=GgufFamily("llama", rotates_pairs=True),
)
