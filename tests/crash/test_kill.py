"""Killed anywhere, the same build goes on: nothing finished is made again, and the chain is the unbroken one's."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbd_trl import Chain
from tests.crash.builds import (
    PHASES,
    SAVE_STEPS,
    STEPS,
    Kill,
    build_and_die,
    contents,
    count_calls,
    fingerprints,
    forked,
    take_journal,
)

# How many of the thirty points lie in which part of the work.
POINTS = {"cutting": 6, "training": 6, "saving": 8, "manifest": 4, "clearing": 2, "anywhere": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an unbroken run writes."""
    folder = tmp_path_factory.mktemp("whole") / "chain"
    assert forked(build_and_die, folder) == 0
    return contents(folder)


def killed_and_resumed(folder: Path, kill: Kill, whole: dict[str, Any]) -> str:
    """Kill a build, run it again, and check what both did.

    Returns:
        what was there when it died, and what was left to do.
    """
    assert forked(build_and_die, folder, kill) == -signal.SIGKILL
    done = take_journal(folder)
    finished = [a.name for a in Chain.from_pretrained(folder).anchors] if (folder / "chain.json").exists() else []
    before = {name: fingerprints(folder / name) for name in finished}

    assert forked(build_and_die, folder) == 0
    again = take_journal(folder)
    assert {name: fingerprints(folder / name) for name in finished} == before
    assert not again.keys() & set(finished)
    for name, told in done.items():
        if name in finished:
            continue
        repeated = again.get(name, {"step": []})["step"]
        start = STEPS - len(repeated)
        assert repeated == list(range(start, STEPS))
        # The process may have died between the end of a checkpoint and the line about it.
        saved = max(told["saved"], default=0)
        assert saved <= start <= min(saved + SAVE_STEPS, len(told["step"]))
    # Every bit of weights and statistics, tokenizer and chain.json, and nothing besides.
    assert contents(folder) == whole and not list(folder.rglob(".*"))
    steps = {name: len(told["step"]) for name, told in done.items()}
    left = {name: len(told["step"]) for name, told in again.items()}
    return f"finished: {', '.join(finished) or 'none'}; steps taken: {steps}; by the second run: {left}"


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(Kill("end of a checkpoint", 1, entry=2), id="checkpoint-4-half-written"),
        pytest.param(Kill("training", 100, entry=2 * STEPS - 2), id="in-a-step-of-the-second-anchor"),
        pytest.param(Kill("manifest", 1, entry=4), id="before-the-folder-gets-its-name"),
    ],
)
def test_a_killed_build_goes_on(kill: Kill, tmp_path: Path, whole: dict[str, Any]) -> None:
    killed_and_resumed(tmp_path / "chain", kill, whole)


def random_points(counts: dict[str, int]) -> Iterator[Kill]:
    draw = random.Random(0)
    for phase, number in POINTS.items():
        for call in sorted(draw.randint(1, counts[phase]) for _ in range(number)):
            yield Kill(phase, call)


@pytest.mark.slow
def test_thirty_random_points(tmp_path: Path, whole: dict[str, Any]) -> None:
    assert sum(POINTS.values()) == 30 and POINTS.keys() <= PHASES.keys()
    assert forked(count_calls, tmp_path / "counted", list(POINTS)) == 0
    counts = {phase: int((tmp_path / f"{phase}.calls").read_text()) for phase in POINTS}
    for number, kill in enumerate(random_points(counts), start=1):
        # Cards name the folder: it is called as that of the unbroken run.
        (tmp_path / str(number)).mkdir()
        outcome = killed_and_resumed(tmp_path / str(number) / "chain", kill, whole)
        print(f"{number} | {kill.phase} | {kill.call} of {counts[kill.phase]} | {outcome}")
