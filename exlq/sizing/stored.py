"""Bytes of the files a model becomes, by bits per weight or by recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple, Protocol

from exlq.errors import FormatError, ModelError
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS, groups_of
from exlq.formats.gguf.recipes import Shape as RecipeShape
from exlq.formats.gguf.recipes import fallback, recipe_named, recipe_types, row_bytes, tensor_bytes
from exlq.recipes.ends import gguf_ends
from exlq.sizing.shapes import ModelShape
from exlq.types import LinearSpec

FLOAT16_BYTES, FLOAT32_BYTES = 2, 4
EXL2_TENSORS, EXL2_COLUMNS = 5, 32  # a linear is stored in five tensors, its columns padded to 32
SAFETENSORS_ENTRY_BYTES = 112  # of the header, for a tensor: its name, shape and place
ALIGNMENT_BYTES = 32  # of a tensor's data in a GGUF file
ENTRY_BYTES, DIMENSION_BYTES = 24, 8  # of a tensor in a GGUF file's list, its name apart
METADATA_BYTES = 4096  # of a GGUF file, without the tokenizer
TOKEN_BYTES = 32  # of a tokenizer's token with its merge: 28 in a vocabulary of 2048, 39 in Qwen's of 151,936


class Tried(NamedTuple):
    """The ggml types measured of matrices whose rows are whole blocks of `block_size` weights."""

    block_size: int
    least: str  # bits
    most: str
    n_options: int


TRIED = (Tried(256, "Q2_K", "Q8_0", 7), Tried(32, "IQ4_NL", "Q8_0", 5), Tried(1, "F16", "F16", 1))


class Stored(Protocol):
    """How one format stores a model; sizes are those of its file or files."""

    name: str

    def reach(self, shape: ModelShape) -> tuple[float, float]:
        """Fewest and most bits per weight that the decoder's linears can have."""
        ...

    def n_bytes(self, shape: ModelShape, bits: float, head_bits: int) -> int:
        """At that many bits per weight of the decoder's linears, which is the most a conversion takes."""
        ...

    def tried(self, spec: LinearSpec) -> int:
        """Options that a conversion measures of a linear."""
        ...


class Exl2Stored:
    """`output*.safetensors` of an EXL2 directory."""

    name = "exl2"

    def reach(self, shape: ModelShape) -> tuple[float, float]:
        if shape.family.exl2_architecture is None:
            raise ModelError(f"ExLlamaV2 does not know {shape.architecture}")
        try:
            sizes = {size: [exl2_bits(o.qparams, spec) for o in OPTIONS] for size, spec in _sizes(shape)}
        except FormatError as exc:
            raise ModelError(f"this model cannot be written as {self.name}: {exc}") from exc
        return _mean(shape, {s: min(n) for s, n in sizes.items()}), _mean(
            shape, {s: max(n) for s, n in sizes.items()}
        )

    def n_bytes(self, shape: ModelShape, bits: float, head_bits: int) -> int:
        plain = shape.embedding.numel + sum(tensor.numel for tensor in shape.vectors)
        matrices = bits * shape.numel + exl2_bits(HEAD_OPTIONS[head_bits].qparams, shape.head)
        n_tensors = EXL2_TENSORS * (len(shape.linears) + 1) + len(shape.vectors) + 1
        return int(matrices / 8) + FLOAT16_BYTES * plain + SAFETENSORS_ENTRY_BYTES * n_tensors

    def tried(self, spec: LinearSpec) -> int:
        return len(OPTIONS)


class GgufStored:
    """A GGUF file, its tokenizer estimated from the number of tokens."""

    name = "gguf"

    def reach(self, shape: ModelShape) -> tuple[float, float]:
        if shape.family.gguf is None:
            raise ModelError(f"llama.cpp does not know {shape.architecture}")
        least = {size: 8 * _type_bytes(tried(spec).least, spec) for size, spec in _sizes(shape)}
        most = {size: 8 * _type_bytes(tried(spec).most, spec) for size, spec in _sizes(shape)}
        return _mean(shape, least), _mean(shape, most)

    def n_bytes(self, shape: ModelShape, bits: float, head_bits: int) -> int:
        types = gguf_ends(bits, head_bits, shape.tied)
        specs = {spec.key: spec for spec in (shape.embedding, shape.head)}
        ends = sum(_type_bytes(fallback(name, shape.hidden_size), specs[key]) for key, name in types.items())
        return int(bits * shape.numel / 8) + ends + beside_bytes(shape)

    def tried(self, spec: LinearSpec) -> int:
        return tried(spec).n_options


