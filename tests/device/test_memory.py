"""What the dry run says of memory, beside the bytes that the strict device counts; in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.backend import available

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not available(), reason="this torch takes no backend written in Python")


def _compared(group: str) -> dict[str, float]:
    """Case -> what is predicted of its training, over what is counted."""
    command = [sys.executable, "-m", "tests.device.memory", group]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
    return {name.strip(): int(told) / int(there) for name, phase, there, told in lines if phase.strip() == "train"}


@pytest.mark.parametrize(
    ("group", "cases"),
    [
        pytest.param("fast", 6, id="fast"),
        pytest.param("tuning", 10, id="tuning", marks=pytest.mark.slow),
        pytest.param("held-out", 8, id="held-out", marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_training_is_told_within_15_percent(group: str, cases: int) -> None:
    found = _compared(group)
    assert len(found) == cases
    assert {name: ratio for name, ratio in found.items() if not 0.85 <= ratio <= 1.15} == {}
