"""Blocks as the `gguf` package reads and writes them, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, TYPES
from exlq.formats.gguf_blocks.block import BlockType, Fields, Integers
from exlq.formats.gguf_blocks.floats import FloatType

each_block_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
each_float_type = pytest.mark.parametrize("kind", FLOAT_TYPES.values(), ids=lambda kind: kind.name)
shapes = pytest.mark.parametrize("shape", [(1, 1), (7, 3)], ids=lambda shape: "{}x{}".format(*shape))


def foreign(blocks: Tensor, name: str) -> Tensor:
    """Float32 weights as gguf's own reader gives them."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def foreign_bytes(values: Tensor, name: str) -> Tensor:
    """Blocks as gguf's own writer makes them."""
    stored = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(stored).view(torch.uint8)


def random_fields(kind: BlockType, rows: int, n_blocks: int, seed: int = 0) -> Fields:
    """Integers over their whole ranges, both ends certain to occur, and halves of many magnitudes."""
    random = torch.Generator().manual_seed(seed)

    def integers(limits: Integers, per_block: int) -> Tensor:
        drawn = torch.randint(limits.low, limits.high + 1, (rows, n_blocks * per_block), generator=random)
        drawn[:, 0], drawn[:, -1] = limits.low, limits.high
        return drawn.to(torch.int8)

    def halves() -> Tensor:
        exponents = torch.randint(-24, 8, (rows, n_blocks), generator=random)
        return (torch.randn(rows, n_blocks, generator=random) * 2.0**exponents).half()

    counts = dict.fromkeys(kind.integers, kind.block_size // (kind.sub_block or 1))
    counts["levels"] = kind.block_size
    drawn = {name: integers(limits, counts[name]) for name, limits in kind.integers.items()}
    return Fields(**drawn, **{name: halves() for name in kind.halves})


def random_blocks(kind: BlockType, rows: int, n_blocks: int) -> Tensor:
    """Bytes of all values, but for halves that are not finite."""
    random = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (rows, n_blocks, kind.type_size), generator=random).byte()
    start = 0
    for part in kind.parts:
        if part.name in kind.halves:
            blocks[..., start + 1] &= 0b1011_1111  # keeps the exponent below its top value
        start += part.size
    return blocks.flatten(1)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("name", TYPES)
def test_names_numbers_and_sizes_are_those_of_ggml(name: str) -> None:
    kind, number = TYPES[name], gguf.GGMLQuantizationType[name]
    assert (kind.name, kind.ggml_type) == (name, int(number))
    assert (kind.block_size, kind.type_size) == gguf.GGML_QUANT_SIZES[number]


@shapes
@each_block_type
def test_packed_levels_are_read_by_gguf_as_by_us(kind: BlockType, shape: tuple[int, int]) -> None:
    blocks = kind.pack(random_fields(kind, *shape))
    assert blocks.shape == (shape[0], shape[1] * kind.type_size)
    assert same_bits(kind.unpack(blocks), foreign(blocks, kind.name))


@shapes
@each_block_type
def test_what_was_packed_comes_back(kind: BlockType, shape: tuple[int, int]) -> None:
    given = random_fields(kind, *shape, seed=2)
    found = kind.fields(kind.pack(given))
    for name, tensor in vars(given).items():
        other = getattr(found, name)
        assert other is None if tensor is None else torch.equal(other, tensor), name
        assert other is None or other.dtype == tensor.dtype, name


@each_block_type
def test_any_bytes_are_read_by_gguf_as_by_us_and_packed_again(kind: BlockType) -> None:
    blocks = random_blocks(kind, rows=24, n_blocks=5)
    assert same_bits(kind.unpack(blocks), foreign(blocks, kind.name))
    assert torch.equal(kind.pack(kind.fields(blocks)), blocks)


