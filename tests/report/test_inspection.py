"""What `exlq inspect` shows."""

from __future__ import annotations

from rich.console import Console

from exlq.inspect import Entry, Grid, Inspection, by_layer
from exlq.report.inspection import inspection_view, printable

NAME = "model.layers.0.a_very_long_name_of_a_linear_that_no_terminal_has_room_for.down_proj.weight"
FOUND = Inspection(
    "model.gguf",
    "gguf",
    {"bytes": 4096, "parameters": 1_000_000},
    (
        Entry(NAME, "Q4_K", (256, 768), 196_608, 4.5, 110_592, error=0.00123),
        Entry("b", "F32", (4,), 4, 32, 16),
    ),
    ("a note",),
    {"general.name": "made"},
)


def shown(found: Inspection, grid: Grid | None = None, metadata: bool = False) -> str:
    console = Console(width=80, soft_wrap=True, highlight=False)
    with console.capture() as captured:
        console.print(inspection_view(found, grid, metadata), soft_wrap=True)
    return captured.get()


def test_a_narrow_terminal_cuts_no_name_off() -> None:
    text = shown(FOUND)
    for part in (
        NAME,
        "256 × 768",
        "110,592",
        "0.00123",
        "4,096 (4.00 KiB)",
        "1,000,000",
        "a note",
        "100.0 %",
    ):
        assert part in text
    assert "sensitivity" not in text  # a column that nothing stands in


def test_the_grid_takes_the_place_of_the_list() -> None:
    text = shown(FOUND, by_layer(FOUND), metadata=True)
    assert NAME not in text
    assert "down_proj" in text
    assert "general.name" in text


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert printable("a\x1b[2J\n") == "a\\x1b[2J\\n"
