"""Whoever does the units of work, the bytes are the same."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exlq import measurement
from exlq.cli import main
from exlq.errors import ConfigError, HessianError
from exlq.pipeline import job, measure, units
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.profile import NO_PROFILE
from exlq.pipeline.state import fingerprint
from exlq.pipeline.workers import IN_PROCESS, Unit, Workers, in_order, usable_devices
from exlq.pipeline.workers_devices import DeviceWorkers
from exlq.pipeline.workers_ray import RayWorkers
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, Place, contents, convert, settings
from tests.pipeline.test_workers_ray import WITH_RAY

CPU = torch.device("cpu")
MADE: dict[str, Callable[[], Workers]] = {
    "process": lambda: IN_PROCESS,
    "devices": lambda: DeviceWorkers([CPU, CPU]),
    "ray": lambda: RayWorkers("2", CPU),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[WITH_RAY] if kind == "ray" else []) for kind in MADE],
)
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """Each kind, begun."""
    made = MADE[request.param]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with made:
            yield made


@pytest.fixture
def place(tmp_path: Path, llama: Path, ids_file: Path) -> Place:
    return Place(tmp_path, llama, ids_file)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two devices on one CPU want that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that run in the measuring pass from here on."""
    told: list[str] = []
    real = measure._forward

    def forward(plan: Any, index: int, *rest: Any) -> Any:
        told.append(f"run {index}")
        return real(plan, index, *rest)

    monkeypatch.setattr(measure, "_forward", forward)
    return told


def delivered(config: ConvertConfig) -> dict[str, bytes]:
    record = {"measurement.json": (config.out_dir / "measurement.json").read_bytes()}
    return record | contents(config.out_dir / "exl2") | contents(config.out_dir / "gguf")


def tensors_of(value: Any) -> Iterator[Tensor]:
    return (each for each in value if isinstance(each, Tensor))


@pytest.mark.filterwarnings("ignore")
def test_a_result_is_that_of_the_function_in_bits_strides_and_alignment(workers: Workers) -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    second = x.T @ x / len(x)
    expected = units.evidence(second, second, True, True, True, NO_PROFILE)
    shared = workers.share(second)
    handle = workers.submit(units.evidence, shared, shared, True, True, True, NO_PROFILE)
    factor = workers.result(workers.submit(operator.attrgetter("factor"), handle))
    assert factor.ridge == expected.factor.ridge
    for found, wanted in zip(tensors_of(factor), tensors_of(expected.factor), strict=True):
        assert torch.equal(found, wanted)
        assert (found.stride(), found.data_ptr() % 64) == (wanted.stride(), 0)
    narrow = second.bfloat16().T[3:40:2]
    moved = workers.result(workers.submit(operator.itemgetter("x"), {"x": narrow}))
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, narrow)


@pytest.mark.filterwarnings("ignore")
def test_results_come_in_order_and_errors_as_they_were_raised(workers: Workers) -> None:
    numbers = [Unit(operator.neg, (value,)) for value in range(40)]
    assert list(in_order(workers, numbers)) == [-value for value in range(40)]
    with pytest.raises(HessianError, match=r"^its diagonal is not finite: the activations are broken$"):
        _ = [workers.result(handle) for handle in after_broken(workers)]


def after_broken(workers: Workers) -> Iterator[Any]:
    """The handle of a unit that takes the result of one that fails."""
    broken = torch.full((4, 4), float("nan"))
    handle = workers.submit(units.evidence, broken, broken, True, True, True, NO_PROFILE)
    yield workers.submit(operator.attrgetter("factor"), handle)


def test_this_process_does_a_unit_when_its_result_is_wanted_and_no_sooner() -> None:
    done: list[int] = []
    results = in_order(IN_PROCESS, (Unit(done.append, (value,)) for value in range(3)))
    assert done == []
    next(results)
    assert done == [0]


