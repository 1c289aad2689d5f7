"""Several devices of one process, a thread for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from exlq.pipeline.parcels import put_together, taken_apart


class DeviceWorkers:
    """Units dealt out to devices as these get free; their arguments are moved there."""

    ahead = 1

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> object:
        free: SimpleQueue[torch.device] = SimpleQueue()
        for device in self._devices:
            free.put(device)
        self._pool = ThreadPoolExecutor(len(self._devices), "exlq", self._begin, (free,))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)

    def share(self, value: Any) -> Any:
        return value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        assert self._pool is not None
        return self._pool.submit(self._done, function, arguments)

    def result(self, handle: Future[Any]) -> Any:
        return handle.result()

    def _begin(self, free: SimpleQueue[torch.device]) -> None:
        """Takes a device for this thread."""
        self._own.device = free.get()
        if self._own.device.type == "cuda":
            torch.cuda.set_device(self._own.device)

    def _done(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        return function(*map(self._moved, arguments))

    def _moved(self, argument: Any) -> Any:
        """With its tensors on this thread's device. A result is waited for: its unit was begun before."""
        value = argument.result() if isinstance(argument, Future) else argument
        device: torch.device = self._own.device

        def here(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        return put_together(taken_apart(value, here), lambda tensor: tensor)
