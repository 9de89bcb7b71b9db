"""The shapes of a size with their losses and scores."""

import json

import pytest

from benchmarks import held_out, shapes
from benchmarks.shapes import main, summary
from tests.chain.helpers import chain_rows, random_chain


def test_what_a_score_gains_over_the_line() -> None:
    rows = [{"mean": 3.0, "energy": 0.5, "kl": 2.0}, {"mean": 2.0, "energy": 0.6, "kl": 1.0}]
    found = summary(rows)
    assert {name: of["gained"] for name, of in found.items()} == {"best": 1.0, "energy": 0.0, "kl": 1.0}
    assert (found["energy"]["correlation"], found["kl"]["correlation"]) == pytest.approx((-1.0, 1.0))


def test_a_run_and_its_resumption(tmp_path, capsys, monkeypatch) -> None:
    chain = random_chain(tmp_path / "chain")
    for seed, name in enumerate(("held_out", "calibration")):
        rows = [json.dumps(row) for row in chain_rows(6, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    size = sum(anchor.num_parameters for anchor in chain.anchors) // 2
    flags = ["--chain", chain.path, "--sizes", size, chain.source.num_parameters, "--output", tmp_path / "out"]
    flags += ["--text", tmp_path / "held_out.jsonl", "--calibration", tmp_path / "calibration.jsonl"]
    flags += ["--shapes", 3, "--blocks", 2, "--block-length", 16, "--threads", 1]
    main([str(flag) for flag in flags])
    report = (tmp_path / "out" / "report.md").read_text()
    # An anchor has no other shapes.
    assert report.count("(line)") == 1 and report.count("rank correlation") == 3
    assert len([line for line in report.splitlines() if line.startswith("|")]) == 2 + 3

    def nothing(*args, **options):
        raise AssertionError("measured already")

    monkeypatch.setattr(held_out, "held_out_loss", nothing)
    monkeypatch.setattr(shapes, "score_on_text", nothing)
    main([str(flag) for flag in flags])
    assert (tmp_path / "out" / "report.md").read_text() == report
