"""Memory while running, against figures worked out by hand and programs' own."""

from __future__ import annotations

import pytest

from exlq.cli.arguments.plan import CACHE_NAMES
from exlq.errors import ConfigError
from exlq.sizing.running import CACHES, MARGIN_BYTES, buffer_bytes, cache_bytes, require_context, running
from tests.sizing.helpers import published

MIB = 1 << 20


def test_a_llama_of_8b_has_the_cache_worked_out_by_hand() -> None:
    shape = published("Llama-3.1-8B")
    # 8192 tokens × 32 blocks × 8 heads × 128 channels × keys and values × 2 bytes
    assert cache_bytes(shape, "gguf", 8192, "f16") == 1024 * MIB
    assert cache_bytes(shape, "exl2", 8192, "f16") == 1024 * MIB
    assert cache_bytes(shape, "gguf", 8192, "q8_0") == 544 * MIB  # 34 bytes for 32 channels
    assert cache_bytes(shape, "gguf", 8192, "q4_0") == 288 * MIB  # 18 bytes
    one_block = 32 * MIB  # as float16, which ExLlamaV2 keeps beside a quantized cache
    assert cache_bytes(shape, "exl2", 8192, "q4_0") == 288 * MIB + one_block
    assert cache_bytes(shape, "exl2", 8192, "q6") == 416 * MIB + one_block  # keys 8 bits, values 4


def test_a_cache_has_whole_cells() -> None:
    shape = published("Llama-3.1-8B")
    assert cache_bytes(shape, "gguf", 8000, "f16") == cache_bytes(shape, "gguf", 8192, "f16")


def test_a_window_bounds_the_cache_of_llama_cpp_alone() -> None:
    shape = published("gemma-2-2b")
    token = 2 * 2 * 4 * 256  # keys and values, bytes, heads, channels
    # 13 blocks with the whole context, 13 with the window of 4096 and a batch of 512
    assert cache_bytes(shape, "gguf", 8192, "f16") == token * 13 * (8192 + 4608)
    assert cache_bytes(shape, "exl2", 8192, "f16") == token * 26 * 8192
    assert cache_bytes(shape, "gguf", 2048, "f16") == token * 26 * 2048


def test_the_buffers_are_about_those_llama_cpp_says() -> None:
    """llama.cpp has said 258.50 MiB of device memory and 24 of the host's for Llama 3 8B at 8192 tokens."""
    assert buffer_bytes(published("Llama-3.1-8B"), "gguf", 8192) == pytest.approx(282 * MIB, rel=0.15)


def test_the_caches_are_those_the_command_line_takes() -> None:
    assert tuple(CACHES) == CACHE_NAMES


def test_all_parts_are_in_the_total() -> None:
    shape = published("Qwen2.5-7B")
    found = running(shape, "exl2", 1000, 4096)
    assert found.total == 1000 + found.cache + found.buffers + MARGIN_BYTES
    assert min(found.cache, found.buffers) > 0


@pytest.mark.parametrize("format", ["exl2", "gguf"])
def test_longer_contexts_and_wider_caches_take_more(format: str) -> None:
    shape = published("Qwen2.5-7B")
    sizes = [running(shape, format, 0, context).total for context in range(512, 32768, 512)]
    assert sizes == sorted(set(sizes))
    caches = [cache_bytes(shape, format, 4096, name) for name in CACHES]
    assert caches == sorted(caches, reverse=True)


@pytest.mark.parametrize("context", [0, -1, 32769])
def test_a_context_the_model_does_not_have_is_refused(context: int) -> None:
    with pytest.raises(ConfigError, match="1 to 32768"):
        require_context(published("Qwen2.5-7B"), context)
