"""Trainers, building and making models on a device that is as strict as CUDA, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.backend import available

ROOT = Path(__file__).parents[2]


# Caches are written on the CPU before there is a second device: by waits.py, which is the first.
FILES = [f"tests/device/{name}.py" for name in ("waits", "memory", "runs")]


@pytest.mark.skipif(not available(), reason="this torch takes no backend written in Python")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_the_strict_device(which: str) -> None:
    """The device cannot be taken out of a process again, so these files have one to themselves."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-m", which, *FILES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
