"""The report in a real browser: headless Chromium, by playwright."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exlq.report.page import write_report
from tests.report.page_helpers import lone_measurement, make_job, renamed

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: exlq[browser]")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
HOSTILE = "</script><img src=x onerror=alert(1)>"
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_job(tmp_path_factory.mktemp("browser") / "job"))


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """Opens a page; at the end of the test nothing may have failed or been asked of a network."""
    contexts, faults = [], []

    def at(path: Path, width: int = 1400, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: faults.append(request.url) if request.url != path.as_uri() else None
        )
        page.goto(path.as_uri())
        return page

    yield at
    for context in contexts:
        context.close()
    assert faults == []


def column(page: Any, index: int) -> list[str]:
    return [
        str(text) for text in page.locator(f"#tensors tbody tr > :nth-child({index + 1})").all_text_contents()
    ]


def head(page: Any, name: str) -> Any:
    return page.locator("#tensors thead th", has=page.get_by_role("button", name=name, exact=True))


def test_every_section_is_drawn(opened: Opened, report: Path) -> None:
    page = opened(report)
    for name in ("frontier", "errors", "predicted", "heldout"):
        assert page.locator(f"#{name} svg.chart path").count() > 0, name
    assert page.locator("#map .cell").count() == 28
    assert page.locator("#tensors tbody tr").count() == 30
    assert (
        page.locator("#frontier .dot.chosen").count() == page.locator("#frontier .dot.measured").count() == 1
    )


def test_hovering_the_map_tells_of_that_linear(opened: Opened, report: Path) -> None:
    page, tip = opened(report), "#tip"
    assert page.locator(tip).is_hidden()
    cell = page.get_by_label(re.compile(r"^model\.layers\.2\.mlp\.up_proj:"))
    cell.hover()
    assert page.locator(f"{tip} strong").text_content() == "model.layers.2.mlp.up_proj"
    assert "bits per weight" in page.locator(tip).text_content()
    page.mouse.move(2, 2)
    assert page.locator(tip).is_hidden()


def test_hovering_a_line_tells_of_that_linear_and_its_option(opened: Opened, report: Path) -> None:
    page = opened(report)
    dot = page.locator('#errors circle[data-key="model.layers.3.self_attn.v_proj"]')
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = page.locator("#tip").inner_text().splitlines()
    assert told[0] == "model.layers.3.self_attn.v_proj"
    row = page.locator("#tensors tbody tr", has_text=told[0])
    assert told[1].startswith(str(row.locator("td").first.text_content()))
    assert page.locator("#errors path.lit").get_attribute("data-key") == told[0]


def test_hovering_the_frontier_finds_the_model(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.locator("#frontier .dot.measured").hover()
    assert page.locator("#tip strong").text_content() == "This model, measured"
    assert "0.0016 ± 0.0001 nats" in page.locator("#tip").inner_text()


def test_arrow_keys_read_plots_and_map(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.locator("#frontier svg").focus()
    page.keyboard.press("ArrowRight")
    assert "bits per weight" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("#map .cell").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#tip strong").text_content() == "model.layers.1.self_attn.k_proj"


def test_headers_sort_up_and_down(opened: Opened, report: Path) -> None:
    page = opened(report)
    for index, name in ((3, "bpw"), (2, "bits")):
        head(page, name).get_by_role("button").click()
        values = [float(text.replace(",", "")) for text in column(page, index)]
        assert values == sorted(values)
        assert head(page, name).get_attribute("aria-sort") == "ascending"
        head(page, name).get_by_role("button").press("Enter")
        values = [float(text.replace(",", "")) for text in column(page, index)]
        assert values == sorted(values, reverse=True)
        assert head(page, name).get_attribute("aria-sort") == "descending"
    assert head(page, "bpw").get_attribute("aria-sort") == "none"


def test_the_filter_keeps_what_it_names(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.get_by_label("Filter tensors").fill("DOWN_proj")
    assert column(page, 0) == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    assert page.locator("#tensors .count").text_content() == "4 of 30"


def test_the_format_changes_everything_below(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.get_by_role("button", name="GGUF").click()
    assert set(column(page, 1)) <= {"Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert page.get_by_role("button", name="GGUF").get_attribute("aria-pressed") == "true"


def test_the_map_shows_bits_errors_and_losses(opened: Opened, report: Path) -> None:
    page = opened(report)
    seen = set()
    for name in ("bits", "error", "loss"):
        page.locator("#map .tools").get_by_role("button", name=name).click()
        seen.add(page.locator("#map .cell").nth(5).text_content())
    assert len(seen) == 3


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_nothing_is_wider_than_the_window(width: int, opened: Opened, report: Path) -> None:
    page = opened(report, width)
    for details in page.locator("details summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_dark_scheme_changes_colours_and_keeps_text_readable(opened: Opened, report: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        page = opened(report, color_scheme=scheme)
        look = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
        shades[scheme] = [
            page.locator(at).first.evaluate(look) for at in ("body", "#map .cell", ".toggle button")
        ]
    assert shades["light"][0] != shades["dark"][0]
    assert shades["light"][1] != shades["dark"][1]
    for looks in shades.values():
        paper, ink = (luminance(colour) for colour in looks[0])
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7  # WCAG 2.2, AAA


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`. Source: WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_names_never_become_elements(opened: Opened, tmp_path: Path) -> None:
    page = opened(
        write_report(renamed(make_job(tmp_path / "job"), "model.layers.0.self_attn.q_proj", f"a.0.{HOSTILE}"))
    )
    assert page.locator("img").count() == 0
    assert f"a.0.{HOSTILE}" in column(page, 0)
    page.locator("#map .cell").first.hover()
    assert page.locator("#tip strong").text_content() == f"a.0.{HOSTILE}"


def test_a_measurement_alone_is_drawn(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_report(lone_measurement(tmp_path)))
    assert page.locator("#frontier .line.main").count() == 1
    assert page.locator("#map .cell").count() == 28
    assert page.locator("#predicted").is_hidden()


def test_without_javascript_the_figures_are_there(opened: Opened, report: Path) -> None:
    page = opened(report, java_script_enabled=False)
    assert page.locator("noscript p").is_visible()
    assert page.get_by_text("3.12 MiB").first.is_visible()
    assert page.locator("#frontier").is_hidden()
