"""Shapes of an anchor by the score of a search and by their loss after training."""

import json

import pytest

from benchmarks import anchor_shapes, held_out
from benchmarks.anchor_shapes import compared_shapes, main, table
from tests.chain.helpers import chain_config, chain_rows
from tests.tiny import randomize, tiny_model
from tests.tokenizer import tiny_tokenizer


def test_what_is_compared() -> None:
    scores = [{"shape": {"n": number}, "score": score} for number, score in enumerate([4.0, 1.0, 5.0, 2.0, 3.0])]
    assert compared_shapes(scores, 2) == {
        "without a search": {"n": 0}, "chosen": {"n": 1}, "rank 2": {"n": 3}, "rank 5": {"n": 2},
    }  # fmt: skip
    assert list(compared_shapes(scores, 9)) == ["without a search", "chosen", "rank 2", "rank 3", "rank 5"]
    assert compared_shapes([{"shape": {"n": 0}, "score": 0.5}, *scores[1:]], 0) == {
        "without a search, and chosen": {"n": 0}
    }


def test_what_the_search_gained() -> None:
    row = {"shape": {}, "parameters": 1, "flops": 2, "tokens": 3, "losses": {"text": 0.0}}
    measured = [("without a search", 2.0, 3.0), ("chosen", 1.0, 2.5), ("rank 2", 1.5, 2.0)]
    rows = [{**row, "role": role, "score": score, "mean": mean} for role, score, mean in measured]
    assert "gained +0.500 nats" in table("1M", rows) and "shapes: 0.50" in table("1M", rows)


@pytest.mark.slow
def test_a_run_and_its_resumption(tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=6, hidden_size=64, intermediate_size=96)
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    for seed, name in enumerate(("train", "held_out")):
        rows = [json.dumps(row) for row in chain_rows(40, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    # Of rows that the source has positions for.
    monkeypatch.setattr(anchor_shapes, "arguments", lambda steps, *given: chain_config(max_steps=steps))
    flags = ["--source", tmp_path / "source", "--size", model.num_parameters() // 2, "--output", tmp_path / "out"]
    flags += ["--data", tmp_path / "train.jsonl", "--text", tmp_path / "held_out.jsonl", "--steps", 2, "--fp32"]
    flags += ["--shapes", 5, "--others", 1, "--blocks", 2, "--block-length", 16, "--calibration-tokens", 128]
    flags = [str(flag) for flag in [*flags, "--threads", 1]]
    main(flags)
    main([*flags, "--flops"])
    reports = {name: (tmp_path / f"out/report-{name}.md").read_text() for name in ("num_parameters", "flops")}
    for unit, report in zip(("parameters", "FLOPs a token"), reports.values(), strict=True):
        assert f"k {unit} |" in report and "The search gained" in report
        assert "without a search" in report and "chosen" in report and "| rank" in report
    monkeypatch.setattr(held_out, "held_out_loss", None)
    monkeypatch.setattr(anchor_shapes.HeldOut, "__call__", None)
    main(flags)
    assert (tmp_path / "out/report-num_parameters.md").read_text() == reports["num_parameters"]
