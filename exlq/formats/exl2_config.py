"""config.json in the form ExLlamaV2 0.3.2 reads.

Its reader (exllamav2/config.py, rope.py and architecture.py of that version) knows only top-level
keys. What matters here:

- `rope_theta` is 10000 where it is absent; `rope_parameters` is not looked at.
- `rope_scaling` must have `type` or `rope_type`, never both. It acts on `linear`, `llama3`, `yarn`
  and `longrope` (also spelled `su`); every other kind is the default without a word.
- `linear` divides positions by `factor`.
- `yarn` uses `factor` and `original_max_position_embeddings` only. The ramp of its frequencies is
  placed by the length served, not by the original length, and it acts only where the length served
  is the longer; betas, `attention_factor`, `mscale` and `truncate` are ignored.
- `longrope` takes the original length from the top level. Where the length served is longer, the
  long factors hold for every sequence, however short, and cos and sin are multiplied by
  sqrt(1 + ln(served / original) / ln(original)).
- The length served is the first of `max_sequence_length`, `model_max_length` and
  `max_position_embeddings`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exlq.errors import ModelError
from exlq.formats.exl2_experts import require_readable_experts

# fmt: off
KNOWN_ARCHITECTURES: Final = frozenset({
    "CohereForCausalLM", "Cohere2ForCausalLM", "DbrxForCausalLM", "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration",
    "GemmoeForCausalLM", "Glm4ForCausalLM", "GraniteForCausalLM", "IndexForCausalLM",
    "InternLM2ForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration", "MiniCPMForCausalLM",
    "MistralForCausalLM", "Mistral3ForConditionalGeneration", "MixtralForCausalLM", "OrionForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "Starcoder2ForCausalLM", "YiForCausalLM",
})
# fmt: on

# Keys the reader looks for, for which it has no default or another one than transformers has.
_READ_KEYS = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
)
_LENGTH_KEYS = ("max_sequence_length", "model_max_length", "max_position_embeddings")
_ALTERNATING = frozenset({"Gemma2ForCausalLM", "Cohere2ForCausalLM"})  # sliding and full attention by turns
_REPLACED = ("auto_map", "dtype", "rope_scaling", "partial_rotary_factor", "quantization_config")
_MODEL_TYPES = {"Yi": "llama", "yi": "llama"}  # of models that came with code of their own, now transformers'
_TOLERANCE = 1e-5  # relative, of rope frequencies and factors; fp16 cos and sin resolve 5e-4


def require_known(architecture: str) -> None:
    """Refuses what ExLlamaV2 0.3.2 would load as a Llama.

    Raises:
        ModelError: if it does not know the architecture by name.
    """
    if architecture not in KNOWN_ARCHITECTURES:
        raise ModelError(
            f"ExLlamaV2 0.3.2 does not know {architecture} by name and would load it as a Llama:"
            " it cannot be written as EXL2"
        )


def exl2_config(
    source: Mapping[str, Any],
    *,
    bits: float,
    head_bits: int,
    rows: int,
    length: int,
    dataset: str,
    version: str,
    architecture: str,
) -> dict[str, Any]:
    """The source's config, readable by ExLlamaV2 0.3.2 and still by transformers.

    Args:
        source: config.json as it stands in the source, with `rope_theta` and `rope_scaling` or with
            `rope_parameters`. Not modified.
        rows, length, dataset: of the calibration.

    Raises:
        ModelError: if ExLlamaV2 does not know the architecture, or if its rope or its order of
            sliding and full attention has no expression there.
    """
    require_known(architecture)
    read = _as_transformers_reads(source)
    require_readable_experts(read, architecture)
    written = {key: copy.deepcopy(value) for key, value in source.items() if key not in _REPLACED}
    for key in _READ_KEYS:
        if written.get(key) is None and getattr(read, key, None) is not None:
            written[key] = getattr(read, key)
    written["model_type"] = read.model_type
    written |= _rope_keys(read, written)
    if architecture in _ALTERNATING:
        written["sliding_window_pattern"] = _sliding_window_pattern(read.layer_types)
    calibration = {"rows": rows, "length": length, "dataset": dataset}
    return written | {
        "architectures": [architecture],
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "exl2",
            "version": version,
            "bits": bits,
            "head_bits": head_bits,
            "calibration": calibration,
        },
    }


def _as_transformers_reads(source: Mapping[str, Any]) -> PretrainedConfig:
    values = copy.deepcopy({key: value for key, value in source.items() if key != "auto_map"})
    model_type = values.pop("model_type", None)
    model_type = _MODEL_TYPES.get(model_type, model_type)
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ModelError(
            f"config.json (model_type {model_type!r}) is not read by transformers: {reason}"
        ) from exc


def _sliding_window_pattern(layer_types: list[str]) -> int:
    """The n for which every n-th layer has full attention, as ExLlamaV2 counts them."""
    sliding = [kind == "sliding_attention" for kind in layer_types]
    for pattern in range(2, len(sliding) + 2):
        if sliding == [(i + 1) % pattern != 0 for i in range(len(sliding))]:
            return pattern
    raise ModelError(
        f"layer_types has full attention in layers {[i for i, s in enumerate(sliding) if not s]}:"
        " ExLlamaV2 0.3.2 knows only every n-th layer, n ≥ 2"
    )


def _rope_keys(read: PretrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and what belongs to them; keys at their default are left out."""
    rope = _one_rope(read.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ModelError(f"rope_type {kind!r} has no expression in ExLlamaV2 0.3.2, which knows {known}")
    keys = {"rope_theta": rope["rope_theta"]} | _KINDS[kind](read, rope, _length_served(written))
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return keys


def _one_rope(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope of all layers, also where it is given by layer kind."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if not nested:
        return parameters
    if any(rope != nested[0] for rope in nested):
        raise ModelError("rope_parameters differ by layer kind: ExLlamaV2 0.3.2 has one rope for all layers")
    return nested[0]


def _length_served(written: Mapping[str, Any]) -> int:
    return int(next(written[key] for key in _LENGTH_KEYS if written.get(key) is not None))


def _default(read: PretrainedConfig, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
    return {}


def _scaled(*names: str) -> Callable[[PretrainedConfig, Mapping[str, Any], int], dict[str, Any]]:
    """A kind whose `rope_scaling` is the named parameters as they are."""

    def keys(read: PretrainedConfig, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
        return {"rope_scaling": {"rope_type": rope["rope_type"]} | {name: rope[name] for name in names}}

    return keys


def _llama3(read: PretrainedConfig, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
    original = rope["original_max_position_embeddings"]
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return _scaled(*names)(read, rope, served) | {"original_max_position_embeddings": original}


def _longrope(read: PretrainedConfig, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
    original = rope["original_max_position_embeddings"]
    names = [
        name
        for name in (
            "factor",
            "attention_factor",
            "long_factor",
            "short_factor",
            "original_max_position_embeddings",
        )
        if rope.get(name) is not None
    ]
    _, wanted = ROPE_INIT_FUNCTIONS["longrope"](read, torch.device("cpu"))
    found = math.sqrt(1 + math.log(served / original) / math.log(original)) if served > original else 1.0
    if not math.isclose(wanted, found, rel_tol=_TOLERANCE):
        raise ModelError(
            f"longrope has attention factor {wanted:.6g}: ExLlamaV2 0.3.2 derives {found:.6g} from lengths"
            f" {served} and {original} and reads no other"
        )
    return _scaled(*names)(read, rope, served) | {"original_max_position_embeddings": original}


def _yarn(read: PretrainedConfig, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
    """As yarn where ExLlamaV2's yarn is the source's, else the same frequencies as longrope."""
    inv_freq, attention = ROPE_INIT_FUNCTIONS["yarn"](read, torch.device("cpu"))
    original = rope["original_max_position_embeddings"]
    rope = dict(rope) | {"factor": rope.get("factor") or read.max_position_embeddings / original}
    if _reads_yarn_as(inv_freq, attention, rope, served):
        names = [
            name for name in rope if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        ]
        return _scaled(*names)(read, rope, served) | {"original_max_position_embeddings": original}
    return _as_longrope(inv_freq, attention, rope, served)


def _reads_yarn_as(inv_freq: Tensor, attention: float, rope: Mapping[str, Any], served: int) -> bool:
    """Whether ExLlamaV2 finds these frequencies and this attention factor in the `yarn` keys."""
    if served <= rope["original_max_position_embeddings"]:
        return False
    if not math.isclose(attention, 0.1 * math.log(rope["factor"]) + 1, rel_tol=_TOLERANCE):
        return False
    half, base = len(inv_freq), rope["rope_theta"]
    plain = base ** (-torch.arange(half, dtype=torch.float64) / half)
    low, high = (half * math.log(served / (turns * 2 * math.pi)) / math.log(base) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
    ramp = ((torch.arange(half) - low) / (high - low or 0.001)).clamp(0, 1)
    found = plain * (1 - ramp + ramp / rope["factor"])
    return bool(torch.allclose(inv_freq.double(), found, rtol=_TOLERANCE, atol=0))


def _as_longrope(inv_freq: Tensor, attention: float, rope: Mapping[str, Any], served: int) -> dict[str, Any]:
    """Any frequencies and any attention factor ≥ 1, as the keys of `longrope`.

    The factors divide the plain frequencies, so they give any frequencies. The original length is
    where sqrt(1 + ln(served / original) / ln(original)) = sqrt(ln(served) / ln(original)) is the
    attention factor; it need not be an integer.
    """
    if attention < 1 - _TOLERANCE:
        raise ModelError(f"yarn has attention factor {attention:.6g}: ExLlamaV2 0.3.2 has none below 1")
    half = len(inv_freq)
    plain = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    factors = (plain / inv_freq.double()).tolist()
    return {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": rope["factor"],
            "attention_factor": attention,
            "long_factor": factors,
            "short_factor": factors,
        },
        "original_max_position_embeddings": served ** (1 / attention**2)
        if attention > 1 + _TOLERANCE
        else served,
    }


_KINDS: Final[dict[str, Callable[[PretrainedConfig, Mapping[str, Any], int], dict[str, Any]]]] = {
    "default": _default,
    "linear": _scaled("factor"),
    "dynamic": _scaled("factor"),  # not read; equal to the default up to max_position_embeddings
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