@pytest.mark.usefixtures("one_thread")
def test_two_devices_deliver_the_bytes_of_one(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    alone = settings(llama, tmp_path / "alone", ids_file, bits=5.0, formats=None, measure=None)
    together = replace(alone, out_dir=tmp_path / "together", device="cpu,cpu")
    for config in (alone, together):
        convert(config)
    assert delivered(together) == delivered(alone)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stop_at", [("measuring", 1), ("quantizing exl2", 1)])
def test_what_several_began_this_process_ends_and_does_nothing_twice(
    finished: Finished, tmp_path: Path, forwards: list[str], stop_at: tuple[str, int]
) -> None:
    alone = replace(finished.config, out_dir=tmp_path / "alone")
    convert(alone)
    config = replace(finished.config, out_dir=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(replace(config, device="cpu,cpu"), Events(stop_at))
    forwards.clear()
    convert(config)
    assert forwards == (["run 1"] if stop_at[0] == "measuring" else [])
    assert delivered(config) == delivered(alone)


class Later:
    """Units that nobody does before their results are asked for."""

    ahead = 1

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def share(self, value: Any) -> Any:
        return lambda: value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return lambda: function(*(each() if callable(each) else each for each in arguments))

    def result(self, handle: Any) -> Any:
        return handle()


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (IN_PROCESS, ["run 0", "done 0", "run 1", "done 1"]),
        (Later(), ["run 0", "run 1", "done 0", "done 1"]),
    ],
)
def test_one_block_runs_ahead_of_those_that_are_measured(
    finished: Finished, tmp_path: Path, forwards: list[str], kind: Workers, order: list[str]
) -> None:
    config = replace(finished.config, out_dir=tmp_path / "out", output_measurement=tmp_path / "m.json")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "measuring" and done < total:
            forwards.append(f"done {done - 1}")

    begun = job.begin(config, progress, "a command")
    job.run(replace(begun, plan=replace(begun.plan, workers=kind)))
    assert forwards == order
    assert measurement.load(tmp_path / "m.json").linears == measurement.load(finished.measurement).linears


def test_who_does_the_work_is_no_setting_that_results_depend_on(finished: Finished) -> None:
    def known(**changes: Any) -> str:
        return fingerprint(replace(finished.config, **changes), {})

    assert known(workers="2") == known(device="cpu,cpu") == known()
    assert known(device="cuda:1") == known(device="cuda:0,cuda:2") == known(device="cuda") != known()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "two"], "--workers two: a number of processes on this machine is wanted, ray"),
        (["--workers", "0"], "--workers 0: a number of processes"),
        (["--workers", "ray://host"], "--workers ray://host: .*ray://HOST:PORT"),
        (["--workers", "2", "--device", "cuda:0"], "--workers 2 with --device cuda:0: .*cuda:0,cuda:1"),
        (["--workers", "ray", "--device", "mps"], "--workers ray with --device mps: "),
        (["--workers", "2", "--device", "cpu,cpu"], "--workers 2 and --device cpu,cpu: give one of them"),
        (["--device", "cpu,cuda:0"], "--device cpu,cuda:0: several must be different cuda:N"),
        (["--device", "cuda:0,cuda:0"], "--device cuda:0,cuda:0: several must be different cuda:N"),
        (
            ["--device", "cpu,cpu", "--threads", "2"],
            "--device cpu,cpu: two units on one CPU take --threads 1",
        ),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_what_cannot_work_is_one_line(
    place: Place, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(place.arguments(*flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert not place.out.exists()


def test_without_ray_it_says_what_to_install(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exlq.pipeline.workers.find_spec", lambda _: None)
    assert main(place.arguments("--workers", "2")) == 2
    assert capsys.readouterr().err == "error: --workers 2 wants Ray: pip install 'exlq[ray]'\n"


def test_devices_that_are_not_alike_are_refused(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlq.pipeline.workers.usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model {device.index % 2}")
    assert len(usable_devices(replace(finished.config, device="cuda:0,cuda:2"))) == 2
    with pytest.raises(ConfigError, match="these are model 0 and model 1, whose bytes may differ"):
        usable_devices(replace(finished.config, device="cuda:0,cuda:1"))
