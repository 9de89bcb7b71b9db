"""Trainers, building and making models on a device that is as strict as CUDA, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.backend import available

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not available(), reason="this torch takes no backend written in Python")
@pytest.mark.parametrize(
    ("file", "which"),
    [
        pytest.param("runs.py", "slow or not slow", id="everything runs"),
        pytest.param("waits.py", "not slow", id="a step hardly waits"),
        pytest.param("waits.py", "slow", id="no step waits", marks=pytest.mark.slow),
    ],
)
def test_on_the_strict_device(file: str, which: str) -> None:
    """The device cannot be taken out of a process again, so each file has one to itself."""
    options = ["-n", "0", "-q", "-p", "no:cacheprovider", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, f"tests/device/{file}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
