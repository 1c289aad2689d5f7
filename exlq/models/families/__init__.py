"""The model families there are, by name."""

from __future__ import annotations

from exlq.models.families.gemma import GEMMA
from exlq.models.families.gemma2 import GEMMA2
from exlq.models.families.gemma3 import GEMMA3
from exlq.models.families.llama import LLAMA
from exlq.models.families.mistral import MISTRAL
from exlq.models.families.mixtral import MIXTRAL
from exlq.models.families.phi3 import PHI3
from exlq.models.families.qwen2 import QWEN2
from exlq.models.families.qwen2_moe import QWEN2_MOE
from exlq.models.families.qwen3 import QWEN3
from exlq.models.families.qwen3_moe import QWEN3_MOE
from exlq.models.families.yi import YI
from exlq.models.family import Family

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "yi": YI,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
