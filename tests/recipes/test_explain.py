"""Steps, what more bytes buy, and differences, held against the figures they are made of."""

from __future__ import annotations

import pytest

from exlq.errors import MeasurementError
from exlq.recipes.explain import bought, changes, default_spend, prices, reasons, reopened
from exlq.recipes.room import Room, Wishes, room_of
from exlq.recipes.sheet import sheet_of
from exlq.recipes.stored import recipe_of
from exlq.recipes.targets import Answer, within_bytes
from tests.recipes.helpers import every_choice, record

MIB = 1 << 20


def solved(size: int = 30_000, **changes: object) -> tuple[Room, Answer]:
    made = record(1, **changes)  # type: ignore[arg-type]
    room = room_of(sheet_of(made, "gguf"), Wishes())
    return room, within_bytes(room, size)


def test_a_step_is_the_next_option_that_none_betters() -> None:
    room, answer = solved()
    sheet = room.sheet
    for reason in reasons(room, answer.options):
        own, options = answer.options[reason.keys[0]], sheet.by_key[reason.keys[0]].options
        better = [o for o in options if o.total_bits > own.total_bits and o.loss < own.loss]
        if not better:
            assert reason.up is None
            continue
        assert reason.up is not None
        nearest = min(better, key=lambda o: o.total_bits)
        assert reason.up.desc == nearest.desc
        saved = _kl(answer) - _kl_of(room, {**answer.options, reason.keys[0]: nearest})
        mib = (nearest.total_bits - own.total_bits) / 8 / MIB
        assert reason.up.kl_per_mib == pytest.approx(saved / mib, rel=1e-9)


def test_a_step_down_gives_up_what_the_step_back_up_saves() -> None:
    room, answer = solved()
    found = [reason for reason in reasons(room, answer.options) if reason.down]
    assert found
    for reason in found:
        assert reason.down is not None
        key = reason.keys[0]
        lower = {**answer.options, key: room.sheet.named(key, reason.down.desc)}
        back = next(other for other in reasons(room, lower) if other.keys == reason.keys).up
        assert back is not None
        assert back.bits == -reason.down.bits
        assert back.kl_per_mib == pytest.approx(reason.down.kl_per_mib)


def test_what_a_step_up_helps_most_comes_first() -> None:
    room, answer = solved()
    found = reasons(room, answer.options)
    worth = [reason.up.kl_per_mib if reason.up else 0.0 for reason in found]
    assert worth == sorted(worth, reverse=True)
    assert prices(found)[0] == worth[0]


def test_tied_linears_step_together() -> None:
    room, answer = solved(ties=("self_attn.q_proj", "self_attn.v_proj"))
    found = next(reason for reason in reasons(room, answer.options) if len(reason.keys) > 1)
    assert [key.rpartition(".")[2] for key in found.keys] == ["q_proj", "v_proj"]
    assert found.loss == pytest.approx(sum(answer.options[key].loss for key in found.keys))


def test_nothing_better_could_be_bought() -> None:
    room, answer = solved()
    choices = [(room.sheet.n_bytes(options), room.sheet.loss(options)) for options in every_choice(room)]
    larger = sorted({size for size, _ in choices if size > answer.n_bytes})
    for size in (*larger[:: len(larger) // 10], 10**6):
        after = bought(room, answer.options, size - answer.n_bytes)
        assert after.n_bytes <= size
        best = min(loss for other, loss in choices if other <= size)
        assert room.sheet.loss(after.options) == pytest.approx(best, rel=1e-12)
        assert {change.key for change in changes(answer.options, after.options)} == {
            key for key, option in answer.options.items() if option != after.options[key]
        }


def test_what_is_spent_by_default_is_said() -> None:
    _, answer = solved()
    assert default_spend(answer) == (answer.n_bytes // 20, "5 % of the size")
    large = Answer(
        room_of(sheet_of(record(extra={"overhead_bytes": {"gguf": 1 << 33}}), "gguf"), Wishes()).sheet,
        {},
        answer.options,
        (),
    )
    assert default_spend(large) == (100 * MIB, "100 MiB")


def test_a_recipe_is_opened_as_it_was_solved_whatever_types_are_wanted_now() -> None:
    made = record(1)
    _, answer = solved()
    output = recipe_of([answer], made).outputs["gguf"]
    again, same = reopened(sheet_of(made, "gguf"), output, Wishes(types=("Q2_K",)))
    assert same.options == answer.options
    assert same.predicted == answer.predicted
    after = bought(again, same.options, 10**6)
    assert again.sheet.loss(after.options) <= again.sheet.loss(same.options)


def test_a_recipe_of_another_model_is_refused() -> None:
    made = record(2)
    output = recipe_of([solved()[1]], made).outputs["gguf"]
    with pytest.raises(MeasurementError, match=r"the recipe lacks model\.layers\.1"):
        reopened(sheet_of(made, "gguf"), output, Wishes())
    larger = recipe_of([within_bytes(room_of(sheet_of(made, "gguf"), Wishes()), 10**6)], made).outputs["gguf"]
    with pytest.raises(MeasurementError, match=r"no gguf options of 'model\.layers\.1"):
        reopened(sheet_of(record(1), "gguf"), larger, Wishes())


def _kl(answer: Answer) -> float:
    assert answer.predicted is not None
    return answer.predicted.kl


def _kl_of(room: Room, options: dict[str, object]) -> float:
    found = room.sheet.predict(room.sheet.loss(options))  # type: ignore[arg-type]
    assert found is not None
    return found.kl