@each_block_type
def test_values_follow_the_formula_of_their_type(kind: BlockType) -> None:
    """Weight by weight in float64, against the float32 of ggml's order."""
    fields = random_fields(kind, 2, 2)
    values = kind.values(fields)
    for column in range(2 * kind.block_size):
        q = fields.levels[:, column].double()
        if kind.table is not None:
            q = torch.tensor([float(kind.table[int(level)]) for level in q]).double()
        block, sub = column // kind.block_size, column // (kind.sub_block or 1)
        s = 1.0 if fields.scales is None else fields.scales[:, sub].double()
        expected = fields.d[:, block].double() * s * q
        if fields.dmin is not None and fields.mins is not None:
            expected = expected - fields.dmin[:, block].double() * fields.mins[:, sub].double()
        if fields.offset is not None:
            expected = expected + fields.offset[:, block].double()
        torch.testing.assert_close(values[:, column].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_writes_the_same_bytes_for_the_same_levels(name: str) -> None:
    """Steps and offsets are exact, and the extreme levels occur, so gguf's rounding finds them again."""
    kind = BLOCK_TYPES[name]
    random = torch.Generator().manual_seed(3)
    low = max(kind.levels.low, -127)  # gguf's Q8_0 is symmetric
    levels = torch.randint(low + (low < 0), kind.levels.high + 1, (9, 4 * 32), generator=random)
    levels[:, 5::32], levels[:, 20::32] = low, kind.levels.high
    fields = Fields(levels, d=(torch.randint(1, 64, (9, 4), generator=random) / 1024).half())
    if "offset" in kind.halves:
        fields = replace(fields, offset=(torch.randint(-512, 512, (9, 4), generator=random) / 1024).half())
    blocks = kind.pack(fields)
    assert torch.equal(blocks, foreign_bytes(kind.unpack(blocks), name))


@each_float_type
def test_floats_are_rounded_and_read_as_by_gguf(kind: FloatType) -> None:
    values = torch.randn(5, 33, generator=torch.Generator().manual_seed(4))
    blocks = kind.pack(values)
    assert torch.equal(blocks, foreign_bytes(values, kind.name))
    assert same_bits(kind.unpack(blocks), foreign(blocks, kind.name))


def test_inputs_of_any_stride_and_leading_dimensions_are_taken() -> None:
    kind = BLOCK_TYPES["Q4_K"]
    fields = random_fields(kind, 4, 2)
    blocks = kind.pack(fields)
    turned = {name: t.T.contiguous().T for name, t in vars(fields).items() if t is not None}
    assert torch.equal(kind.pack(Fields(**turned)), blocks)
    experts = {name: t.reshape(2, 2, -1) for name, t in vars(fields).items() if t is not None}
    assert torch.equal(kind.pack(Fields(**experts)), blocks.reshape(2, 2, -1))
    odd = torch.cat([blocks.new_zeros(4, 1), blocks], dim=1)[:, 1:]  # no address is even
    assert torch.equal(kind.unpack(odd), kind.unpack(blocks))


@each_block_type
def test_rows_that_are_no_whole_blocks_are_refused(kind: BlockType) -> None:
    fields = random_fields(kind, 2, 2)
    short = replace(fields, levels=fields.levels[:, :-16])
    in_features = 2 * kind.block_size - 16
    with pytest.raises(FormatError, match=f"{kind.name} .* {kind.block_size} weights, .* of {in_features};"):
        kind.pack(short)
    row_bytes = 2 * kind.type_size - 1
    with pytest.raises(FormatError, match=f"{kind.name} .* {kind.type_size} bytes each, .* of {row_bytes};"):
        kind.fields(kind.pack(fields)[:, :-1])


@each_block_type
def test_integers_out_of_range_are_refused(kind: BlockType) -> None:
    fields = random_fields(kind, 2, 1)
    for name, limits in kind.integers.items():
        for value in (limits.low - 1, limits.high + 1):
            wrong = getattr(fields, name).to(torch.int32)
            wrong[1, 3 % wrong.shape[1]] = value
            with pytest.raises(FormatError, match=f"{kind.name} stores {name} from .* found {value};"):
                kind.pack(replace(fields, **{name: wrong}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_block_type
def test_steps_that_are_not_finite_are_refused(kind: BlockType, bad: float) -> None:
    fields = random_fields(kind, 2, 3)
    blocks = kind.pack(fields)
    for name in kind.halves:
        wrong = getattr(fields, name).clone()
        wrong[1, 2] = bad
        with pytest.raises(FormatError, match=f"1 of 6 {kind.name} blocks have a {name} that is not finite"):
            kind.pack(replace(fields, **{name: wrong}))
    first_half = sum(part.size for part in kind.parts[: [part.name for part in kind.parts].index("d")])
    blocks[0, first_half : first_half + 2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(FormatError, match=r"1 of 6 .* a d that is not finite"):
        kind.unpack(blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mins": None}, r"Q4_K stores \['d', 'dmin', 'levels', 'mins', 'scales'\], found \['d'"),
        ({"offset": torch.zeros(2, 1).half()}, "found .*'offset'"),
        ({"d": torch.zeros(2, 2).half()}, r"needs d of shape \(2, 1\), found \(2, 2\)"),
        ({"scales": torch.zeros(2, 16).int()}, r"needs scales of shape \(2, 8\), found \(2, 16\)"),
        ({"dmin": torch.zeros(2, 1)}, "dmin as torch.float16, found torch.float32; round it first"),
        ({"mins": torch.zeros(2, 8)}, "mins as integers, found torch.float32; round them first"),
    ],
)
def test_fields_that_do_not_fit_the_type_are_refused(change: dict[str, Tensor], message: str) -> None:
    kind = BLOCK_TYPES["Q4_K"]
    with pytest.raises(FormatError, match=message):
        kind.pack(replace(random_fields(kind, 2, 1), **change))


def test_bytes_of_another_dtype_are_refused() -> None:
    with pytest.raises(FormatError, match=r"Q6_K blocks are torch.int8, want torch.uint8"):
        BLOCK_TYPES["Q6_K"].unpack(torch.zeros(1, 210, dtype=torch.int8))
    with pytest.raises(FormatError, match=r"F32 weights are 4 bytes each, found rows of 6 torch.uint8"):
        FLOAT_TYPES["F32"].unpack(torch.zeros(1, 6, dtype=torch.uint8))


@pytest.mark.parametrize(("name", "value"), [("F16", 70000.0), ("F32", float("nan")), ("BF16", 3.4e38)])
def test_floats_a_type_cannot_hold_are_refused(name: str, value: float) -> None:
    with pytest.raises(FormatError, match=f"1 of 8 weights are not finite in {name}"):
        FLOAT_TYPES[name].pack(torch.tensor([[value] + 7 * [0.0]]))
