"""Gemma: scaled embeddings, norms stored less one, tied."""

from exlq.models.family import Family
from exlq.types import GgufFamily

GEMMA = Family(
    "gemma",
    ("GemmaForCausalLM",),
    "gemma",
    exl2_architecture="GemmaForCausalLM",
    gguf=GgufFamily("gemma", norm_shift=1.0),
)
