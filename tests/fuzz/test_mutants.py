"""Mutants of every kind of file end in success or in one line: no traceback, no hang, no full memory."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from exlq.cli import main
from tests.conftest import REPOSITORY
from tests.fuzz.attack import Tally, attack, one_each, watched
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.valid import Valid

FEW, MANY = 40, 1000
LEAST_PAST_FIRST = 0.3
SMALL = "-r 24 -l 64 -mr 24 -ml 64 --format gguf --gguf-type Q4_0"
SILENT = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def attacked(kind: Kind, valid: Valid, count: int) -> Tally:
    """`count` mutants, their seeds drawn by hypothesis."""
    tally = Tally()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**64 - 1))
    def run(seed: int) -> None:
        attack(kind, valid, seed, tally)

    run()
    return tally


def judge(name: str, tally: Tally, count: int) -> None:
    print(
        f"{name}: {tally.tried} mutants, {tally.share:.0%} past the first check, {tally.done} done, "
        f"{tally.refused} refused, slowest {tally.slowest:.2f} s, most {tally.most_bytes / 1e6:.0f} MB"
    )
    assert not tally.faults, "\n".join(one_each(tally.faults))
    assert tally.tried >= 0.95 * count
    assert tally.share >= LEAST_PAST_FIRST
    assert tally.refused > 0
    assert tally.done > 0


@SILENT
@pytest.mark.parametrize("name", KINDS)
def test_some_mutants_end_in_success_or_one_line(valid: Valid, name: str) -> None:
    judge(name, attacked(KINDS[name], valid, FEW), FEW)


@SILENT
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_mutants_end_in_success_or_one_line(valid: Valid, name: str) -> None:
    judge(name, attacked(KINDS[name], valid, MANY), MANY)


def command(valid: Valid, name: str, seed: int) -> list[str]:
    """A command on a mutant."""
    lot = random.Random(seed)
    path, form = KINDS[name].make(valid, lot), lot.choice(KINDS[name].commands)
    out = valid.scratch / "out"
    places = {
        "model": valid.model,
        "text": valid.text,
        "gguf": valid.directory / "model.gguf",
        "out": valid.scratch / "out.gguf",
        "convert": f"convert -c {valid.ids} -o {out} --dry-run {SMALL}",
    }
    return form.format(path, **places).split()


def code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)


def run_command(valid: Valid, name: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, tally, codes = command(valid, name, seed), Tally(), []
    target = valid.scratch / "out.gguf"
    target.unlink(missing_ok=True)
    raised = watched(lambda: codes.append(code_of(arguments)), tally)
    shown = capsys.readouterr().err
    assert raised is None, f"{name} {seed}: {raised!r}"
    assert not tally.faults, f"{name} {seed}: {tally.faults}"
    assert codes[0] in (0, 2), f"{name} {seed}: exit {codes[0]}: {shown}"
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == (codes[0] == 2), f"{name} {seed}: {shown}"
    assert "Traceback" not in shown
    if codes[0]:
        assert not target.exists()
        assert not list(valid.scratch.glob(".*.part"))


@SILENT
@pytest.mark.parametrize("name", KINDS)
def test_a_command_on_a_mutant_ends_in_0_or_in_2_with_one_line(
    valid: Valid, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        run_command(valid, name, seed, capsys)


@SILENT
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_commands_on_mutants_end_in_0_or_in_2_with_one_line(
    valid: Valid, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(100, 117):
        run_command(valid, name, seed, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_process_on_a_mutant_ends_in_0_or_in_2_with_one_line(valid: Valid, name: str, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "exlq", *command(valid, name, seed)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert done.returncode in (0, 2), done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == (done.returncode == 2)
    assert "Traceback" not in done.stderr


def test_the_valid_files_themselves_are_taken(valid: Valid) -> None:
    """Else all of this would show nothing."""
    for name, path in untouched(valid).items():
        for use in KINDS[name].uses:
            use(path, valid)


def untouched(valid: Valid) -> dict[str, Path]:
    files = {
        "safetensors": "whole",
        "index": "sharded",
        "config": "whole",
        "tokenizer": "whole",
        "gguf": "model.gguf",
        "parquet": "text.parquet",
        "imatrix-gguf": "imatrix.gguf",
        "imatrix-dat": "imatrix.dat",
        "measurement": "measurement.json",
        "recipe": "recipe.json",
        "summary": "job",
    }
    return {name: valid.directory / file for name, file in files.items()}
