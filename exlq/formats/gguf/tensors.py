"""The tensors of a GGUF file: their names, their order and what was done to the checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import gguf
import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf import metadata, rope
from exlq.formats.gguf.recipes import is_quantized_name
from exlq.types import GgufFamily, Weights

_STACKED = re.compile(r"_exps\.weight$")
_LONGEST_NAME_BYTES = 63  # llama.cpp's GGML_MAX_NAME, less the final zero
_SUFFIXES = (".weight", ".bias")
_HEAD = "lm_head.weight"
# Matrices of a block in the order in which a true-sequential quantizer has them.
_MATRICES = (
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_qkv.weight",
    "attn_output.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
    "ffn_gate_shexp.weight",
    "ffn_up_shexp.weight",
    "ffn_down_shexp.weight",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "ffn_down_exps.weight",
)
_QKV = ("attn_q", "attn_k", "attn_v")
_DENSE = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_BIASED = {"llama": _DENSE, "qwen2": _QKV, "qwen2moe": _QKV}  # linears with one, by architecture
_VECTORS = ("ffn_gate_inp_shexp.weight",)  # matrices of one row in checkpoints


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of the file and the tensors of the checkpoint it is made of.

    The rows of `sources`, canonical names, follow one another, `rows` of each; row i of the file is row
    `order[i]` of them, and `shift` is added to every value. Experts' matrices are stacked: `shape`, which is
    torch's, is then (experts, rows of each, in_features). A computed tensor has a `value`, float32, in
    place of sources.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    order: Tensor | None = None  # (rows,) int64
    shift: float = 0.0
    value: Tensor | None = None

    @property
    def matrix(self) -> bool:
        """Whether this may be quantized: matrices of weights, no router, norm, bias or computed tensor."""
        return len(self.shape) >= 2 and self.value is None and is_quantized_name(self.name)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of the sources' rows together: they may be vectors or scalars."""
        n_rows, total = sum(self.rows), prod(self.shape)
        return (n_rows,) if total == n_rows and len(self.shape) == 1 else (n_rows, total // n_rows)

    @property
    def stacked(self) -> bool:
        """Whether it holds a matrix of every expert, one source each."""
        return len(self.shape) > 2


def file_tensors(
    weights: Weights,
    config: Mapping[str, object],
    family: GgufFamily,
    ties: Mapping[str, str],
    tied: bool,
) -> tuple[Entry, ...]:
    """Every tensor of the file, in its order.

    That is embedding, final norm and computed tensors; per block its norms and biases, then the matrices
    in the order they are quantized in; last the head, unless it is `tied` to the embedding.

    Args:
        weights: under canonical names, each linear's apart.
        config: config.json as an object.
        ties: by linear (no `.weight`), in the order of their rows, the key of the linear they are stored as.

    Raises:
        ModelError: for a tensor llama.cpp has no name for, or a setting it cannot run.
    """
    config = metadata.completed(config)
    names = name_map(family, int(metadata.number(config, "num_hidden_layers")))
    entries = [
        _entry(weights, config, family, stored, sources, names)
        for stored, sources in stored_names(weights.keys(), ties).items()
        if not (tied and stored == _HEAD)
    ]
    positions, channels = rope.read_rope(config), metadata.head_dim(config)
    for name, value in rope.rope_tensors(positions, family.architecture, channels).items():
        entries.append(Entry(name, (), (), tuple(value.shape), value=value))
    return tuple(sorted(entries, key=lambda entry: file_place(entry.name)))


def file_shape(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape in the file of what has these shapes in the checkpoint."""
    if _STACKED.search(name):
        return (len(shapes), *shapes[0])
    return shapes[0][1:] if name.endswith(_VECTORS) else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def to_file(entry: Entry, values: Tensor) -> Tensor:
    """Rows (or rows of bytes) of the concatenated sources, in the order of the file; no shift is added."""
    return values if entry.order is None else values[entry.order.to(values.device)]


def from_file(entry: Entry, values: Tensor) -> dict[str, Tensor]:
    """The inverse of `to_file`: rows of each source, by its canonical name."""
    if len(values) != sum(entry.rows):
        raise FormatError(f"{entry.name} has {len(values)} rows, {sum(entry.rows)} were wanted")
    if entry.order is not None:
        values = values[entry.order.argsort().to(values.device)]
    return dict(zip(entry.sources, torch.split(values, list(entry.rows)), strict=True))


def shifted(entry: Entry, values: Tensor) -> Tensor:
    """Checkpoint's float values as the file has them."""
    return values + entry.shift if entry.shift else values


def unshifted(entry: Entry, values: Tensor) -> Tensor:
    """The file's float values as the checkpoint has them, to rounding."""
    return values - entry.shift if entry.shift else values


def file_rows(entry: Entry, source: str) -> Tensor:
    """(rows,) int64: where in the file the rows of one source are."""
    start = sum(entry.rows[: entry.sources.index(source)])
    rows = torch.arange(start, start + entry.rows[entry.sources.index(source)])
    return rows if entry.order is None else entry.order.argsort()[rows]


def name_map(family: GgufFamily, n_blocks: int) -> gguf.TensorNameMap:
    """The gguf package's names for an architecture: the same module may have another name in another."""
    for architecture, name in gguf.MODEL_ARCH_NAMES.items():
        if name == family.architecture:
            return gguf.get_tensor_name_map(architecture, n_blocks)
    raise ModelError(f"the gguf package knows no architecture {family.architecture!r}; install a newer one")


def find_name(names: gguf.TensorNameMap, stored: str, architecture: str) -> str:
    """The file's name for a checkpoint's; raises ModelError where llama.cpp has none or it is too long."""
    name = names.get_name(stored, try_suffixes=_SUFFIXES)
    if name is None:
        raise ModelError(f"llama.cpp has no name for {stored} in a model of {architecture}")
    if len(name.encode()) > _LONGEST_NAME_BYTES:
        raise ModelError(f"{name} has {len(name)} characters, llama.cpp takes {_LONGEST_NAME_BYTES}")
    return str(name)


def stored_names(names: Collection[str], ties: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """By the name a tensor would have in a checkpoint that fuses tied linears: its canonical sources."""
    stored: dict[str, tuple[str, ...]] = {}
    for name in names:
        linear, _, kind = name.rpartition(".")
        if linear not in ties:
            stored[name] = (name,)
            continue
        tie = ties[linear]
        members = (f"{key}.{kind}" for key, other in ties.items() if other == tie)
        stored[f"{tie}.{kind}"] = tuple(member for member in members if member in names)
    return stored


def pair_order(name: str, rows: int, n_heads: int, n_kv_heads: int) -> Tensor | None:
    """Puts channel j of a head's second half after channel j of its first, for q and k alone."""
    linear = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}.get(linear)
    if heads is None:
        return None
    halves = torch.arange(rows).view(heads, 2, -1)  # (heads, 2, head_dim / 2)
    return halves.transpose(1, 2).flatten()


def file_place(name: str) -> tuple[int, int, int]:
    """Sorts names as the file has them: (part of the file, block, place in the block)."""
    part, _, rest = name.partition(".")
    if part != "blk":
        first = {"token_embd": 0, "output_norm": 1, "output": 4}
        return first.get(part, 2), 0, 0
    block, _, own = rest.partition(".")
    return 3, int(block), 1 + _MATRICES.index(own) if own in _MATRICES else 0


def _entry(
    weights: Weights,
    config: Mapping[str, object],
    family: GgufFamily,
    stored: str,
    sources: tuple[str, ...],
    names: gguf.TensorNameMap,
) -> Entry:
    name = find_name(names, stored, family.architecture)
    if name.endswith(".bias") and name.split(".")[-2] not in _BIASED.get(family.architecture, ()):
        raise ModelError(f"{family.architecture} in llama.cpp has no {name}, the model has {stored}")
    shapes = [weights.shape(source) for source in sources]
    rows = tuple(shape[0] for shape in shapes)
    return Entry(
        name,
        sources,
        rows,
        file_shape(name, shapes),
        order=pair_order(name, sum(rows), *metadata.head_counts(config)) if family.rotates_pairs else None,
        shift=family.norm_shift if stored.endswith("norm.weight") else 0.0,
    )
