"""What each folder of tests may take: `make test` ends with a table of it. A slow machine fails nothing."""

from collections import Counter
from collections.abc import Mapping

import pytest

# Seconds of tests, those marked slow left out, summed over the two processes that two cores run: half of it by the
# clock, so that all of CI, `make check` included, ends within 20 minutes.
ALL = 2000
BUDGET = {
    "tests": 40,
    "architectures": 10,
    "benchmarks": 10,
    "bridge": 40,
    "cache": 15,
    "cards": 20,
    "chain": 650,
    "crash": 60,
    "demo": 25,
    "docs": 80,
    "examples": 90,
    "generation": 20,
    "hostile": 30,
    "losses": 10,
    "recipe": 40,
    "report": 60,
    "surgery": 170,
    "teachers": 5,
    "trainers": 550,
    "utils": 30,
}


def group_of(node: str) -> str:
    """The folder of a test below tests/; "tests" itself for a test beside the folders.

    Args:
        node: id of the test, such as `tests/build/test_build.py::test_it`.
    """
    parts = node.split("::")[0].split("/")
    return parts[-2] if len(parts) < 3 else parts[1]


def budget_table(seconds: Mapping[str, float], tests: Mapping[str, int]) -> list[str]:
    """What the groups took beside what they may take, the slowest first.

    Args:
        seconds: by group.
        tests: how many, by group.

    Returns:
        the lines of a table; a group above its budget, or without one, is marked.
    """
    lines = [f"{'tests in':<14}{'tests':>7}{'seconds':>9}{'budget':>8}"]
    for group, took in sorted(seconds.items(), key=lambda item: -item[1]):
        budget = BUDGET.get(group)
        mark = "  no budget: give it one in tests/budget.py" if budget is None else "  over" * (took > budget)
        lines.append(f"{group:<14}{tests[group]:>7}{took:>9.1f}{budget or '-':>8}{mark}")
    total = sum(seconds.values())
    return [*lines, f"{'all':<14}{sum(tests.values()):>7}{total:>9.1f}{ALL:>8}{'  over' * (total > ALL)}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table behind a run of more than one group.

    Args:
        terminalreporter: knows every test that was run, with the time of its set-up, its call and its end.
    """
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[group_of(report.nodeid)] += report.duration  # type: ignore[assignment]
                tests[group_of(report.nodeid)] += report.when == "call"
    if len(seconds) > 1:
        terminalreporter.section("time by group")
        for line in budget_table(seconds, tests):
            terminalreporter.line(line)
