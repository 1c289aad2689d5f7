"""Triton's kernels as programs for NVIDIA's GPUs: none is needed to compile them."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import pytest

from exlq.numerics import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.TRITON, reason="triton is not installed: pip install exlq[triton]"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="what is interpreted is not compiled"),
]
NUMBERS = (
    "columns options out size groups candidates stretch stride feedback_row feedback_column rows".split()
)
TYPES = {
    **dict.fromkeys(NUMBERS, "i32"),
    **dict.fromkeys(("top", "smallest", "low", "high", "kept"), "fp32"),
    **dict.fromkeys(("units", "perm", "picked"), "*i64"),
    "multiplier": "*fp16",
    "codes": "*u8",
}
POINTERS = {"low": "*fp32", "high": "*fp32"}  # of the sweep, one for each option


@pytest.mark.parametrize(
    ("kernel", "sizes", "types"),
    [
        ("triton_sweep.round_kernel", {"COLUMNS": 32, "FLOAT16": True}, POINTERS),
        ("triton_sweep.round_kernel", {"COLUMNS": 32, "FLOAT16": False}, POINTERS),
        ("triton_scales.probe_kernel", {"PROBES": 8}, {}),
        ("triton_scales.multiplier_kernel", {"CANDIDATES": 8, "ROWS": 256, "num_warps": 4}, {}),
        ("triton_scales.code_kernel", {"CODES": 4}, {}),
        ("triton_descent.improve_kernel", {"RUN": 16, "FLOAT16": False}, {}),
        ("triton_descent.improve_kernel", {"RUN": 32, "FLOAT16": True}, {}),
    ],
    ids=str,
)
def test_a_kernel_compiles_with_every_row_in_one_lane(
    kernel: str, sizes: dict[str, Any], types: dict[str, str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over columns need no exchange between lanes then, and no product is fused into a sum."""
    monkeypatch.setenv("TRITON_CACHE_DIR", os.fspath(tmp_path))
    assembly = compiled(kernel, {"ROWS": 32, "num_warps": 1, **sizes}, types)
    if sizes.get("num_warps", 1) == 1:
        assert "shfl" not in assembly
        assert "fma.rn" not in assembly
    if "FLOAT16" in sizes:
        assert "div.rn.f32" in assembly


def compiled(kernel: str, sizes: dict[str, Any], types: dict[str, str]) -> str:
    """The PTX of a kernel for compute capability 9.0."""
    triton = import_module("triton")
    targets, sources = import_module("triton.backends.compiler"), import_module("triton.compiler")
    module, name = kernel.split(".")
    function = getattr(import_module(f"exlq.numerics.{module}"), name)
    constants = {name: value for name, value in sizes.items() if name.isupper()}
    pointers = dict.fromkeys(function.arg_names, "*fp32")
    signature = {**pointers, **{n: t for n, t in (TYPES | types).items() if n in pointers}}
    signature |= dict.fromkeys(constants, "constexpr")
    source = sources.ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": sizes["num_warps"], "enable_fp_fusion": False}
    target = targets.GPUTarget("cuda", 90, 32)
    return str(triton.compile(source, target=target, options=options).asm["ptx"])
