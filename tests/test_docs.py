"""The documentation names what there is: every command, every flag of convert, every page it links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exlq.cli.commands import COMMANDS
from exlq.cli.parser import whole_parser

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([\w-]+))?\)")
FLAG = re.compile(r"`(--?[a-zA-Z][\w-]*)`")


def anchors(page: Path) -> set[str]:
    """What a link can point to in a page, as GitHub names headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        place = (page.parent / target).resolve()
        assert place.exists(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links {target}#{anchor}"


def test_the_readme_names_every_command_and_links_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`exlq {name}" in text, name
    linked = {(REPOSITORY / target).resolve() for target, _ in LINK.findall(text)}
    assert set(PAGES[1:]) <= linked, sorted(page.name for page in set(PAGES[1:]) - linked)


def test_the_table_of_convert_has_every_flag_and_no_other() -> None:
    rows = re.findall(
        r"^\| (`-[^|]*) \|", (REPOSITORY / "docs/converting.md").read_text(encoding="utf-8"), re.M
    )
    told = {flag for row in rows for flag in FLAG.findall(row)}
    parser = whole_parser()._commands()["convert"]
    known = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert told == known
