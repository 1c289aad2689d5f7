"""EXL2 tensors against the reference kernels' own and against a slow reader in numpy's float16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats import exl2
from exlq.formats.exl2_options import WIDTHS
from exlq.numerics import bitpack
from exlq.types import Group

Half = npt.NDArray[np.float16]
Layout = list[tuple[int, int]]  # bits and rows of each group

READ = [
    "01_b4_g32_256x96",
    "02_b3b2_g64_256x96",
    "04_b5b4_g128_partial_416x160",
    "05_b6_g128_512x160",
    "07_b6b3b2_mixedgs_512x96",
    "09_b5_g32_288x64",
]
WRITTEN = ["30_gptq_b4_g32_128x64", "31_gptq_mlpdown_632_256x96", "33_gptq_b5b4_bias_192x64"]


def vector(shared: Path, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(shared / "vectors" / "exl2" / f"{name}.safetensors")
    return tensors


def read_slowly(tensors: Mapping[str, Tensor]) -> Half:
    """(padded out, in) by the format's description: bits of each column, then three float16 roundings."""
    words, scales = tensors["q_weight"].numpy(), tensors["q_scale"].numpy().view(np.uint8)
    nibbles = np.stack([scales & 15, scales >> 4], -1).reshape(len(scales), -1)
    multipliers = (tensors["q_scale_max"].numpy().astype(np.float32) / np.float32(256)).astype(np.float16)
    pairs = tensors["q_groups"].numpy().reshape(-1, 2).tolist()
    ends = [offset for _, offset in pairs[1:]] + [len(words)]
    packed = []
    for (bits, offset), end, codes, multiplier in zip(pairs, ends, nibbles, multipliers, strict=True):
        columns = np.ascontiguousarray(words[offset:end].T).view(np.uint8)
        stream = np.unpackbits(columns, axis=1, bitorder="little")
        levels = stream.reshape(len(columns), -1, bits).astype(np.int32) @ (
            1 << np.arange(bits)
        )  # (out, rows)
        scale = ((codes.astype(np.int32) + 1) ** 2).astype(np.float16) * multiplier
        packed.append((levels - (1 << (bits - 1))).astype(np.float16) * scale[:, None])
    weight: Half = np.concatenate(packed, 1)[:, tensors["q_invperm"].numpy()]
    return weight


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


def groups_from(layout: Layout) -> list[Group]:
    stops = np.cumsum([rows for _, rows in layout]).tolist()
    return [Group(stop - rows, stop, bits) for (bits, rows), stop in zip(layout, stops, strict=True)]


def random_linear(layout: Layout, out_features: int, largest: float, seed: int) -> dict[str, Tensor]:
    """The five tensors filled with random bits; `largest` bounds q_scale_max."""
    generator = torch.Generator().manual_seed(seed)
    n_words = [rows * bits // 32 for bits, rows in layout]
    offsets = np.cumsum([0, *n_words[:-1]]).tolist()
    pairs = [[bits, offset] for (bits, _), offset in zip(layout, offsets, strict=True)]

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, columns), generator=generator).int()

    return {
        "q_weight": words(sum(n_words), out_features),
        "q_scale": words(len(layout), out_features // 8),
        "q_scale_max": (torch.rand(len(layout), generator=generator) * largest).half(),
        "q_groups": torch.tensor(pairs, dtype=torch.int16).flatten(),
        "q_invperm": torch.randperm(sum(rows for _, rows in layout), generator=generator).int(),
    }


@st.composite
def layouts(draw: Any) -> Layout:
    """Groups of falling widths and mixed sizes; 2-bit ones may have 16 rows more, as old files have."""
    bits = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6)), reverse=True)
    rows = [32 * draw(st.integers(1, 4)) for _ in bits]
    return [(b, n + 16 * (b == 2 and draw(st.booleans()))) for b, n in zip(bits, rows, strict=True)]


def aligned(layout: Layout) -> Layout:
    return [(bits, rows - rows % 32) for bits, rows in layout]


@pytest.mark.parametrize("name", READ + WRITTEN)
def test_the_reference_vectors_are_decoded_bit_for_bit(shared: Path, name: str) -> None:
    tensors = vector(shared, name)
    assert same_bits(exl2.dequantize_linear(tensors), tensors["dequantized"].T)
    assert same_bits(torch.from_numpy(read_slowly(tensors)), tensors["dequantized"].T)


@pytest.mark.parametrize("name", READ + WRITTEN)
def test_the_reference_vectors_are_packed_again_to_the_same_words(shared: Path, name: str) -> None:
    tensors = vector(shared, name)
    levels, codes, groups = exl2.unpack_linear(tensors)
    given_levels = tensors["input_levels_packed_order" if name in READ else "qweight_levels_packed_order"]
    given_scales = tensors["input_qscale_1_to_16" if name in READ else "qscale_1_to_16"]
    assert torch.equal(levels, given_levels.int())
    assert torch.equal(codes + 1, given_scales.int())
    perm = tensors["q_perm" if name in READ else "perm"].long()
    packed = exl2.pack_linear(given_levels, given_scales - 1, tensors["q_scale_max"], groups, perm)
    assert list(packed) == list(exl2.SUFFIXES)
    for suffix in exl2.SUFFIXES:
        assert packed[suffix].dtype == tensors[suffix].dtype
        assert torch.equal(packed[suffix], tensors[suffix]), suffix


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_pack_to_the_words_of_the_reference_kernels(shared: Path, bits: int) -> None:
    tensors = vector(shared, "20_pack_kernels")
    levels, words = tensors[f"levels_b{bits}"], tensors[f"packed_b{bits}"]
    assert torch.equal(bitpack.pack_levels(levels, bits), words)
    assert torch.equal(bitpack.unpack_levels(words, bits), levels.int())


