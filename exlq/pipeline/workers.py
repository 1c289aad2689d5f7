"""Who does the units of work: this process, several devices of it, or processes on this and other machines.

A unit is a function of its arguments alone (`exlq.pipeline.units`): who does it changes no byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch

from exlq.errors import ConfigError
from exlq.evaluation.run import usable_device
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.workers_devices import DeviceWorkers
from exlq.pipeline.workers_ray import RayWorkers

Handle = Any  # of a value that is there, or that a unit will give


class Workers(Protocol):
    """`result(submit(f, a, b))` is `f(a, b)` bit for bit, with tensors where the unit is done.

    An argument may be a handle: that of a shared value, or of an earlier unit's result. A unit does not
    modify what is shared. They work between `with` and its end, by which all is over, done or not.
    """

    ahead: int  # blocks whose units may be under way while the next block runs

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def share(self, value: Any) -> Handle:
        """For a value that several units take: it makes the way to them once."""
        ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Handle:
        """Has a unit done, at once or as soon as somebody is free."""
        ...

    def result(self, handle: Handle) -> Any:
        """What a unit gave, or what it raised.

        Raises:
            WorkerError: if nobody is left who could do it.
        """
        ...


class InProcess:
    """Every unit done at once, here."""

    ahead = 0

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def share(self, value: Any) -> Handle:
        return value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Handle:
        return function(*arguments)

    def result(self, handle: Handle) -> Any:
        return handle


IN_PROCESS = InProcess()


class Unit(NamedTuple):
    """A function, and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


UNDER_WAY = 16  # units of one stage at most, so that their weights are not all in memory


def in_order(workers: Workers, units: Iterable[Unit]) -> Iterator[Any]:
    """The results of units, side by side where there are workers, else each when it is asked for."""
    waiting: deque[Handle] = deque()
    for unit in units:
        waiting.append(workers.submit(unit.function, *unit.arguments))
        if len(waiting) > workers.ahead * UNDER_WAY:
            yield workers.result(waiting.popleft())
    while waiting:
        yield workers.result(waiting.popleft())


def usable_devices(config: ConvertConfig) -> list[torch.device]:
    """The devices of a conversion, tried out; the first runs the model.

    Raises:
        ConfigError: if torch lacks one, or they are not alike, so that the bytes would depend on chance.
    """
    devices = [usable_device(name) for name in config.device.split(",")]
    models = {torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"}
    if len(models) > 1:
        raise ConfigError(
            f"--device {config.device}: these are {' and '.join(sorted(models))}, whose bytes may differ; "
            "give devices that are alike"
        )
    if len(devices) > 1 and devices[0].type == "cpu" and torch.get_num_threads() > 1:
        raise ConfigError(
            f"--device {config.device}: two units on one CPU take --threads 1; --workers N has processes "
            "with threads of their own"
        )
    return devices


def chosen(config: ConvertConfig, devices: list[torch.device]) -> Workers:
    """The workers that the settings ask for; they begin with `with`.

    Raises:
        ConfigError: if they want what is not installed.
    """
    if config.workers is not None:
        if find_spec("ray") is None:
            raise ConfigError(f"--workers {config.workers} wants Ray: pip install 'exlq[ray]'")
        return RayWorkers(config.workers, devices[0], config.allow_other_machine)
    return DeviceWorkers(devices) if len(devices) > 1 else IN_PROCESS
