"""The benchmark for GPUs, at toy size: its rows, going on after an end, and what goes wrong in one of them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import SECTIONS, SIZES, TOY, Sizes

QUICK = ["--toy", "--steps", "1", "--warm-up", "1"]


def rows_of(file: Path) -> dict[str, dict]:
    """The rows that were kept: {"section: name": row}."""
    (rows,) = json.loads(file.with_suffix(".json").read_text()).values()
    return rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The table of a whole run."""
    file = tmp_path_factory.mktemp("gpu") / "table.md"
    gpu.main([*QUICK, "--output", str(file)])
    return file


def test_every_section_is_measured(measured):
    rows = rows_of(measured)
    assert not [row for row in rows.values() if row.get("failed")]
    assert {row["section"] for row in rows.values()} == set(SECTIONS)
    assert all(row["seconds"] > 0 and row["host_bytes"] > 0 for row in rows.values())
    assert {name for name, row in rows.items() if row.get("tokens_per_second")} == {
        *(f"trainers: {name}" for name in gpu.CONTESTANTS),
        "build: depth step: train",
        "build: width step: train",
    }
    phases = {phase for functions in gpu.PHASES.values() for phase in functions.values()}
    assert {name.split(": ")[-1] for name in rows if name.startswith("build: ") and name.count(": ") == 2} == phases
    text = measured.read_text()
    assert all(f"| {row['section']} | {row['name']} |" in text for row in rows.values())
    assert "times the speed of bound" in text and "times the speed of trl-gkd" in text


MEASURED = {
    "seconds_per_step": 0.5,
    "tokens_per_second": 10.0,
    "peak_bytes": 4,
    "above_bytes": 2,
    "attention": "sdpa",
}


def test_a_second_run_measures_what_is_missing(measured, tmp_path, monkeypatch):
    file = tmp_path / "table.md"
    kept = json.loads(measured.with_suffix(".json").read_text())
    (rows,) = kept.values()
    before = rows.pop("trainers: bound")
    file.with_suffix(".json").write_text(json.dumps(kept))
    monkeypatch.setitem(gpu.CONTESTANTS, "bound", (lambda *_: MEASURED, (1,)))
    gpu.main([*QUICK, "--output", str(file)])
    assert rows_of(file) == {**rows, "trainers: bound": {**before, **rows_of(file)["trainers: bound"]}}
    assert rows_of(file)["trainers: bound"]["seconds"] == MEASURED["seconds_per_step"]


def fits_in(passes):
    """A contestant that runs out of memory unless a step is split in so many."""

    def train(bench, work, split):
        if split < passes:
            raise torch.OutOfMemoryError("no room")
        return MEASURED

    return train


def lacks_a_package(*_):
    raise ModuleNotFoundError("No module named 'kernels'")


def test_a_row_says_what_went_wrong_and_the_others_go_on(tmp_path, monkeypatch):
    contestants = {
        "never": (fits_in(5), (1, 2)),
        "package": (lacks_a_package, (1,)),
        "split": (fits_in(3), (1, 2, 3, 6)),
    }
    monkeypatch.setattr(gpu, "CONTESTANTS", contestants)
    file = tmp_path / "table.md"
    gpu.main([*QUICK, "--sections", "trainers", "--output", str(file)])
    remarks = {row["name"]: row["remarks"] for row in rows_of(file).values()}
    assert remarks == {
        "never": "out of memory",
        "package": "ModuleNotFoundError: No module named 'kernels'",
        "split": "a step in 3 forward passes",
    }
    # What failed is tried again.
    monkeypatch.setitem(contestants, "never", (fits_in(1), (1, 2)))
    gpu.main([*QUICK, "--sections", "trainers", "--output", str(file)])
    assert rows_of(file)["trainers: never"]["seconds"] == MEASURED["seconds_per_step"]


def test_nothing_begins_after_the_minutes(tmp_path):
    file = tmp_path / "table.md"
    gpu.main([*QUICK, "--minutes", "0", "--output", str(file)])
    rows = rows_of(file)
    assert {row["section"] for row in rows.values()} == set(SECTIONS)
    assert all("0 minutes were over" in row["remarks"] for row in rows.values())


@pytest.mark.parametrize("sizes", [*SIZES, TOY])
def test_sizes_can_be_built(sizes: Sizes):
    """A chain can have the anchors, and a model can lie between those of the large one."""
    upper, target, lower = sizes.large
    assert upper[0] == target[0] == lower[0]
    assert all(one > two > three for one, two, three in zip(upper[1:], target[1:], lower[1:], strict=True))
    assert sizes.depth < sizes.source[0]
    assert all(narrow < wide for narrow, wide in zip(sizes.narrow, sizes.source[1:], strict=True))


def test_a_section_that_there_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([*QUICK, "--sections", "trainers,builds", "--output", str(tmp_path / "table.md")])
    assert "--sections names builds" in capsys.readouterr().err
