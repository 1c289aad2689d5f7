"""The entries of a GGUF file that say what the model is: hyper-parameters and where it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType

from exlq.errors import ModelError
from exlq.formats.gguf import rope
from exlq.formats.gguf.experts import expert_parameters
from exlq.formats.gguf.values import KeyValue
from exlq.types import GgufFamily

_LOCAL_PATH = re.compile(r"(~|\.{0,2}[/\\]|[A-Za-z]:\\)")
_ALWAYS_TIED = ("gemma", "gemma2")  # llama.cpp has no output.weight for them
_SAMPLING = {
    "temperature": "sampling_temp",
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers adds where a key is absent, for the few keys that is known of."""
    given = {key: value for key, value in config.items() if value is not None}
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **given}


def number(config: Mapping[str, Any], key: str) -> Any:
    """A number of a config; raises ModelError where it is missing."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"config.json has {key} = {value!r}; a number was wanted")
    return value


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of the queries, and of keys and values."""
    heads = number(config, "num_attention_heads")
    return heads, config.get("num_key_value_heads") or heads


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of a head."""
    return int(config.get("head_dim") or number(config, "hidden_size") // head_counts(config)[0])


def hyper_parameters(config: Mapping[str, Any], family: GgufFamily) -> list[KeyValue]:
    """The `{architecture}.*` entries of a model.

    Args:
        config: config.json as an object, in the form of transformers 4 or 5.

    Raises:
        ModelError: for a missing number, or a setting that llama.cpp would compute otherwise.
    """
    config, architecture = completed(config), family.architecture
    _check_runnable(config, architecture)
    heads, kv_heads = head_counts(config)
    entries = [
        KeyValue(f"{architecture}.{key}", int(value), GGUFValueType.UINT32)
        for key, value in {
            "block_count": number(config, "num_hidden_layers"),
            "context_length": number(config, "max_position_embeddings"),
            "embedding_length": number(config, "hidden_size"),
            "feed_forward_length": number(config, "intermediate_size"),
            "vocab_size": number(config, "vocab_size"),
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": head_dim(config),
            "attention.value_length": head_dim(config),
        }.items()
    ]
    epsilon = f"{architecture}.attention.layer_norm_rms_epsilon"
    entries.append(KeyValue(epsilon, float(number(config, "rms_norm_eps")), GGUFValueType.FLOAT32))
    entries += expert_parameters(config, architecture)
    entries += _soft_caps(config, architecture) + _window(config, architecture)
    positions = rope.read_rope(config)
    if architecture == "phi3":  # wanted even where nothing is scaled
        key = "phi3.rope.scaling.original_context_length"
        entries.append(KeyValue(key, positions.original_length, GGUFValueType.UINT32))
    known = {entry.key for entry in entries}
    positioned = rope.rope_metadata(positions, architecture, head_dim(config))
    return entries + [entry for entry in positioned if entry.key not in known]


def _check_runnable(config: Mapping[str, Any], architecture: str) -> None:
    """Refuses settings for which llama.cpp has no key and would go on with its own."""
    name, allowed = _ACTIVATIONS[architecture]
    activation = config.get(name) or config.get("hidden_act") or allowed[0]
    if activation not in allowed:
        raise ModelError(f"{architecture} in llama.cpp computes {allowed[0]}, config.json {activation}")
    if config.get("use_bidirectional_attention"):
        raise ModelError(f"{architecture} in llama.cpp attends to earlier tokens alone, config.json to all")
    if architecture in _ALWAYS_TIED and config.get("tie_word_embeddings") is False:
        raise ModelError(
            f"{architecture} in llama.cpp has no head of its own, this model has; use a tied one"
        )
    if architecture == "phi3" and head_dim(config) * head_counts(config)[0] != config["hidden_size"]:
        raise ModelError(
            f"phi3 in llama.cpp has heads of {config['hidden_size'] // head_counts(config)[0]} channels,"
            f" config.json of {head_dim(config)}"
        )
    _check_query_scale(config, architecture)


def _check_query_scale(config: Mapping[str, Any], architecture: str) -> None:
    """Gemma's scores are divided by a root that llama.cpp derives: of the head's channels, or in the 27B,
    which it knows by its blocks, of hidden_size / heads.
    """
    if architecture not in _BLOCKS_OF_27B or "query_pre_attn_scalar" not in config:
        return
    large = config["num_hidden_layers"] == _BLOCKS_OF_27B[architecture]
    derived = config["hidden_size"] // head_counts(config)[0] if large else head_dim(config)
    if config["query_pre_attn_scalar"] != derived:
        raise ModelError(
            f"{architecture} in llama.cpp scales the scores by 1/√{derived}, config.json by"
            f" 1/√{config['query_pre_attn_scalar']} (query_pre_attn_scalar)"
        )


def _soft_caps(config: Mapping[str, Any], architecture: str) -> list[KeyValue]:
    found = []
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        needed, possible = architecture in _CAPPED[key]["always"], architecture in _CAPPED[key]["possible"]
        value = config.get(key)
        if value is None and needed:
            raise ModelError(f"{architecture} in llama.cpp always caps, config.json has no {key}")
        if value is not None and not possible:
            raise ModelError(f"{architecture} in llama.cpp has no {key}, config.json says {value}")
        if value is not None:
            found.append(KeyValue(f"{architecture}.{key}", float(value), GGUFValueType.FLOAT32))
    return found


def _window(config: Mapping[str, Any], architecture: str) -> list[KeyValue]:
    """Sliding windows, where llama.cpp has them; elsewhere (mistral, qwen2) its attention is full."""
    key = f"{architecture}.attention.sliding_window"
    if architecture == "phi3":  # read, and 0 tells Phi-4 from Phi-3
        return [KeyValue(key, int(config.get("sliding_window") or 0), GGUFValueType.UINT32)]
    if architecture not in _WINDOW_PERIOD:
        return []
    period = _period(config, architecture)
    if period == _EVERY_BLOCK:
        return []
    entries = [KeyValue(key, int(number(config, "sliding_window")), GGUFValueType.UINT32)]
    if period != _WINDOW_PERIOD[architecture]:
        entries.append(KeyValue(f"{key}_pattern", period, GGUFValueType.UINT32))
    return entries


def _period(config: Mapping[str, Any], architecture: str) -> int:
    """n, where every n-th block sees the whole context and the others a window."""
    default, layer_types = _WINDOW_PERIOD[architecture], config.get("layer_types")
    if layer_types is None:
        period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or default)
        layer_types = [_layer_type(i, period) for i in range(number(config, "num_hidden_layers"))]
    periods: list[int] = [default, *range(1, len(layer_types) + 2)]
    for period in periods:
        if list(layer_types) == [_layer_type(i, period) for i in range(len(layer_types))] and (
            period != _EVERY_BLOCK or architecture in _WINDOW_OPTIONAL
        ):
            return period
    raise ModelError(
        f"{architecture} in llama.cpp lets every n-th block alone see the whole context,"
        " the layer_types of config.json are not so for any n"
    )


def _layer_type(index: int, period: int) -> str:
    return "sliding_attention" if index % period < period - 1 else "full_attention"


def general(
    directory: Path,
    name: str,
    architecture: str,
    n_weights: int,
    file_type: int,
    extra: Sequence[KeyValue] = (),
) -> list[KeyValue]:
    """The `general.*` entries, then `extra`.

    Args:
        directory: of the model, for its model card (README.md) and generation_config.json.
        name: of the model, used where the card has none: like `Llama-3.1-8B-Instruct`.
        n_weights: of the whole model, for the size label.
        file_type: the number of `gguf.LlamaFileType`.

    Raises:
        ModelError: for a model card or generation settings that cannot be read.
    """
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    try:
        _described(directory, name, n_weights).set_gguf_meta_model(writer)
    except Exception as exc:  # YAML, JSON and the heuristics raise what they like
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise ModelError(
            f"{directory}: README.md or generation_config.json cannot be used: {reason}"
        ) from exc
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = [_entry(key, value.value, value.type) for key, value in writer.kv_data[0].items()]
    return [entry for entry in entries if not _is_local_path(entry.value)] + list(extra)


def _described(directory: Path, name: str, n_weights: int) -> Any:
    """What the card beside the model and its name tell; never the directory itself."""
    card = gguf.Metadata.load_model_card(directory)
    described = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, None, Path(name.replace("/", "-")), n_weights
    )
    if described.name is None:
        described.name = name
    if described.size_label is None:
        described.size_label = gguf.size_label(n_weights, n_weights, 0, 0)
    settings = gguf.Metadata.load_generation_config(directory)
    for key, field in _SAMPLING.items():
        if settings.get(key) is not None:
            setattr(described, field, settings[key])
    return described


def _entry(key: str, value: Any, kind: GGUFValueType) -> KeyValue:
    element = GGUFValueType.get_type(value[0]) if kind == GGUFValueType.ARRAY else None
    return KeyValue(key, value, kind, element)


def _is_local_path(value: Any) -> bool:
    return isinstance(value, str) and _LOCAL_PATH.match(value) is not None


# llama.cpp has the tanh form; older configs say gelu for it, and the other is within 5e-4 of it.
_GELU = ("hidden_activation", ("gelu_pytorch_tanh", "gelu", "gelu_new"))
_SILU = ("hidden_act", ("silu", "swish"))
_ACTIVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": _SILU,
    "qwen2": _SILU,
    "qwen3": _SILU,
    "qwen2moe": _SILU,
    "qwen3moe": _SILU,
    "phi3": _SILU,
    "gemma": _GELU,
    "gemma2": _GELU,
    "gemma3": _GELU,
}
_BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}  # llama.cpp's own, where no key says otherwise
_WINDOW_OPTIONAL = ("gemma3",)
_EVERY_BLOCK = 1
_CAPPED: dict[str, dict[str, tuple[str, ...]]] = {
    "attn_logit_softcapping": {"always": ("gemma2",), "possible": ("gemma2",)},
    "final_logit_softcapping": {"always": ("gemma2",), "possible": ("gemma2", "gemma3")},
}
_GEMMA: dict[str, Any] = {"head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_GEMMA2: dict[str, Any] = {
    **_GEMMA,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN3_MOE: dict[str, Any] = {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
}
_QWEN2_MOE: dict[str, Any] = {
    "num_experts": 60,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-6,
}
# What transformers assumes by model_type; configs of Gemma are known to leave these out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 128, "rms_norm_eps": 1e-6},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "gemma": {**_GEMMA, "max_position_embeddings": 8192},
    "gemma2": {
        **_GEMMA2,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA2, "max_position_embeddings": 131072, "vocab_size": 262208, "rope_theta": 1e6},
}
