"""Products of float32 matrices are products of float32 matrices, by whomever."""

from __future__ import annotations

import pytest
import torch

from exlq.evaluation import run
from exlq.numerics import precision
from exlq.numerics.precision import exact_products, quick_products

SHAPES = [(1, 64, 64), (7, 33, 5), (16, 2048, 16), (512, 512, 512), (32, 32, 4096), (300, 4096, 77)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_keep_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.randn(rows, inner, generator=generator),
        torch.randn(inner, columns, generator=generator),
    )
    wanted = left.double() @ right.double()
    with quick_products():
        found = left @ right
        added = torch.zeros(rows, columns).addmm_(left.T.contiguous().T, right)
    assert (found - wanted).norm() < 2e-6 * wanted.norm()
    assert (added - wanted).norm() < 2e-6 * wanted.norm()


def test_the_setting_is_as_before_afterwards_also_after_an_error() -> None:
    before = precision._settings().fp32_precision
    with pytest.raises(ZeroDivisionError), quick_products():
        raise ZeroDivisionError
    assert precision._settings().fp32_precision == before


def test_where_products_would_lose_float32_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_exact", lambda: False)
    before = precision._settings().fp32_precision
    with quick_products():
        assert precision._settings().fp32_precision == before


def test_gpus_multiply_all_bits_of_float32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        exact_products()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_is_asked_for_where_a_gpu_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(run, "exact_products", lambda: asked.append(True))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: [0.0])
    assert run.usable_device("cpu").type == "cpu"
    assert not asked
    assert run.usable_device("cuda:1") == torch.device("cuda", 1)
    assert asked
