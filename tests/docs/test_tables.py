"""The tables of the documentation have a row for every family and every divergence."""

import importlib.util
import re
from types import ModuleType

import pytest

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


@pytest.fixture
def families() -> ModuleType:
    """The script that writes the table of all families of transformers."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_all_families_is_that_of_today(families: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / "families.md").read_text()
    assert families.page_with_table(page) == page, "run: python docs/families.py"


def test_no_family_goes_without_a_row_and_no_supported_one_has_a_reason(families, monkeypatch) -> None:
    monkeypatch.setitem(families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama_of_tomorrow", "LlamaForCausalLM")
    with pytest.raises(ValueError, match="without a row: llama_of_tomorrow"):
        families.families_table()
    monkeypatch.setitem(families.WHY_NOT, "of tomorrow", "llama_of_tomorrow qwen3")
    with pytest.raises(ValueError, match="In two rows: qwen3"):
        families.families_table()


def test_every_family_of_llama_cpp_is_in_the_page_on_export() -> None:
    (row,) = [row for row in cells("guides/export.md", "| what | for |") if "table of tensor names" in row[0]]
    assert sorted(named(row[1])) == sorted(family for family, of in ROWS.items() if of.gguf is not None)


def test_every_divergence_has_its_row_and_its_option() -> None:
    rows = {
        name.strip("`"): option.strip("`") for name, _, option, _ in cells("guides/distill_trainer.md", "| `diver")
    }
    assert rows == {name: row.option.name if row.option else "" for name, row in DIVERGENCES.items()}
