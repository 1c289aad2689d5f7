"""The plots as files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exlq.errors import ConfigError
from exlq.report.figures import write_figures
from tests.report.page_helpers import lone_measurement, make_job

SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml"}


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plots_of_a_format_are_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'exlq[report]'")
    written = write_figures(make_job(tmp_path / "job", ("gguf",)), tmp_path / "made" / kind, kind)
    plots = ("frontier", "map-bits", "map-error", "map-loss", "errors", "predicted", "heldout")
    assert [path.name for path in written] == [f"gguf-{plot}.{kind}" for plot in plots]
    assert set((tmp_path / "made" / kind).iterdir()) == set(written)
    assert all(path.read_bytes().startswith(SIGNATURES[kind]) for path in written)


def test_a_measurement_alone_has_plots_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'exlq[report]'")
    names = {path.stem for path in write_figures(lone_measurement(tmp_path), tmp_path / "plots", "svg")}
    assert {"exl2-frontier", "gguf-frontier", "exl2-errors", "gguf-map-bits"} <= names
    assert "exl2-predicted" not in names


def test_a_missing_matplotlib_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'exlq\[report\]'"):
        write_figures(make_job(tmp_path / "job"), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'exlq[report]'")
    (tmp_path / "plots").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a directory"):
        write_figures(make_job(tmp_path / "job", ("gguf",)), tmp_path / "plots")
