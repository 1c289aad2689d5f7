"""Llama 1 to 3 and everything that calls itself `LlamaForCausalLM`."""

from exlq.models.family import Family
from exlq.types import GgufFamily

LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    "llama",
    exl2_architecture="LlamaForCausalLM",
    gguf=GgufFamily("llama", rotates_pairs=True),
)
