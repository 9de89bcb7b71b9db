"""The tables of the documentation have a row for every family and every divergence."""

import re

from cbd_trl.architectures.registry import supported_model_types
from cbd_trl.losses.divergence_table import DIVERGENCES
from tests.docs.reading import ROOT
from tests.tiny import ROWS


def cells(page: str, after: str) -> list[list[str]]:
    """The rows of the table under the line that begins so, its heading left out."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(after))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def named(cell: str) -> list[str]:
    """The model types of a cell, without what stands in parentheses."""
    return re.sub(r"\(.*?\)", "", cell).replace(" ", "").split(",")


def test_every_family_has_its_row() -> None:
    rows = cells("reference/families.md", "| family |")
    assert sorted(name for row in rows for name in named(row[0])) == supported_model_types()


def test_every_family_of_llama_cpp_is_in_the_page_on_export() -> None:
    (row,) = [row for row in cells("guides/export.md", "| what | for |") if "table of tensor names" in row[0]]
    assert sorted(named(row[1])) == sorted(family for family, of in ROWS.items() if of.gguf is not None)


def test_every_divergence_has_its_row_and_its_option() -> None:
    rows = {
        name.strip("`"): option.strip("`") for name, _, option, _ in cells("guides/distill_trainer.md", "| `diver")
    }
    assert rows == {name: row.option.name if row.option else "" for name, row in DIVERGENCES.items()}
