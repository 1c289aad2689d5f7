"""Processes of this machine or of a cluster, which Ray starts, feeds and replaces when they are lost."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor

from exlq import __version__
from exlq.errors import ConfigError, WorkerError
from exlq.numerics.kernels import COMPILED
from exlq.numerics.precision import quick_products
from exlq.pipeline.parcels import Parcel, put_together, taken_apart

RETRIES = 5  # of a unit whose worker, or whose whole machine, was lost
JOINED = "ray"  # the cluster that this machine belongs to
SILENT = {  # variables of Ray's
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else what a later version will change is
}


class Sent(NamedTuple):
    """A tensor whose bytes Ray keeps apart from what it pickles, in the order in which they lay."""

    data: NDArray[uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Remote(NamedTuple):
    """What Ray knows a parcel by."""

    ref: Any


class Terms(NamedTuple):
    """What a worker must have, so that its bytes are those of the process that it works for."""

    threads: int
    device: str
    program: Mapping[str, str] | None  # None: anything goes


class RayWorkers:
    """Units as tasks of Ray; what they take and give lies in its object store.

    Args:
        where: a number of processes on this machine, `ray` for the cluster that this machine has joined,
            or `ray://HOST:PORT`, where a cluster listens for clients.
        device: a unit gets one of that kind to itself, or as many cores as this process has threads.
        any_machine: whether other versions and processors than this process's may work.
    """

    ahead = 1

    def __init__(self, where: str, device: torch.device, any_machine: bool = False) -> None:
        self._where, self._device, self._any = where, device, any_machine
        self._ray: Any = None
        self._task: Any = None
        self._terms: Any = None

    def __enter__(self) -> object:
        for name, value in SILENT.items():
            os.environ.setdefault(name, value)
        import ray

        self._ray = ray
        self._connect()
        device, threads = self._device.type, torch.get_num_threads()
        needs = {"num_cpus": 1 if self._where.isdigit() else threads, "num_gpus": int(device == "cuda")}
        self._task = ray.remote(max_retries=RETRIES, **needs)(_done)
        terms = Terms(threads, device, None if self._any else _program(self._device))
        self._terms = Remote(ray.put(terms))
        return self

    def __exit__(self, *_: object) -> None:
        self._task = self._terms = None
        self._ray.shutdown()

    def share(self, value: Any) -> Remote:
        with self._explained():
            return Remote(self._ray.put(taken_apart(value, _sent)))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Remote:
        sent = [a if isinstance(a, Remote) else self.share(a) for a in arguments]
        with self._explained():
            return Remote(self._task.remote(self._terms.ref, function, *(each.ref for each in sent)))

    def result(self, handle: Remote) -> Any:
        with self._explained():
            return put_together(self._ray.get(handle.ref), _arrived)

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        local = {"address": "local", "include_dashboard": False}
        joined = {"address": "auto" if self._where == JOINED else self._where}
        how = {"num_cpus": int(self._where), **local} if self._where.isdigit() else joined
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._ray.init(**how, **quiet)
        except (ConnectionError, ImportError, RuntimeError, TimeoutError, ValueError) as exc:
            raise ConfigError(
                f"--workers {self._where}: no Ray there ({_line(exc)}); `ray start` begins a cluster or "
                "joins one, --workers N starts N processes on this machine"
            ) from exc

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What a unit raised is raised as it was; what Ray raises is a WorkerError of one line."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as exc:
            raise exc.cause from exc
        except (errors.RayError, ConnectionError) as exc:
            raise WorkerError(
                f"--workers {self._where}: {_line(exc)}; give the command again: what is done is kept"
            ) from exc


def _done(terms: Terms, function: Callable[..., Any], *arguments: Parcel[Sent]) -> Parcel[Sent]:
    """A unit, in the worker's process."""
    if terms.program is not None and (own := _program(torch.device(terms.device))) != terms.program:
        name = next(name for name in terms.program if own.get(name) != terms.program[name])
        raise ConfigError(
            f"a worker has {name} {own.get(name)}, this process {terms.program[name]}: the bytes may differ; "
            "make them alike, or give --allow-other-machine"
        )
    torch.set_num_threads(terms.threads)
    values = [put_together(each, lambda sent: _arrived(sent).to(terms.device)) for each in arguments]
    with quick_products():
        return taken_apart(function(*values), _sent)


def _sent(tensor: Tensor) -> Sent:
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
        tensor = tensor.clone()  # its own elements alone, in the same order
    flat = tensor.as_strided((tensor.numel(),), (1,), 0)
    return Sent(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _arrived(sent: Sent) -> Tensor:
    """The tensor in memory of its own, aligned as torch aligns: arithmetic goes by that."""
    flat = torch.empty(sent.data.size // sent.dtype.itemsize, dtype=sent.dtype)
    flat.view(torch.uint8).numpy()[:] = sent.data
    return flat.as_strided(sent.shape, sent.stride)


def _program(device: torch.device) -> dict[str, str]:
    """What the bytes depend on beside threads: versions, and what does the arithmetic."""
    cuda = device.type == "cuda"
    return {
        "exlq": __version__,
        "torch": torch.__version__,
        "numba": version("numba") if COMPILED else "none",
        "instructions": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
    }


def _line(error: BaseException) -> str:
    """The first sentence of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[\w)`])[.:;] ", text)[0].rstrip(".")
