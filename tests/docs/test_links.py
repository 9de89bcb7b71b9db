"""Links in README.md and docs/ lead somewhere, and every page is in the navigation of the site."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.reading import ROOT, guides

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
_PAGES = guides()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for place, anchor in _LINK.findall(page.read_text()):
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name} links to {place}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {place}#{anchor}: {anchors(target)}"


def test_every_page_is_in_the_navigation_of_the_site():
    nav = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    pages = {str(page.relative_to(ROOT / "docs")) for page in guides()[1:]}
    assert sorted(nav) == sorted(pages)


def _rooms() -> list[tuple[str, str]]:
    """Name and last cell of each row in the table of rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE)


def test_the_architecture_lists_the_rooms_in_the_order_of_the_contract():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [room for room, _ in _rooms()] == [room for layer in layers for room in layer.split(" | ")]


def test_the_architecture_lists_modules_that_are_there():
    for room, modules in _rooms():
        for name in re.findall(r"`(\w+)/?`", modules):
            place = ROOT / "cbd_trl" / room / name
            # What a module is for may name functions, too: `train` has `distill` and `bridge`.
            assert place.is_dir() or place.with_suffix(".py").is_file() or room == "cli", f"{room} has no {name}"
