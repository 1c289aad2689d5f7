"""What is said to fit does, and a little more would not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exlq.errors import TargetError
from exlq.sizing.advice import advise
from exlq.sizing.fitting import (
    Room,
    bits_fit,
    common_fits,
    contexts,
    default_context,
    largest_bits,
    largest_file,
    largest_recipe,
    recipe_fits,
)
from exlq.sizing.running import running
from exlq.sizing.stored import STORED
from tests.sizing.helpers import published

GIB = 1 << 30
BOTH = ("exl2", "gguf")


@pytest.mark.parametrize("formats", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "gemma-2-2b"])
def test_the_bits_fit_and_a_hundredth_more_does_not(name: str, formats: tuple[str, ...]) -> None:
    shape = published(name)
    for memory in (7 * GIB, 8 * GIB + 1, 9 * GIB):
        room = Room(memory, 4096)
        bits = largest_bits(shape, formats, room)
        more = [bits_fit(shape, name, bits + 0.01, room).running.total for name in formats]
        assert max(bits_fit(shape, name, bits, room).running.total for name in formats) <= memory
        capped = bits + 0.01 > min(STORED[name].reach(shape)[1] for name in formats)
        assert max(more) > memory or capped


def test_more_memory_never_gives_less() -> None:
    shape = published("Llama-3.1-8B")
    rooms = [Room(memory << 28, 8192) for memory in range(25, 80)]
    bits = [largest_bits(shape, BOTH, room) for room in rooms]
    files = [largest_file(shape, room) or 0 for room in rooms]
    recipes = [fit.running.weights if (fit := largest_recipe(shape, room)) else 0 for room in rooms]
    for found in (bits, files, recipes):
        assert found == sorted(found)
        assert found[0] < found[-1]
    assert bits[-1] == pytest.approx(STORED["exl2"].reach(shape)[1], abs=0.01)


def test_more_context_never_gives_more() -> None:
    shape = published("Llama-3.1-8B")
    bits = [largest_bits(shape, BOTH, Room(8 * GIB, context)) for context in range(2048, 16385, 1024)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]


def test_the_largest_recipe_and_file_use_the_room() -> None:
    shape, room = published("Llama-3.1-8B"), Room(8 * GIB, 8192)
    recipe, size = largest_recipe(shape, room), largest_file(shape, room)
    assert recipe is not None
    assert recipe.choice == "Q6_K"
    assert size is not None
    assert running(shape, "gguf", size, 8192).total == 8 * GIB
    assert recipe.running.weights <= size
    assert [fit.choice for fit in recipe_fits(shape, room)][-2:] == ["Q8_0", "F16"]


def test_too_little_memory_says_how_much_is_wanted() -> None:
    shape = published("Llama-3.1-8B")
    with pytest.raises(TargetError, match=r"1\.00 GiB.*smallest wants 4\.\d\d GiB"):
        largest_bits(shape, ("gguf",), Room(GIB, 8192))
    with pytest.raises(TargetError, match=r"smallest wants (\d\.\d\d) GiB") as refused:
        advise(shape, Room(GIB, 8192), 1e11)
    wanted = float(str(refused.value).split("wants ")[1].split(" GiB")[0])
    assert advise(shape, Room(int((wanted + 0.01) * GIB), 8192), 1e11).file_bytes


def test_the_usual_contexts_end_with_the_models_own() -> None:
    shape = published("Llama-3.1-8B")
    assert contexts(shape, 8192) == (2048, 8192, 32768, 131072)
    assert contexts(shape, 5000) == (2048, 5000, 8192, 32768, 131072)
    assert contexts(replace(shape, max_length=512), 512) == (512,)
    assert default_context(replace(shape, max_length=512)) == 512


def test_the_advice_has_all_sizes_at_all_contexts() -> None:
    shape, room = published("Mistral-7B-v0.3"), Room(16 * GIB, 8192)
    advice = advise(shape, room, 1e11)
    assert [row[0].choice for row in advice.table] == [fit.choice for fit in common_fits(shape, BOTH, room)]
    assert all(len(row) == len(advice.contexts) for row in advice.table)
    for row in advice.table:
        totals = [fit.running.total for fit in row]
        assert totals == sorted(totals)
    assert set(advice.bits) == set(BOTH)
