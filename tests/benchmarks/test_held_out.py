"""Models of a benchmark are measured once on each text, whichever benchmark asks."""

import pytest
from datasets import Dataset

from benchmarks import held_out
from benchmarks.held_out import MEAN, HeldOut, eta, eta_on, loss_on, share_of_way
from benchmarks.merit import measure_pair, pairs_of
from benchmarks.real_text_chain import RealChain, measure
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.targets.request import Request, find_target
from cbd_trl.utils.files import Results
from tests.chain.helpers import chain_rows, random_chain


def _measured(size, *losses):
    return {"num_parameters": size, "loss": dict(zip("ab", losses, strict=False))}


def test_eta_by_hand() -> None:
    sizes = [0.25, 0.5, 0.75]
    assert eta(4.0, 2.0, [3.5, 3.0, 2.5], sizes) == pytest.approx(1.0)
    assert eta(4.0, 2.0, [4.0, 4.0, 4.0], sizes) == pytest.approx(0.0)
    # 0.25 of the way where 0.5 was due.
    assert eta(4.0, 2.0, [3.5], [0.5]) == pytest.approx(0.5)
    assert eta(4.0, 2.0, [4.5], [0.5]) == pytest.approx(-0.5)


def test_eta_needs_a_larger_anchor_that_is_better() -> None:
    with pytest.raises(ValueError, match=r"larger anchor's loss is 3.000 and the smaller one's 2.500.*better on"):
        eta(2.5, 3.0, [2.7], [0.5])


def test_eta_of_measurements_text_by_text() -> None:
    small, large, target = _measured(10, 4.0, 2.0), _measured(30, 2.0, 3.0), _measured(15, 3.5, 2.5)
    assert share_of_way(small, large, target) == 0.25
    assert eta_on("a", small, large, [target]) == pytest.approx(1.0)
    assert eta_on("b", small, large, [target]) is None
    # Means: 3 at 10, 2.5 at 30; on the line 2.875 at 15.
    assert loss_on(target, MEAN) == 3.0
    assert eta_on(MEAN, small, large, [target]) == pytest.approx(0.0)


def test_what_one_benchmark_measured_the_other_takes(tmp_path, monkeypatch) -> None:
    chain = random_chain(tmp_path / "chain")
    texts = {
        name: held_out_blocks(chain.tokenizer(), chain_rows(6, seed=seed), 16, 2) for seed, name in enumerate("ab")
    }
    upper, lower = chain.anchors
    shape = find_target(chain, Request((upper.num_parameters + lower.num_parameters) / 2, tolerance=0.5))
    fields, file = shape.architecture.shape, tmp_path / "results.json"
    reports = measure(chain, [fields], HeldOut({"a": texts["a"]}, Results(file)))

    seen, real = [], held_out.held_out_loss
    monkeypatch.setattr(held_out, "held_out_loss", lambda model, text: seen.append(text) or real(model, text))
    plan = RealChain("", [], {"both": [fields]})
    (name, pair), methods, none = *pairs_of(chain).items(), ["nested", "slice"], Dataset.from_dict({"input_ids": []})
    found = measure_pair(name, pair, HeldOut({"a": texts["a"]}, Results(file)), plan, methods, none)
    assert not seen
    assert found["small"]["loss"]["a"] == reports["a"]["anchors"][1]["loss"]
    assert found["targets"]["slice"][0]["loss"]["a"] == reports["a"]["targets"][0]["loss"]["slice"]

    # Another text is measured alone: two anchors and two targets.
    found = measure_pair(name, pair, HeldOut(texts, Results(file)), plan, methods, none)
    assert all(text is texts["b"] for text in seen) and len(seen) == 4
    assert set(found["targets"]["nested"][0]["loss"]) == {"a", "b"}
    # So is a whole other precision.
    measure_pair(name, pair, HeldOut({"a": texts["a"]}, Results(file), bf16=True), plan, ["nested"], none)
    assert len(seen) == 7
