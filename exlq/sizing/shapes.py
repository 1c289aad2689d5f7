"""The tensors of a model from config.json alone: no weights, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from exlq.errors import ModelError
from exlq.models.config import family_of, read_json
from exlq.models.family import Family
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY, block_key
from exlq.types import LinearSpec

SLIDING = "sliding_attention"


class FileTensor(NamedTuple):
    """One tensor of a GGUF file; `shape` is torch's."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it holds the weights of a linear or the embedding."""
        return len(self.shape) == 2

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; `biased` names the linears of a block that have a bias.

    `norms` gives the channels of a block's norms by their name; `window` is the tokens that
    `n_windowed` of the blocks see, `rope_tensors` what a GGUF file says of scaled positions.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    tied: bool
    biased: frozenset[str]
    norms: Mapping[str, int]
    window: int
    n_windowed: int
    rope_tensors: tuple[FileTensor, ...]

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The decoder's linears in model order: what bits per weight are counted over."""
        parts = [part.name for stage in self.family.stages for part in stage.linears]
        return tuple(
            LinearSpec(f"{block_key(i)}.{part}", *self._sizes[part], bias=part in self.biased)
            for i in range(self.n_blocks)
            for part in parts
        )

    @cached_property
    def numel(self) -> int:
        """Weights of the decoder's linears."""
        return sum(spec.numel for spec in self.linears)

    @property
    def embedding(self) -> LinearSpec:
        return LinearSpec(EMBEDDING_KEY, self.hidden_size, self.vocab_size)

    @property
    def head(self) -> LinearSpec:
        return LinearSpec(HEAD_KEY, self.hidden_size, self.vocab_size)

    @property
    def architecture(self) -> str:
        return self.family.architectures[0]

    @property
    def kv_channels(self) -> int:
        """Channels of a block's keys for one token; the values have as many."""
        return self.n_kv_heads * self.head_dim

    @cached_property
    def vectors(self) -> tuple[FileTensor, ...]:
        """Norms and biases under the checkpoint's names, all that is neither linear nor embedding."""
        found = [FileTensor("model.norm.weight", (self.hidden_size,))]
        for i in range(self.n_blocks):
            found += [FileTensor(f"{block_key(i)}.{name}.weight", (n,)) for name, n in self.norms.items()]
        found += [FileTensor(f"{s.key}.bias", (s.out_features,)) for s in self.linears if s.bias]
        return tuple(found)

    @cached_property
    def file_tensors(self) -> tuple[FileTensor, ...]:
        """The tensors of a GGUF file, fused where the family fuses them."""
        matrix = (self.vocab_size, self.hidden_size)
        ends = [FileTensor("token_embd.weight", matrix), FileTensor("output_norm.weight", matrix[1:])]
        head = [] if self.tied else [FileTensor("output.weight", matrix)]
        blocks = [tensor for i in range(self.n_blocks) for tensor in self._file_block(f"blk.{i}")]
        return (*ends, *self.rope_tensors, *blocks, *head)

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of a block's linears."""
        hidden, inner, query = self.hidden_size, self.intermediate_size, self.n_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, self.kv_channels),
            "self_attn.v_proj": (hidden, self.kv_channels),
            "self_attn.o_proj": (query, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    def _file_block(self, prefix: str) -> Iterator[FileTensor]:
        names = {**FILE_NORMS, **(FILE_NORMS_OF_OUTPUTS if self.family.norms_outputs else {})}
        for name, channels in self.norms.items():
            yield FileTensor(f"{prefix}.{names[name]}.weight", (channels,))
        rows: dict[str, tuple[int, int]] = {}
        for stage in self.family.stages:
            for part in stage.linears:
                in_features, out_features = self._sizes[part.name]
                before = rows.get(part.module, (0, 0))[0]
                rows[part.module] = (before + out_features, in_features)
                if part.name in self.biased:
                    yield FileTensor(f"{prefix}.{FILE_LINEARS[part.name]}.bias", (out_features,))
        for module, shape in rows.items():
            yield FileTensor(f"{prefix}.{FILE_LINEARS[module]}.weight", shape)


def read_shape(directory: Path) -> ModelShape:
    """The shape of the model that `directory/config.json` describes; nothing else need be there.

    Raises:
        ModelError: for an architecture that is not supported, or a number that is missing.
    """
    family, raw = family_of(directory), read_json(directory)
    return shape_of(raw, family)


def shape_of(raw: Mapping[str, Any], family: Family) -> ModelShape:
    """The shape that a config of transformers 4 or 5 describes; raises ModelError as `read_shape` does."""
    config = {**DEFAULTS.get(family.model_type, {}), **raw}
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    kv_heads = _number(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head_dim = _number(config, "head_dim") if config.get("head_dim") else hidden // heads
    n_blocks = _number(config, "num_hidden_layers")
    head_norms = {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    return ModelShape(
        family=family,
        hidden_size=hidden,
        intermediate_size=_number(config, "intermediate_size"),
        n_blocks=n_blocks,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_number(config, "vocab_size"),
        max_length=_number(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        biased=_biased(config, family.model_type),
        norms=dict.fromkeys(BLOCK_NORMS[family.norms_outputs], hidden)
        | (head_norms if family.model_type in NORMED_HEADS else {}),
        window=int(config.get("sliding_window") or 0),
        n_windowed=_n_windowed(config, family.model_type, n_blocks),
        rope_tensors=_rope_tensors(config, head_dim),
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json has {key} = {value!r}; a whole number above 0 was wanted")
    return value


def _biased(config: Mapping[str, Any], model_type: str) -> frozenset[str]:
    always, attention, mlp = BIASES.get(model_type, ((), False, False))
    found = set(always)
    if attention and config.get("attention_bias"):
        found |= {f"self_attn.{name}_proj" for name in "qkvo"}
    if mlp and config.get("mlp_bias"):
        found |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    return frozenset(found)


def _n_windowed(config: Mapping[str, Any], model_type: str, n_blocks: int) -> int:
    """Blocks with a sliding window, in the families whose runtimes have one."""
    if model_type not in WINDOW_PERIODS:
        return 0
    if isinstance(config.get("layer_types"), list):
        return int(config["layer_types"].count(SLIDING))
    given = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    period = int(given or WINDOW_PERIODS[model_type])
    return n_blocks - n_blocks // period


def _rope_tensors(config: Mapping[str, Any], head_dim: int) -> tuple[FileTensor, ...]:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling.get("full_attention") or scaling
    fraction = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    names = ROPE_TENSORS.get(str(scaling.get("rope_type") or scaling.get("type")), ())
    return tuple(FileTensor(name, (int(head_dim * fraction) // 2,)) for name in names)


BLOCK_NORMS = {
    False: ("input_layernorm", "post_attention_layernorm"),
    True: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
NORMED_HEADS = ("qwen3", "gemma3_text")
# By model_type: linears that always have a bias, and whether `attention_bias` and `mlp_bias` are read.
BIASES: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "llama": ((), True, True),
    "qwen2": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False, False),
    "qwen3": ((), True, False),
    "gemma": ((), True, False),
    "gemma2": ((), True, False),
    "gemma3_text": ((), True, False),
}
WINDOW_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # every n-th block sees the whole context
ROPE_TENSORS = {
    "llama3": ("rope_freqs.weight",),
    "longrope": ("rope_factors_long.weight", "rope_factors_short.weight"),
    "su": ("rope_factors_long.weight", "rope_factors_short.weight"),
}
FILE_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FILE_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
FILE_NORMS_OF_OUTPUTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# What transformers assumes by model_type where config.json is silent; published ones leave these out.
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma": {**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192},
    "gemma2": {**_GEMMA2, "max_position_embeddings": 8192},
    "gemma3_text": {**_GEMMA2, "max_position_embeddings": 131072, "vocab_size": 262208},
}