def recipe_bytes(shape: ModelShape, name: str) -> int:
    """Bytes of the GGUF file that a recipe of llama-quantize gives, with an importance matrix.

    Raises:
        ConfigError: for a name that is none.
        ModelError: if llama.cpp does not know the model.
    """
    types = recipe_types(recipe_named(name), shape.file_tensors, _recipe_shape(shape), imatrix=True)
    matrices = (tensor for tensor in shape.file_tensors if tensor.is_matrix)
    return sum(tensor_bytes(types[t.name], t.shape) for t in matrices) + beside_bytes(shape)


def extreme_bytes(shape: ModelShape) -> tuple[int, int]:
    """The smallest and the largest GGUF file of mixed types, embedding and head among what is mixed."""
    matrices = [tensor for tensor in shape.file_tensors if tensor.is_matrix]
    specs = [LinearSpec(t.name, t.shape[-1], prod(t.shape[:-1])) for t in matrices]
    least = sum(_type_bytes(tried(spec).least, spec) for spec in specs)
    most = sum(_type_bytes(tried(spec).most, spec) for spec in specs)
    return least + beside_bytes(shape), most + beside_bytes(shape)


def beside_bytes(shape: ModelShape) -> int:
    """Bytes of a GGUF file beside its matrices: norms, biases, list of tensors, metadata, tokenizer."""
    total = METADATA_BYTES + TOKEN_BYTES * shape.vocab_size
    for tensor in shape.file_tensors:
        total += ENTRY_BYTES + len(tensor.name) + DIMENSION_BYTES * len(tensor.shape)
        if not tensor.is_matrix:
            total += -(-FLOAT32_BYTES * tensor.numel // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return total


def exl2_bits(qparams: Mapping[str, object], spec: LinearSpec) -> int:
    """Stored bits of a linear under an EXL2 option, bias apart: `formats.exl2.storage_bits` without torch."""
    groups = groups_of(qparams, spec.in_features)
    columns = -(-spec.out_features // EXL2_COLUMNS) * EXL2_COLUMNS
    levels = sum(group.size * group.bits for group in groups) * columns
    return levels + (48 + 4 * columns) * len(groups) + 32 * spec.in_features


def tried(spec: LinearSpec) -> Tried:
    """The GGUF types measured of a matrix."""
    return next(row for row in TRIED if spec.in_features % row.block_size == 0)


def formats_of(shape: ModelShape) -> tuple[str, ...]:
    """The formats that the model's family has."""
    has = {"exl2": shape.family.exl2_architecture is not None, "gguf": shape.family.gguf is not None}
    return tuple(name for name in STORED if has[name])


def _recipe_shape(shape: ModelShape) -> RecipeShape:
    if shape.family.gguf is None:
        raise ModelError(f"llama.cpp does not know {shape.architecture}")
    heads = (shape.n_heads, shape.n_kv_heads)
    return RecipeShape(shape.family.gguf.architecture, shape.n_blocks, *heads, shape.sparse.count)


def _sizes(shape: ModelShape) -> Iterable[tuple[tuple[int, int], LinearSpec]]:
    """The sizes of linears that occur, and one of each."""
    return {(spec.in_features, spec.out_features): spec for spec in shape.linears}.items()


def _mean(shape: ModelShape, bits: Mapping[tuple[int, int], int]) -> float:
    """Bits per weight of all linears, from those of one of each size."""
    return sum(bits[spec.in_features, spec.out_features] for spec in shape.linears) / shape.numel


def _type_bytes(kind: str, spec: LinearSpec) -> int:
    return spec.out_features * row_bytes(kind, spec.in_features)


STORED: dict[str, Stored] = {"exl2": Exl2Stored(), "gguf": GgufStored()}
