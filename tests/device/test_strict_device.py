"""Trainers, building and making models on a device that is as strict as CUDA, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.backend import available

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not available(), reason="this torch takes no backend written in Python")
def test_everything_runs_on_the_strict_device() -> None:
    """The device cannot be taken out of a process again, so `runs.py` has one to itself."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/device/runs.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
