"""Where the time of a conversion goes: seconds and operations by stage and kind of work, peaks of memory.

A recorder is handed down with the plan. At every change of stage or kind the time since the last change
goes to what was being done, so that what stands inside another kind of work is counted once and the times
sum to the whole. Threads beside the main one count thread seconds; these are shared out when the main
thread, which waits for them, goes on to something else.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from exlq.formats import exl2_descent, gguf_descent
from exlq.formats.codec import Codec
from exlq.memory import PeakMemory
from exlq.numerics.float_grid import FloatGrid
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded
from exlq.pipeline.kinds import DESCENTS, ELSEWHERE, READING, REST, SCALES
from exlq.pipeline.profiled import Place, Profiled, stages_of
from exlq.pipeline.rates import RateSamples, waited
from exlq.sizing import flops
from exlq.types import LinearSpec, Option

WALKS = {"exl2": exl2_descent.ROUNDS, "gguf": gguf_descent.ROUNDS}  # of a descent, by codec
T = TypeVar("T")
Spent = Callable[[str, float], AbstractContextManager[None]]


class Profile(Protocol):
    """Told what is being done. `NO_PROFILE` does not listen."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Everything inside belongs to this stage. A stage inside another is no part of it."""
        ...

    def spent(self, kind: str, flop: float = 0.0) -> AbstractContextManager[None]:
        """What is inside is this kind of work, of so many operations at least; likewise."""
        ...

    def reading(self, opened: AbstractContextManager[T]) -> AbstractContextManager[T]:
        """The same context; the time to enter it is that of reading weights."""
        ...

    def codec(self, codec: Codec[Any]) -> Codec[Any]:
        """The same codec, its fits of scales and descents told apart."""
        ...

    def found(self) -> Profiled | None:
        """What was found, at the end of the work."""
        ...


class _Deaf:
    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def spent(self, kind: str, flop: float = 0.0) -> AbstractContextManager[None]:
        return nullcontext()

    def reading(self, opened: AbstractContextManager[T]) -> AbstractContextManager[T]:
        return opened

    def codec(self, codec: Codec[Any]) -> Codec[Any]:
        return codec

    def found(self) -> Profiled | None:
        return None


NO_PROFILE: Profile = _Deaf()


class Recorder:
    """A profile that listens from when it is made. At every change it waits for a GPU to be done.

    The thread that makes it is the main one. In others, kinds of work do not stand in one another.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._threads = torch.get_num_threads()
        self._rates = RateSamples(device)
        self._main, self._lock = threading.get_ident(), threading.Lock()
        self._stack = [Place(ELSEWHERE, REST)]
        self._seconds: dict[Place, float] = defaultdict(float)
        self._flop: dict[Place, float] = defaultdict(float)
        self._beside: dict[Place, float] = defaultdict(float)  # thread seconds not shared out yet
        self._anonymous: dict[str, int] = {}
        self._on_device: dict[str, int] = {}
        self._watch: PeakMemory | None = None
        self._found: Profiled | None = None
        self._since = self._now()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._stack[-1].stage
        self._watched(outer)
        self._take_rates()
        self._watch_begins()
        try:
            with self._inside(Place(name, REST)):
                yield
        finally:
            self._watched(name)
            if outer != ELSEWHERE:
                self._watch_begins()

    @contextmanager
    def spent(self, kind: str, flop: float = 0.0) -> Iterator[None]:
        place = Place(self._stack[-1].stage, kind)
        with self._lock:
            self._flop[place] += flop
        if threading.get_ident() == self._main:
            with self._inside(place):
                yield
            return
        begin = self._clock()
        yield
        with self._lock:
            self._beside[place] += self._clock() - begin

    @contextmanager
    def reading(self, opened: AbstractContextManager[T]) -> Iterator[T]:
        with self.spent(READING):
            entered = opened.__enter__()
        try:
            yield entered
        except BaseException as exc:
            if not opened.__exit__(type(exc), exc, exc.__traceback__):
                raise
        else:
            opened.__exit__(None, None, None)

    def codec(self, codec: Codec[Any]) -> Codec[Any]:
        return cast("Codec[Any]", _WatchedCodec(codec, self.spent))

    def found(self) -> Profiled:
        if self._found is None:
            self._take_rates()
            rates = self._rates.medians()
            stages = stages_of(self._seconds, self._flop, rates, self._anonymous, self._on_device)
            self._found = Profiled(stages, rates, self._threads, str(self._device))
        return self._found

    @contextmanager
    def _inside(self, place: Place) -> Iterator[None]:
        self._charge()
        self._stack.append(place)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        """What has passed since the last change goes to what was being done, a share to threads beside."""
        now = self._now()
        passed, self._since = now - self._since, now
        with self._lock:
            beside, self._beside = self._beside, defaultdict(float)
        share = min(1.0 / self._threads, passed / max(sum(beside.values()), 1e-9))
        for place, seconds in beside.items():
            self._seconds[place] += share * seconds
            passed -= share * seconds
        self._seconds[self._stack[-1]] += max(0.0, passed)

    def _take_rates(self) -> None:
        """Times matrix products; that is no part of the work."""
        self._charge()
        self._rates.take()
        self._since = self._now()

    def _now(self) -> float:
        waited(self._device)
        return self._clock()

    def _watch_begins(self) -> None:
        self._watch = PeakMemory()
        self._watch.__enter__()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _watched(self, stage: str) -> None:
        """Ends the watch over memory, if there is one: its peaks are the stage's."""
        if self._watch is None:
            return
        self._watch.__exit__()
        self._anonymous[stage] = max(self._anonymous.get(stage, 0), self._watch.bytes)
        self._watch = None
        if self._device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated(self._device))
            self._on_device[stage] = max(self._on_device.get(stage, 0), peak)


class _WatchedCodec:
    """A codec whose fits of scales before a sweep and descents after it are told of."""

    def __init__(self, codec: Codec[Any], spent: Spent) -> None:
        self._codec, self._spent = codec, spent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def grid(self, *given: Any) -> Any:
        with self._spent(SCALES, 0.0):
            return self._codec.grid(*given)

    def refined(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        grid: Any,
        factor: Factor,
        weight: Tensor,
        rounded: Rounded,
    ) -> tuple[Any, Rounded]:
        flop = 0.0
        if factor.curvature is not None and not isinstance(grid, FloatGrid):
            n = sum(option.desc not in gguf_descent.WITHOUT_GAIN for option in options)
            flop = flops.descent(len(weight), weight.shape[1], WALKS[self._codec.name], n)
        with self._spent(DESCENTS, flop):
            return self._codec.refined(spec, options, grid, factor, weight, rounded)
