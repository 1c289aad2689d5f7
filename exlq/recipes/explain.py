"""Why every matrix has the option it has, what more bytes would buy, and how two recipes differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from exlq.allocation.lagrange import undominated
from exlq.allocation.problem import fold
from exlq.errors import MeasurementError
from exlq.measurement import OptionRecord
from exlq.recipes.room import Room, Wishes, room_of
from exlq.recipes.sheet import Options, Sheet
from exlq.recipes.stored import RecipeOutput
from exlq.recipes.targets import Answer, answer, items, least_loss

MIB = 1 << 20
SPEND_BYTES, SPEND_SHARE = 100 * MIB, 0.05  # what --spend is by default: the smaller of the two


@dataclass(frozen=True)
class Step:
    """Another option of a matrix: its bits per weight, bits added, loss removed, the KL that makes per MiB.

    Both are negative on the way down, `kl_per_mib` never is but for an option that another betters.
    """

    desc: str
    bpw: float
    bits: int
    gain: float
    kl_per_mib: float


@dataclass(frozen=True)
class Reason:
    """One matrix, or several that share a tensor; `up` and `down` go along their undominated options.

    `err` is the mean of the members' relative output errors.
    """

    keys: tuple[str, ...]
    desc: str
    bpw: float
    err: float
    loss: float
    fixed: bool
    up: Step | None
    down: Step | None


class Change(NamedTuple):
    """A matrix whose option differs between two allocations."""

    key: str
    before: OptionRecord
    after: OptionRecord


def reopened(sheet: Sheet, output: RecipeOutput, wishes: Wishes) -> tuple[Room, Answer]:
    """A recipe's output on the sheet it was made from.

    Raises:
        MeasurementError: if it names what was not measured, or leaves out a matrix.
    """
    if missing := [key for key in sheet.by_key if key not in output.options]:
        raise MeasurementError(f"the recipe lacks {missing[0]}, it is of another model; solve again")
    options = {key: sheet.named(key, desc) for key, desc in output.options.items()}
    allowed = room_of(sheet, replace(wishes, pins=())).sheet.by_key
    kept = {  # what the recipe has is allowed whatever --types says now
        linear.key: tuple(
            o for o in linear.options if o in allowed[linear.key].options or o == options[linear.key]
        )
        for linear in sheet.linears
    }
    room = Room(sheet.with_options(kept), {key: options[key] for key in output.fixed})
    return room, answer(room, {}, options)


def reasons(room: Room, options: Options) -> list[Reason]:
    """A reason for every matrix, those first that a step up would help most per MiB."""
    sheet = room.sheet
    problem, now = fold(items(sheet.linears)), sheet.loss(options)
    found = []
    for keys, bits, losses in zip(problem.keys, problem.bits, problem.losses, strict=True):
        members = [sheet.by_key[key] for key in keys]
        own = [options[key] for key in keys]
        at_bits, at_loss = sum(o.total_bits for o in own), sum(o.loss for o in own)
        numel = sum(linear.numel for linear in members)
        steps = [
            Step(
                members[0].options[j].desc,
                bits[j] / numel,
                bits[j] - at_bits,
                gain := at_loss - problem.as_loss(losses[j]),
                _kl_per_mib(sheet, now, bits[j] - at_bits, gain),
            )
            for j in undominated(bits, losses)
        ]
        fixed = keys[0] in room.fixed
        found.append(
            Reason(
                keys=keys,
                desc=own[0].desc,
                bpw=at_bits / numel,
                err=sum(o.err for o in own) / len(own),
                loss=at_loss,
                fixed=fixed,
                up=next((step for step in steps if step.bits > 0 and step.gain > 0), None),
                down=next((step for step in reversed(steps) if step.bits < 0), None),
            )
        )
    return sorted(found, key=lambda reason: -(reason.up.kl_per_mib if reason.up else 0.0))


def prices(found: list[Reason]) -> tuple[float | None, float | None]:
    """The most KL per MiB that a step up saves and the least that one down costs, of what is not fixed."""
    up = [reason.up.kl_per_mib for reason in found if reason.up and not reason.fixed]
    down = [reason.down.kl_per_mib for reason in found if reason.down and not reason.fixed]
    return max(up, default=None), min(down, default=None)


def default_spend(answer: Answer) -> tuple[int, str]:
    """Bytes to spend where none are given, and why so many."""
    share = int(SPEND_SHARE * answer.n_bytes)
    if share < SPEND_BYTES:
        return max(share, 1), "5 % of the size"
    return SPEND_BYTES, "100 MiB"


def bought(room: Room, options: Options, spend_bytes: int) -> Answer:
    """The best allocation with so many bytes more, of the matrices that are not fixed."""
    budget = sum(options[linear.key].total_bits for linear in room.free) + 8 * spend_bytes
    return answer(room, {}, least_loss(room.free, budget))


def changes(before: Options, after: Options) -> list[Change]:
    """The matrices whose options differ, those first whose loss changes most."""
    differing = [
        Change(key, before[key], after[key]) for key in before if before[key].desc != after[key].desc
    ]
    return sorted(differing, key=lambda change: -abs(change.after.loss - change.before.loss))


def _kl_per_mib(sheet: Sheet, now: float, bits: int, gain: float) -> float:
    """What another option saves; without a prediction its loss stands for the KL divergence."""
    before, after = sheet.predict(now), sheet.predict(max(0.0, now - gain))
    saved = gain if before is None or after is None else before.kl - after.kl
    return saved / (bits / 8 / MIB) if bits else 0.0
