"""Gemma 3, text only: local and global blocks with a rotary embedding each, norms on q and k.

ExLlamaV2 0.3.2 knows only the multimodal class by name and would run this one as a Llama.
"""

from exlq.models.family import Family
from exlq.types import GgufFamily

GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM",),
    "gemma3_text",
    exl2_architecture=None,
    gguf=GgufFamily("gemma3", norm_shift=1.0),
    norms_outputs=True,
)
