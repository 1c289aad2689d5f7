"""Yi: Llama under another name, in its first releases with other names for the norms.

ExLlamaV2 0.3.2 wants those first names under `YiForCausalLM`; transformers' are Llama's, and so is
the architecture to write.
"""

from exlq.models.family import Family
from exlq.types import GgufFamily

YI = Family(
    "yi",
    ("YiForCausalLM",),
    "llama",
    exl2_architecture="LlamaForCausalLM",
    gguf=GgufFamily("llama", rotates_pairs=True),
    other_model_types=("Yi", "yi"),
    stored_names={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
)
