"""The map of the package: what may import what, and how big things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "exlq"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((REPOSITORY / "scripts").rglob("*.py"))]

# An import goes to a lower floor or stays in its own module.
FLOORS = {
    "": 0,  # exlq/__init__.py, the version alone
    "errors": 0,
    "types": 0,
    "faults": 0,
    "files": 0,
    "memory": 0,
    "names": 0,
    "sizes": 1,
    "numerics": 1,
    "allocation": 1,
    "checkpoint": 1,
    "calibration": 1,
    "default_calibration": 1,
    "measurement": 1,
    "workspace": 1,
    "formats": 2,
    "models": 2,
    "pipeline": 3,
    "recipes": 3,
    "sizing": 3,
    "evaluation": 3,
    "run": 3,
    "inspect": 3,
    "doctor": 3,
    "report": 4,
    "cli": 4,
    "api": 4,
    "__main__": 4,
}
# Neighbours on one floor, importer first: each pair has one direction.
NEIGHBOURS = {
    ("files", "faults"),
    ("measurement", "allocation"),  # a record gives the solver its items
    ("pipeline", "evaluation"),  # a job measures what it wrote
    ("pipeline", "recipes"),
    ("pipeline", "doctor"),  # a job's summary says what its text is made of
    ("run", "evaluation"),  # llama.cpp's place, devices
    ("pipeline", "sizing"),
    ("sizing", "recipes"),
    ("inspect", "sizing"),
    ("doctor", "sizing"),
    ("cli", "report"),
    ("__main__", "cli"),
}
COMPILED = ("exlq.numerics.compiled", "exlq.numerics.triton_")  # import numba and triton
HEAVY = {"transformers", "pyarrow", "matplotlib", "rich", "exllamav2", "xllamacpp", "ray"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def top_of(path: Path) -> str:
    """The module of the floor table that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """Dotted names an import statement may load, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = path.relative_to(REPOSITORY).parent.parts
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_in(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def floors_used(source: str, path: Path) -> set[str]:
    """Modules of the floor table that a source text of this package imports."""
    names = [name.split(".") for node in imports_in(ast.parse(source)) for name in imported(node, path)]
    return {parts[1] if parts[1] in FLOORS else _unlisted(parts[1]) for parts in names if parts[0] == "exlq"}


def _unlisted(name: str) -> str:
    """A name of exlq/__init__.py itself, unless there is such a module without a floor."""
    known = (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    return name if known else ""


def may_import(importer: str, other: str) -> bool:
    lower = FLOORS[other] < FLOORS[importer]
    return lower or importer == other or other == "" or (importer, other) in NEIGHBOURS


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_the_floors(path: Path) -> None:
    here = top_of(path)
    assert here in FLOORS, f"give {here} a floor in the table of this test"
    used = floors_used(path.read_text(encoding="utf-8"), path)
    assert used <= set(FLOORS), f"give {used - set(FLOORS)} a floor in the table of this test"
    upward = sorted(other for other in used if not may_import(here, other))
    assert not upward, f"{here} (floor {FLOORS[here]}) imports {upward}"


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("import exlq.pipeline.job", {"pipeline"}),
        ("from exlq import cli, __version__", {"cli", ""}),
        ("from ..formats import exl2", {"formats"}),
        ("from . import hessian", {"numerics"}),
        ("def f() -> None:\n    from exlq.models.block import Block", {"models"}),
        ("import torch, exlqx", set()),
    ],
)
def test_the_map_is_read_from_every_form_of_import(source: str, used: set[str]) -> None:
    assert floors_used(source, PACKAGE / "numerics" / "rounding.py") == used


def test_neighbours_see_each_other_in_one_direction_only() -> None:
    assert all(FLOORS[importer] == FLOORS[other] for importer, other in NEIGHBOURS)
    assert not any((other, importer) in NEIGHBOURS for importer, other in NEIGHBOURS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_heavy_optional_libraries_are_imported_inside_functions(path: Path) -> None:
    inner = {
        name.split(".")[0]
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
        for node in imports_in(function)
        for name in imported(node, path)
        if not name.startswith(COMPILED)
    }
    assert inner <= HEAVY, f"move the import of {sorted(inner - HEAVY)} to the top of the file"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions(ast.parse(source))}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("path", [path for path in MODULES if top_of(path) != "cli"], ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"print on lines {lines}; give the value back and let exlq/cli.py print it"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("exlq", ["torch", "numpy", "scipy", "transformers", "pyarrow"]),
        ("exlq.types", ["torch", "numpy"]),
        ("exlq.allocation", ["torch", "transformers", "pyarrow"]),
        ("exlq.measurement", ["torch", "transformers", "pyarrow"]),
        ("exlq.names", ["torch", "numpy"]),
        ("exlq.recipes", ["torch", "transformers", "pyarrow"]),
        ("exlq.sizing.advice, exlq.report.plans, exlq.cli.plan", ["torch", "transformers", "pyarrow"]),
        ("exlq.sizing.effort", ["torch", "numpy"]),
        ("exlq.inspect, exlq.report.inspection, exlq.cli.inspect", ["torch", "transformers", "pyarrow"]),
        ("exlq.pipeline.config", ["torch", "transformers", "pyarrow"]),
        ("exlq.cli", ["torch", "transformers", "pyarrow", "numpy"]),
        ("exlq.formats.gguf.recipes, exlq.formats.gguf.header", ["torch", "transformers", "pyarrow"]),
        ("exlq.models.families, exlq.models.config", ["torch", "transformers", "pyarrow"]),
        ("exlq.formats.exl2_options, exlq.checkpoint.hashes", ["torch", "transformers", "pyarrow"]),
        ("exlq.numerics", ["transformers", "scipy", "pyarrow", "numba", "triton"]),
    ],
)
def test_a_low_floor_loads_no_heavy_library(module: str, absent: list[str]) -> None:
    stems = sorted(path.stem for path in (PACKAGE / "numerics").glob("[a-z]*.py"))
    loaded = (stem for stem in stems if not f"exlq.numerics.{stem}".startswith(COMPILED))  # when used
    packages = [f"exlq.numerics.{stem}" for stem in loaded]
    names = [module, *packages] if module == "exlq.numerics" else [module]
    code = f"import sys, {', '.join(names)}; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
