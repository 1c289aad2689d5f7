"""What is installed: the wheel converts by itself, requirements are those imported, versions are pinned."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from exlq import __version__
from exlq.cli import main
from tests.conftest import REPOSITORY
from tests.helpers import make_model
from tests.report.page_helpers import make_job

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
USED_BY_TRANSFORMERS = {"jinja2", "sentencepiece", "protobuf"}  # chat templates, tokenizer.model
UNPINNED = {"triton"}  # torch's builds for CUDA ask for one version each
OPTIONAL = {"matplotlib", "exllamav2", "xllamacpp", "triton", "ray"}  # imported where used, if there


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A finished process, its output included in what a failure shows."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where our wheel was installed; it is built from a copy, for a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("packaging")
    copy, site = folder / "sources", folder / "site"
    for name in ("exlq", "calibration"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run((*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy), folder)
    (wheel,) = folder.glob("exlq-*.whl")
    run((*pip, "install", "--no-deps", "--no-index", "--target", site, wheel), folder)
    return site


@pytest.fixture
def distribution(site: Path) -> metadata.Distribution:
    (information,) = site.glob("exlq-*.dist-info")
    return metadata.Distribution.at(information)


def pins(python: str) -> dict[str, list[str]]:
    """Versions that constraints.txt gives each package on one Python."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                found.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    return found


def requirements(distribution: metadata.Distribution) -> list[Requirement]:
    return [Requirement(line) for line in distribution.requires or ()]


def imported(folder: Path) -> set[str]:
    """Distributions, as far as they are named like their modules, that the files of a folder import."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return {canonicalize_name(name) for name in names - sys.stdlib_module_names - {"exlq"}}


def test_the_installed_wheel_converts_from_another_directory(site: Path, tmp_path: Path) -> None:
    where = run((sys.executable, "-c", "import exlq; print(exlq.__file__)"), tmp_path, PYTHONPATH=str(site))
    assert Path(where.stdout.strip()) == site / "exlq" / "__init__.py"
    model = make_model("llama", tmp_path / "model", tied=False)
    small = ("-r", "8", "-mr", "8", "-l", "64", "-ml", "64", "--threads", "1")
    convert = (sys.executable, "-m", "exlq", "convert", "-i", model, "-o", "out", "-b", "5", *small)
    done = run(convert, tmp_path, PYTHONPATH=str(site))

    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["calibration"]["file"] == "default.parquet"
    assert summary["outputs"].keys() == {"exl2", "gguf"}
    for made in summary["outputs"].values():
        assert 4.9 < made["bpw"] <= 5
        assert f"{made['bpw']:.4f}" in done.stdout
    assert (tmp_path / "out" / "exl2" / "output.safetensors").is_file()
    (file,) = (tmp_path / "out" / "gguf").glob("*.gguf")
    assert file.name.endswith("-5.00bpw.gguf")


def test_the_installed_wheel_writes_a_report(site: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    run((sys.executable, "-m", "exlq", "report", job), tmp_path, PYTHONPATH=str(site))
    assert "<h1>tiny-llama</h1>" in (job / "report.html").read_text(encoding="utf-8")


def test_the_program_and_the_module_state_the_version() -> None:
    program = shutil.which("exlq", path=str(Path(sys.executable).parent))
    assert program, "the environment has no `exlq`: install with pip install -e '.[test,eval]'"
    for command in ((program,), (sys.executable, "-m", "exlq")):
        assert run((*command, "--version"), REPOSITORY).stdout == f"exlq {__version__}\n"


def test_the_wheel_brings_the_command_and_the_licence(distribution: metadata.Distribution) -> None:
    (entry,) = distribution.entry_points
    assert (entry.group, entry.name, entry.load()) == ("console_scripts", "exlq", main)
    assert distribution.version == __version__
    assert distribution.read_text("licenses/LICENSE") == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


def test_the_package_requires_what_it_imports_and_nothing_else(
    distribution: metadata.Distribution,
) -> None:
    needed = requirements(distribution)
    required = {canonicalize_name(need.name) for need in needed if need.marker is None}
    assert required - USED_BY_TRANSFORMERS == imported(REPOSITORY / "exlq") - OPTIONAL


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_give_every_requirement_one_version_that_satisfies_it(
    distribution: metadata.Distribution, python: str
) -> None:
    pinned = pins(python)
    assert {name: found for name, found in pinned.items() if len(found) > 1} == {}
    for need in requirements(distribution):
        if need.name in UNPINNED:
            continue
        (version,) = pinned[canonicalize_name(need.name)]
        assert version in need.specifier, f"{need.name} {version} on Python {python}, wanted {need}"


def test_the_makefile_names_the_pinned_torch() -> None:
    (version,) = pins("3.11")["torch"]
    assert f" torch=={version}\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