def test_scale_codes_pack_to_the_words_of_the_reference_kernels(shared: Path) -> None:
    tensors = vector(shared, "20_pack_kernels")
    codes = tensors["qscale_in"] - 1 if tensors["qscale_in"].max() > 15 else tensors["qscale_in"]
    assert torch.equal(bitpack.pack_nibbles(codes), tensors["qscale_packed"])
    assert torch.equal(bitpack.unpack_nibbles(tensors["qscale_packed"]), codes.int())


@settings(max_examples=60, deadline=None)
@given(
    layouts(), st.integers(1, 3), st.sampled_from([1e-7, 1e-5, 1e-3, 0.02, 1.0, 250.0]), st.integers(0, 999)
)
def test_any_stored_linear_reads_as_the_slow_reader_reads_it(
    layout: Layout, out_blocks: int, largest: float, seed: int
) -> None:
    tensors = random_linear(layout, 32 * out_blocks, largest, seed)
    found = exl2.dequantize_linear(tensors)
    assert found.shape == (32 * out_blocks, sum(rows for _, rows in layout))
    assert same_bits(found, torch.from_numpy(read_slowly(tensors)))
    assert exl2.stored_groups(tensors) == groups_from(layout)


@settings(max_examples=60, deadline=None)
@given(layouts().map(aligned), st.integers(1, 70), st.sampled_from([1e-5, 0.02, 1.0]), st.integers(0, 999))
def test_any_packed_linear_gives_back_its_levels_and_zeros_as_padding(
    layout: Layout, out: int, largest: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = groups_from(layout)
    in_features = groups[-1].stop
    levels = torch.cat([torch.randint(1 << g.bits, (g.size, out), generator=generator) for g in groups])
    codes = torch.randint(16, (len(groups), out), generator=generator)
    tops = (torch.rand(len(groups), generator=generator) * largest + 1e-5).half()
    perm = torch.randperm(in_features, generator=generator)
    tensors = exl2.pack_linear(levels.byte(), codes.byte(), tops, groups, perm)

    weight = torch.from_numpy(read_slowly(tensors))
    expected = torch.empty(out, in_features, dtype=torch.float16)
    for g, code, top in zip(groups, codes, tops, strict=True):
        scale = (code + 1).square().half() * (top.float() / 256).half()
        for row in range(g.start, g.stop):
            expected[:, perm[row]] = (levels[row] - (1 << (g.bits - 1))).half() * scale
    assert torch.equal(weight[:out], expected)
    assert len(weight) == -(-out // 32) * 32
    assert (weight[out:] == 0).all()
    stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert exl2.storage_bits(groups, out) == 8 * stored_bytes
    unpacked, unpacked_codes, unpacked_groups = exl2.unpack_linear(tensors)
    assert torch.equal(unpacked[:, :out], levels.int())
    assert torch.equal(unpacked_codes[:, :out], codes.int())
    assert unpacked_groups == groups


def test_multipliers_below_two_to_the_minus_six_are_subnormal() -> None:
    tops = torch.tensor([2.0**-6, 0.005, 2.0**-16, 2.0**-17, 2.0**-16 * 1.51], dtype=torch.float16)
    expected = np.float16(tops.numpy().astype(np.float32) / 256)
    assert torch.equal(exl2.group_multiplier(tops), torch.from_numpy(expected))
    assert exl2.group_multiplier(tops).mul(2.0**24).tolist() == [1024, 328, 1, 0, 2]


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ([7, 0], r"\(7, 0\)"),
        ([4, 0, 5, 4], r"\(5, 4\)"),
        ([4, 0, 4, 9], r"\(4, 9\)"),
        ([4, 0, 4, 0], r"\(4, 0\)"),
        ([5, 0], r"\(5, 0\)"),
        ([4, -1], "row 0"),
        ([4, 1], "row 0"),
        ([], "row 0"),
        ([8, 0], "cover 32"),
    ],
)
def test_groups_that_break_the_rules_are_refused(pairs: list[int], complaint: str) -> None:
    """Of a matrix with 8 rows of words and 64 input channels."""
    tensors = random_linear([(4, 64)], 32, 1.0, 0) | {"q_groups": torch.tensor(pairs, dtype=torch.int16)}
    with pytest.raises(FormatError, match=complaint):
        exl2.dequantize_linear(tensors)


def test_more_words_than_a_group_can_address_are_refused() -> None:
    groups = [Group(0, 1 << 17, 8)]
    levels = torch.zeros(1 << 17, 1, dtype=torch.uint8)
    with pytest.raises(FormatError, match="32768 rows, EXL2 can address 32767"):
        exl2.pack_linear(levels, torch.zeros(1, 1), torch.ones(1), groups, torch.arange(1 << 17))
