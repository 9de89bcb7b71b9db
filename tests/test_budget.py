"""The table of times that ends a run: what is summed, what is marked, and that every folder is in it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.budget import ALL, BUDGET, budget_table, group_of, pytest_terminal_summary


def test_every_folder_of_tests_has_a_budget_and_all_fit():
    folders = {group_of(f"tests/{file.relative_to(Path(__file__).parent)}") for file in _test_files()}
    assert folders <= BUDGET.keys(), f"no budget in tests/budget.py: {sorted(folders - BUDGET.keys())}"
    assert sum(BUDGET.values()) <= ALL


def _test_files():
    return Path(__file__).parent.rglob("test_*.py")


@pytest.mark.parametrize(
    ("node", "group"),
    [
        ("tests/cli/test_main.py::test_help", "tests"),
        ("tests/build/test_build.py::test_it[tests/x]", "chain"),
        ("tests/chain/deeper/test_build.py::test_it", "chain"),
    ],
)
def test_a_group_is_a_folder(node, group):
    assert group_of(node) == group


def test_the_table_marks_what_is_over_and_what_has_no_budget():
    _, *rows, total = budget_table({"docs": 1.0, "losses": BUDGET["losses"] + 0.5, "new": ALL}, dict.fromkeys(
        ("docs", "losses", "new"), 2
    ))  # fmt: skip
    assert [row.split()[0] for row in rows] == ["new", "losses", "docs"]
    assert "no budget" in rows[0] and rows[1].endswith("over") and rows[2].endswith(f" {BUDGET['docs']}")
    assert total.split() == ["all", "6", f"{ALL + BUDGET['losses'] + 1.5:.1f}", str(ALL), "over"]


def test_the_summary_counts_set_up_and_end_but_a_test_once():
    def reports(node, *durations):
        parts = zip(("setup", "call", "teardown"), durations, strict=False)
        return [pytest.TestReport(node, ("", 0, ""), {}, "passed", None, part, (), took) for part, took in parts]

    lines = []
    reporter = SimpleNamespace(section=lines.append, line=lines.append)
    reporter.stats = {"": reports("tests/docs/test_a.py::a", 1.0, 2.0, 4.0), "warnings": [object()]}
    pytest_terminal_summary(reporter)
    assert lines == []
    reporter.stats["passed"] = reports("tests/test_b.py::b", 0.5, 0.25)
    pytest_terminal_summary(reporter)
    assert [line.split()[:3] for line in lines[2:]] == [
        ["docs", "1", "7.0"],
        ["tests", "1", "0.8"],
        ["all", "2", "7.8"],
    ]
