"""The tensors of a model from config.json alone: no weights, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from exlq.errors import ModelError
from exlq.formats.gguf.recipes import is_quantized_name
from exlq.models.config import family_of, read_json
from exlq.models.family import EXPERTS, MLP, SHARED, Experts, Family, Stage
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY, block_key
from exlq.sizing.tables import (
    BIASES,
    BLOCK_NORMS,
    DOWN,
    FILE_LINEARS,
    FILE_NORMS,
    FILE_NORMS_OF_OUTPUTS,
    NORMED_HEADS,
    QKV,
    ROPE_TENSORS,
    WINDOW_PERIODS,
)
from exlq.sizing.tables import DEFAULTS as DEFAULTS
from exlq.types import LinearSpec

SLIDING = "sliding_attention"


class FileTensor(NamedTuple):
    """One tensor of a GGUF file; `shape` is torch's."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it holds the weights of linears or the embedding."""
        return len(self.shape) > 1 and is_quantized_name(self.name)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Sparse:
    """The experts of a block, and how many of them a token goes to; their width, and the shared one's."""

    count: int = 0
    per_token: int = 0
    width: int = 0
    shared: int = 0

    @property
    def share(self) -> float:
        """The part of all tokens that an expert gets, on average."""
        return self.per_token / max(1, self.count)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; `biased` names the linears of a block that have a bias.

    `stages` has the linears of each block, `sparse` the experts of those that have some. `norms` gives
    the channels of a block's norms by their name; `window` is the tokens that
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
    stages: tuple[tuple[Stage, ...], ...]
    sparse: Sparse

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The decoder's linears in model order: what bits per weight are counted over."""
        return tuple(
            LinearSpec(
                f"{block_key(i)}.{self.family.canonical(part.name)}",
                *self._size(part.name),
                bias=part.name in self.biased,
            )
            for i, stages in enumerate(self.stages)
            for stage in stages
            for part in stage.linears
        )

    @property
    def inner_channels(self) -> int:
        """Channels inside the MLPs that one token goes through in a block."""
        sparse = self.sparse
        return max(self.intermediate_size, sparse.per_token * sparse.width + sparse.shared)

    def share(self, spec: LinearSpec) -> float:
        """The part of all tokens that reaches a linear, on average."""
        return self.sparse.share if f".{self.family.canonical(EXPERTS)}." in spec.key else 1.0

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
        for i in filter(self._is_sparse, range(self.n_blocks)):
            prefix = f"{block_key(i)}.{self.family.canonical(MLP)}"
            found.append(FileTensor(f"{prefix}.gate.weight", self._router))
            found += [FileTensor(f"{prefix}.shared_expert_gate.weight", (1, self.hidden_size))] * self._shares
        found += [FileTensor(f"{s.key}.bias", (s.out_features,)) for s in self.linears if s.bias]
        return tuple(found)

    @cached_property
    def file_tensors(self) -> tuple[FileTensor, ...]:
        """The tensors of a GGUF file, fused where the family fuses them."""
        matrix = (self.vocab_size, self.hidden_size)
        ends = [FileTensor("token_embd.weight", matrix), FileTensor("output_norm.weight", matrix[1:])]
        head = [] if self.tied else [FileTensor("output.weight", matrix)]
        blocks = [tensor for i in range(self.n_blocks) for tensor in self._file_block(i)]
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

    def _size(self, part: str) -> tuple[int, int]:
        """(in_features, out_features) of a linear of a block."""
        if part in self._sizes:
            return self._sizes[part]
        owner, _, name = part.rpartition(".")
        width = self.sparse.shared if owner == SHARED else self.sparse.width
        return (width, self.hidden_size) if name in DOWN else (self.hidden_size, width)

    def _is_sparse(self, index: int) -> bool:
        return any(stage.expert is not None for stage in self.stages[index])

    @property
    def _router(self) -> tuple[int, int]:
        return (self.sparse.count, self.hidden_size)

    @property
    def _shares(self) -> bool:
        """Whether sparse blocks have an expert that every token goes through."""
        return self.sparse.shared > 0

    def _file_block(self, index: int) -> Iterator[FileTensor]:
        prefix = f"blk.{index}"
        names = {**FILE_NORMS, **(FILE_NORMS_OF_OUTPUTS if self.family.norms_outputs else {})}
        for name, channels in self.norms.items():
            yield FileTensor(f"{prefix}.{names[name]}.weight", (channels,))
        if self._is_sparse(index):
            yield FileTensor(f"{prefix}.ffn_gate_inp.weight", self._router)
            yield from [FileTensor(f"{prefix}.ffn_gate_inp_shexp.weight", (self.hidden_size,))] * self._shares
        shapes: dict[str, tuple[int, ...]] = {}
        for part in (part for stage in self.stages[index] for part in stage.linears):
            in_features, out_features = self._size(part.name)
            before = shapes.get(part.module, (0, 0))[0]
            stacked = (self.sparse.count, out_features, in_features)
            shapes[part.stack or part.module] = (
                stacked if part.stack else (before + out_features, in_features)
            )
            if part.name in self.biased:
                yield FileTensor(f"{prefix}.{FILE_LINEARS[part.name]}.bias", (out_features,))
        for module, shape in shapes.items():
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
        stages=tuple(family.stages_of(config.get, i) for i in range(n_blocks)),
        sparse=_sparse(config, family.experts),
    )


def _sparse(config: Mapping[str, Any], names: Experts | None) -> Sparse:
    if names is None or not names.count(config.get):
        return Sparse()
    shared = _number(config, names.shared_width) if names.shared_width else 0
    per_token = _number(config, "num_experts_per_tok")
    return Sparse(names.count(config.get), per_token, _number(config, names.width), shared)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json has {key} = {value!r}; a whole number above 0 was wanted")
    return value


def _biased(config: Mapping[str, Any], model_type: str) -> frozenset[str]:
    always, attention, mlp = BIASES.get(model_type, ((), False, False))
    found = set(always) - (QKV if config.get("qkv_bias") is False else set())
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
