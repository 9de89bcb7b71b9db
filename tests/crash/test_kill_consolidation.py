"""Killed anywhere, the same consolidation goes on to the chain of an unbroken run."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cbd_trl.build.consolidate as module
import cbd_trl.build.store as store_module
from cbd_trl import consolidate_chain
from cbd_trl.build.consolidate import ConsolidationTrainer
from tests.chain.helpers import chain_config, chain_rows
from tests.crash.builds import contents, forked

# A place: the function in which the process dies, and at which of its calls.
PLACES = {
    "in a step": (ConsolidationTrainer, "training_step", 4),
    "while a checkpoint is saved": (ConsolidationTrainer, "_save_rng_state", 2),
    "before the source is copied": (module, "write_anchor", 1),
    "before the second anchor is written": (store_module, "write_anchor", 1),
    "before the last anchor is written": (store_module, "write_anchor", 2),
    "at the end": (module, "remove_work_folder", 1),
}


def consolidate(source: Path, folder: Path, place: str | None = None) -> None:
    if place is not None:
        owner, name, last = PLACES[place]
        setattr(owner, name, _killed(getattr(owner, name), last))
    args = chain_config(max_steps=5, save_steps=2, learning_rate=1e-3)
    consolidate_chain(source, chain_rows(), output_dir=folder, args=args, calibration_tokens=256)


def _killed(function: Callable, last: int) -> Callable:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
def test_a_killed_consolidation_goes_on(chain_folder: Path, tmp_path: Path) -> None:
    assert forked(consolidate, chain_folder, tmp_path / "whole" / "chain") == 0
    whole = contents(tmp_path / "whole" / "chain")
    for number, place in enumerate(PLACES):
        # Cards name the folder: it is called as that of the unbroken run.
        folder = tmp_path / str(number) / "chain"
        assert forked(consolidate, chain_folder, folder, place) == -signal.SIGKILL, place
        assert forked(consolidate, chain_folder, folder) == 0, place
        assert contents(folder) == whole and not list(folder.rglob(".*")), place
