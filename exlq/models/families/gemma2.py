"""Gemma 2: norms after attention and MLP too, alternating windows, soft-capped scores and logits."""

from exlq.models.family import Family
from exlq.types import GgufFamily

GEMMA2 = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    "gemma2",
    exl2_architecture="Gemma2ForCausalLM",
    gguf=GgufFamily("gemma2", norm_shift=1.0),
    norms_outputs=True,
    attention="eager",  # no other kernel caps the scores
)
