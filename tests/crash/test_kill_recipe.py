"""`cbd-trl build recipe.yaml`, killed where a recipe does what a build does not: remembering, measuring, drawing."""

import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cbd_trl.chain.measurements import MEASURED
from cbd_trl.cli.main import main
from cbd_trl.recipe.run import RESULTS
from tests.chain.helpers import CHAIN_ANCHORS
from tests.crash.builds import contents, forked
from tests.recipe.helpers import write_inputs, write_recipe

ANCHORS = 3
# They say how long a model took to make, too.
TIMED = (MEASURED, RESULTS, "README.md")


def run(recipe: Path, die_in: str | None = None, call: int = 1, counted: Path | None = None) -> None:
    """The command, in a process that is there for nothing else.

    Args:
        recipe: the file.
        die_in: module and function, which kills the process at the so manieth call; None to live.
        call: from 1.
        counted: where a line is written for every measurement.
    """
    os.chdir(recipe.parent)
    calls = 0

    def watch(place: str, done: Any) -> None:
        module, name = place.rsplit(".", 1)
        owner = importlib.import_module(module)
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            done()
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    def die() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def count() -> None:
        if counted is not None:
            with counted.open("a") as file:
                file.write("measured\n")

    if die_in is not None:
        watch(die_in, die)
    watch("cbd_trl.recipe.run.held_out_loss", count)
    assert main(["build", recipe.name]) == 0


def recipe_in(folder: Path) -> Path:
    """Of three anchors and a target, all paths relative, so that two folders hold the same."""
    folder.mkdir()
    write_inputs(folder)
    evaluation = {"data": "held.jsonl", "tokens": 64, "length": 16, "sizes": [20_000]}
    places = {"source": "source", "data": "rows.jsonl", "output_dir": "chain", "evaluation": evaluation}
    anchors = [{"shape": dict(shape)} for shape in CHAIN_ANCHORS]
    return write_recipe(folder, anchors=anchors, **places)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an unbroken run writes."""
    recipe = recipe_in(tmp_path_factory.mktemp("whole") / "recipe")
    assert forked(run, recipe) == 0
    return contents(recipe.parent / "chain")


@pytest.mark.parametrize(
    ("die_in", "call", "measured"),
    [
        ("cbd_trl.recipe.check.write_text", 1, ANCHORS + 1),
        ("cbd_trl.recipe.run.held_out_loss", 3, ANCHORS + 1 - 2),
        ("cbd_trl.recipe.run.save_measurements", 1, 0),
    ],
)
def test_a_killed_recipe_goes_on(die_in: str, call: int, measured: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    recipe = recipe_in(tmp_path / "recipe")
    assert forked(run, recipe, die_in, call) == -signal.SIGKILL
    chain, counted = recipe.parent / "chain", tmp_path / "counted"
    finished = json.loads((chain / "chain.json").read_text())["anchors"] if (chain / "chain.json").exists() else []
    before = {file: file.stat().st_mtime_ns for file in chain.rglob("model.safetensors")}
    assert len(before) == len(finished) == (0 if "write_text" in die_in else ANCHORS)
    assert forked(run, recipe, None, 1, counted) == 0
    # Nothing that was finished is made or measured again.
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (counted.read_text().count("measured") if counted.exists() else 0) == measured
    found = contents(chain)
    assert found.keys() == whole.keys()
    assert [name for name in found if name not in TIMED and found[name] != whole[name]] == []
    losses, expected = (json.loads(files[MEASURED]) for files in (found, whole))
    assert _untimed(losses) == _untimed(expected) and len(losses["anchors"]) + len(losses["targets"]) == ANCHORS + 1


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(each) for key, each in value.items() if not key.startswith("seconds")}
    return [_untimed(each) for each in value] if isinstance(value, list) else value
