"""One option for every matrix: least loss within bits a weight or bytes, fewest bits within a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from exlq.allocation import Choice, Item, reachable_range, solve
from exlq.errors import ConfigError, TargetError
from exlq.measurement import LinearRecord, OptionRecord
from exlq.recipes.prediction import Prediction
from exlq.recipes.room import Room
from exlq.recipes.sheet import Options, Sheet

LOSS_DIGITS = 60  # binary, of a sum of losses counted in whole units
SLACK_DIGITS = 50  # binary, to which sums of floats agree
BISECTIONS = 200  # more than a float has steps between two others


class Split(NamedTuple):
    """A file's bytes on the GPU, which holds the last layers as llama.cpp counts them, and beside it."""

    n_gpu_layers: int
    gpu_bytes: int
    cpu_bytes: int


@dataclass(frozen=True)
class Answer:
    """What one target, values by flags, comes to in one format.

    `fixed` are the matrices the solver did not choose for.
    """

    sheet: Sheet
    target: Mapping[str, float]
    options: dict[str, OptionRecord]
    fixed: tuple[str, ...]
    split: Split | None = None

    @property
    def bpw(self) -> float:
        return self.sheet.bpw(self.options)

    @property
    def n_bytes(self) -> int:
        return self.sheet.n_bytes(self.options)

    @property
    def predicted(self) -> Prediction | None:
        return self.sheet.predict(self.sheet.loss(self.options))


def within_bits(room: Room, bits: float) -> Answer:
    """The decoder's linears within `bits` a weight, as `convert -b` chooses.

    Raises:
        TargetError: if they cannot have so few or so many.
    """
    sheet = room.sheet
    decoder = sum(room.fixed[linear.key].total_bits for linear in sheet.decoder if linear.key in room.fixed)
    low, high = ((decoder + free) / sheet.numel for free in _range(room.free))
    if not low <= bits <= high:
        raise TargetError(
            f"-b {bits:g}: as {sheet.format} {low:.4f} to {high:.4f} bits per weight can be met; ask for that"
        )
    options = least_loss(room.free, int(bits * sheet.numel) - decoder)
    return answer(room, {"-b": bits}, options)


def within_bytes(room: Room, size: int) -> Answer:
    """The least loss of a file of at most `size` bytes, as `convert --file-size` chooses.

    Raises:
        TargetError: if the smallest file is larger.
        MeasurementError: if the record does not tell what is in a file beside its matrices.
    """
    beside = room.sheet.require_bytes("--file-size")
    fixed = sum(option.total_bits for option in room.fixed.values())
    budget = 8 * (size - beside) - fixed
    low, _ = _range(room.free)
    if budget < low:
        least = beside + -(-(fixed + low) // 8)
        raise TargetError(
            f"--file-size {size} bytes: the smallest {room.sheet.format} of this model has {least}; "
            "ask for that or more"
        )
    return answer(room, {"--file-size": size}, least_loss(room.free, budget))


def within_kl(room: Room, kl: float) -> Answer:
    """The fewest bits whose predicted KL divergence is at most `kl`.

    Raises:
        TargetError: if no choice is predicted so little.
    """
    sheet, target = room.sheet, f"--max-kl {kl:g}"
    if not sheet.is_kl:
        raise ConfigError(
            f"{target}: this measurement was taken with --objective output-error; measure again"
        )
    if not 0 < kl < math.inf:
        raise ConfigError(f"{target}: a KL divergence above 0 is wanted, in nats per token")
    fixed = sheet.loss(room.fixed)
    least = fixed + math.fsum(min(option.loss for option in linear.options) for linear in room.free)
    if (best := sheet.predict(least)) is not None and best.kl > kl:
        raise TargetError(f"{target}: {sheet.format} reaches a predicted {best.kl:.3g} at best; ask for that")
    options = fewest_bits(room.free, most_loss(sheet, kl) - fixed)
    return answer(room, {"--max-kl": kl}, options)


def answer(room: Room, target: Mapping[str, float], options: Options) -> Answer:
    """The answer with what was fixed beside what was chosen."""
    return Answer(room.sheet, target, room.whole(options), tuple(room.fixed))


def least_loss(linears: Sequence[LinearRecord], budget_bits: int) -> Options:
    """The options of least loss within the bits, proven."""
    return _solved(linears, lambda option: Choice(option.total_bits, option.loss), budget_bits)


def fewest_bits(linears: Sequence[LinearRecord], most: float) -> Options:
    """The options of fewest bits whose losses sum to at most `most`, of those the least loss.

    The same problem with loss for bits: losses are whole units of 2**-60 of the largest sum, rounded up, and
    `most` is let be as much larger as adding floats may be off.
    """
    largest = math.fsum(max(option.loss for option in linear.options) for linear in linears)
    digits = LOSS_DIGITS - math.frexp(largest)[1]
    budget = math.floor(math.ldexp(min(most, 2 * largest), digits))
    return _solved(
        linears,
        lambda option: Choice(math.ceil(math.ldexp(option.loss, digits)), float(option.total_bits)),
        budget + (budget >> SLACK_DIGITS) + len(linears),
    )


def most_loss(sheet: Sheet, kl: float) -> float:
    """The largest sum of losses whose prediction is at most `kl`."""
    low, high = 0.0, 1.0
    while _kl(sheet, high) <= kl:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _kl(sheet, middle) <= kl else (low, middle)
    return low


def items(
    linears: Sequence[LinearRecord], choice: Callable[[OptionRecord], Choice] | None = None
) -> list[Item]:
    """The matrices as the solver takes them."""
    made = choice or (lambda option: Choice(option.total_bits, option.loss))
    return [Item(linear.key, tuple(map(made, linear.options)), linear.tie) for linear in linears]


def _solved(
    linears: Sequence[LinearRecord], choice: Callable[[OptionRecord], Choice], budget: int
) -> Options:
    if not linears:
        return {}
    index = solve(items(linears, choice), budget).choice
    return {linear.key: linear.options[index[linear.key]] for linear in linears}


def _range(linears: Sequence[LinearRecord]) -> tuple[int, int]:
    return reachable_range(items(linears)) if linears else (0, 0)


def _kl(sheet: Sheet, loss: float) -> float:
    found = sheet.predict(loss)
    return math.inf if found is None else found.kl
