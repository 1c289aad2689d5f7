"""The whole size-KL frontier: what every size would be predicted to cost."""

from __future__ import annotations

import math
from typing import NamedTuple

from exlq.allocation.lagrange import cheapest, walk
from exlq.allocation.problem import fold
from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY
from exlq.recipes.prediction import Prediction
from exlq.recipes.room import Room
from exlq.recipes.targets import items


class Point(NamedTuple):
    """One size: bits per weight of the decoder's linears, bytes of all, the predicted KL divergence."""

    bpw: float
    n_bytes: int
    loss: float
    predicted: Prediction | None


def frontier(room: Room) -> list[Point]:
    """Every step of the Lagrangian walk, smallest first; each is an optimum for its own bytes."""
    sheet = room.sheet
    if not room.free:
        only = sheet.loss(room.fixed)
        return [Point(sheet.bpw(room.fixed), sheet.n_bytes(room.fixed), only, sheet.predict(only))]
    problem = fold(items(room.free))
    in_decoder = [keys[0] not in (HEAD_KEY, EMBEDDING_KEY) for keys in problem.keys]
    choice = cheapest(problem)
    fixed = {linear.key: room.fixed[linear.key] for linear in sheet.decoder if linear.key in room.fixed}
    decoder = sum(option.total_bits for option in fixed.values())
    decoder += sum(bits[j] for bits, j, own in zip(problem.bits, choice, in_decoder, strict=True) if own)
    total = problem.total_bits(choice) + sum(option.total_bits for option in room.fixed.values())
    loss, beside = problem.total_loss(choice), math.fsum(option.loss for option in room.fixed.values())

    def point() -> Point:
        whole = problem.as_loss(loss) + beside
        n_bytes = total // 8 + (sheet.beside_bytes or 0)
        return Point(decoder / sheet.numel, n_bytes, whole, sheet.predict(whole))

    points = [point()]
    for step in walk(problem):
        total, loss = total + step.bits, loss - step.gain
        decoder += step.bits if in_decoder[step.item] else 0
        points.append(point())
    return points
