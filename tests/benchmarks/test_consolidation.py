"""The benchmark of a consolidation, on a tiny chain."""

import json
import sys

import pytest

from benchmarks.consolidation import BEFORE, CONSOLIDATED, PLAIN, main
from cbd_trl import Chain
from cbd_trl.chain.manifest import CONSOLIDATION
from tests.chain.helpers import random_chain


@pytest.mark.slow
def test_three_chains_are_compared_and_a_second_run_measures_nothing(tmp_path, monkeypatch, capsys):
    chain = random_chain(tmp_path / "chain")
    lines = [" ".join(f"w{(7 * i + j) % 54}" for j in range(90)) for i in range(60)]
    rows = [json.dumps({"question": line, "answer": "w1"}) for line in lines]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows))
    (tmp_path / "wikitext.txt").write_text("\n".join(lines))
    texts = ["--gsm8k", str(tmp_path / "gsm8k.jsonl"), "--wikitext", str(tmp_path / "wikitext.txt"), "--fp32"]
    flags = ["--chain", str(chain.path), *texts, "--output", str(tmp_path / "out"), "--steps", "3"]
    flags += ["--held-out-blocks", "2", "--batch-size", "1", "--threads", "1", "--shares", "0.3", "0.7"]
    monkeypatch.setattr(sys, "argv", ["consolidation", *flags])
    main()
    report = json.loads((tmp_path / "out" / "consolidation.json").read_text())
    (pair,) = report.values()
    assert pair.keys() == {BEFORE, CONSOLIDATED, PLAIN} and "anchor large" in capsys.readouterr().out
    losses = [[target["loss"]["GSM8K"] for target in row["targets"]] for row in pair.values()]
    assert len({tuple(each) for each in losses}) == 3 and {len(each) for each in losses} == {2}
    # The source is the same one; the lower anchor is trained in two ways.
    assert len({row["anchors"][0]["loss"]["GSM8K"] for row in pair.values()}) == 1
    assert len({row["anchors"][1]["loss"]["GSM8K"] for row in pair.values()}) == 3
    (run,) = Chain.from_pretrained(tmp_path / "out" / "plain").anchors[1].training[CONSOLIDATION]
    assert run["arguments"]["values"]["max_steps"] == 3
    main()
    assert "anchor large" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "consolidation.json").read_text()) == report
