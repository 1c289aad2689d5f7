"""How wide floats are, and who multiplies them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

LEAST_AGREEMENT = 1e-5  # of a product with one in float64; bfloat16 factors miss by 1e-3


def widest(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def quick_products() -> Iterator[None]:
    """Has oneDNN multiply float32 matrices on the CPU, where what it gives is still float32.

    torch takes MKL for them, which on other makers' processors runs at half of oneDNN's speed. The setting
    that hands them to oneDNN also allows it bfloat16 factors, which it takes on processors with AMX alone;
    there it stays as it was. May be used as a decorator.
    """
    if not _exact():
        yield
        return
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _settings() -> Any:
    """torch's setting for products by oneDNN; something without effect where torch has none."""
    onednn: Any = torch.backends.mkldnn
    return onednn.matmul if onednn.is_available() else SimpleNamespace(fp32_precision="none")


@cache
def _exact() -> bool:
    """Whether oneDNN keeps float32 where it need not."""
    settings = _settings()
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 512, 512, generator=generator)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        found = (left @ right).double()
    finally:
        settings.fp32_precision = before
    wanted = left.double() @ right.double()
    return bool((found - wanted).norm() < LEAST_AGREEMENT * wanted.norm())


def exact_products() -> None:
    """Has GPUs multiply float32 as such: with TF32, ten bits of each factor, Hessians would be too coarse."""
    torch.set_float32_matmul_precision("highest")
