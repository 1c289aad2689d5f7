"""What a profile has found: seconds against the arithmetic floor, by stage and kind of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from exlq.pipeline.kinds import IN_FLOAT64, KINDS


class Place(NamedTuple):
    """Where time goes to."""

    stage: str
    kind: str


class Rates(NamedTuple):
    """Floating point operations per second of matrix products."""

    float32: float
    float64: float


@dataclass(frozen=True)
class Work:
    """One kind of work; `floor_s` is what its operations take at the rate of a matrix product."""

    kind: str
    seconds: float
    flop: float
    floor_s: float

    @property
    def over_floor(self) -> float | None:
        return self.seconds / self.floor_s if self.floor_s > 0 else None

    def as_json(self) -> dict[str, Any]:
        rate = self.flop / self.seconds if self.flop and self.seconds > 0 else None
        return {**vars(self), "flop_per_s": rate, "over_floor": self.over_floor}


@dataclass(frozen=True)
class StageWork:
    """One stage: its kinds of work sum to it. Peaks are None where nobody watched."""

    name: str
    kinds: tuple[Work, ...]
    peak_anonymous_bytes: int | None
    peak_device_bytes: int | None

    @property
    def whole(self) -> Work:
        return summed(self.name, self.kinds)

    def as_json(self) -> dict[str, Any]:
        memory = {"peak_anonymous_bytes": self.peak_anonymous_bytes}
        memory["peak_device_bytes"] = self.peak_device_bytes
        kinds = [work.as_json() for work in self.kinds]
        return {"stage": self.name, **_without_kind(self.whole), **memory, "kinds": kinds}


@dataclass(frozen=True)
class Profiled:
    """All stages in the order they began, and what the floor is taken at."""

    stages: tuple[StageWork, ...]
    rates: Rates
    threads: int
    device: str

    @property
    def whole(self) -> Work:
        return summed("all", [stage.whole for stage in self.stages])

    def as_json(self) -> dict[str, Any]:
        """As it stands in a summary; what `report.profile` reads."""
        stages = [stage.as_json() for stage in self.stages]
        machine = {"threads": self.threads, "device": self.device, "gemm_flop_per_s": self.rates._asdict()}
        return {**machine, **_without_kind(self.whole), "stages": stages}


def stages_of(
    seconds: Mapping[Place, float],
    flop: Mapping[Place, float],
    rates: Rates,
    anonymous: Mapping[str, int],
    on_device: Mapping[str, int],
) -> tuple[StageWork, ...]:
    """By stage, in the order of `seconds`, the kinds of work in that of `KINDS`; peaks by stage, in bytes."""
    return tuple(
        StageWork(
            name,
            tuple(
                work_of(kind, seconds[Place(name, kind)], flop.get(Place(name, kind), 0.0), rates)
                for kind in KINDS
                if Place(name, kind) in seconds
            ),
            anonymous.get(name),
            on_device.get(name),
        )
        for name in dict.fromkeys(place.stage for place in seconds)
    )


def work_of(kind: str, seconds: float, flop: float, rates: Rates) -> Work:
    """One kind of work against its floor."""
    rate = rates.float64 if kind in IN_FLOAT64 else rates.float32
    return Work(kind, seconds, flop, flop / rate)


def summed(kind: str, works: list[Work] | tuple[Work, ...]) -> Work:
    """Several kinds of work as one."""
    return Work(
        kind,
        sum(work.seconds for work in works),
        sum(work.flop for work in works),
        sum(work.floor_s for work in works),
    )


def _without_kind(work: Work) -> dict[str, Any]:
    return {name: value for name, value in work.as_json().items() if name != "kind"}
