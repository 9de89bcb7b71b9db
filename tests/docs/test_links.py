"""Links in README.md, the guides and the model cards lead somewhere, and every guide is found from README.md."""

import re
from pathlib import Path

import pytest

from tests.docs.reading import ROOT, guides

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
_PAGES = [*guides(), *sorted((ROOT / "model_cards").glob("*.md"))]


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


def test_every_guide_is_linked_from_the_readme():
    linked = {place for place, _ in _LINK.findall((ROOT / "README.md").read_text())}
    missing = {f"docs/{guide.name}" for guide in guides()[1:]} - linked
    assert not missing, f"README.md's list of guides lacks {sorted(missing)}"
