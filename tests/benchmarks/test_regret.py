"""Models made on their own beside those of a chain: the same start, resumable, trained once."""

import shutil
from typing import Any

import pytest
import torch

from benchmarks import regret
from benchmarks.held_out import MEAN, HeldOut
from benchmarks.merit import pairs_of
from benchmarks.real_text_chain import RealChain, arguments
from benchmarks.regret import (
    Regret,
    _own_run,
    chosen_sizes,
    mean_regret,
    measure_chains,
    own_arguments,
    plot,
    regret_on,
    table,
)
from cbd_trl import Chain, build_chain
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.utils.files import Results
from tests.chain.helpers import CHAIN_ANCHORS, chain_source
from tests.tokenizer import tiny_tokenizer
from tests.training import text_rows

DATA = text_rows([40] * 60)
PLAN = RealChain("", [], {"both": [{"num_hidden_layers": 5, **CHAIN_ANCHORS[1]}, {"num_hidden_layers": 5}]})


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    """Of two anchors, the lower one trained for 3 steps without hybrids."""
    return build_chain(
        chain_source(),
        [{**CHAIN_ANCHORS[0], **CHAIN_ANCHORS[1]}],
        dataset=DATA,
        output_dir=tmp_path_factory.mktemp("chain"),
        args=arguments(3, 1e-3, 0.0, 5, False, 1),
        processing_class=tiny_tokenizer(),
    )


def _regret(folder, recovery: int = 0) -> Regret:
    results = Results(folder / "results.json")
    blocks = {
        name: held_out_blocks(tiny_tokenizer(), text_rows([9] * 8, seed=seed), 16, 2)
        for seed, name in ((1, "a"), (2, "b"))
    }
    return Regret(HeldOut(blocks, results), HeldOut({"a": blocks["a"]}, results), folder / "own", 2, recovery)


def test_an_own_run_of_the_anchors_shape_is_the_anchor(chain, tmp_path) -> None:
    lower, measures = chain.anchors[1], _regret(tmp_path)
    run = _own_run(chain, lower.shape, DATA, 1.0)
    made = measures._model("", run).state_dict()
    expected = lower.load_model().state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert [point["tokens"] for point in measures._curve(run)] == [0, 2 * 256, 3 * 256]


@pytest.mark.slow
def test_a_run_goes_on_at_its_checkpoint(chain, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(regret, "arguments", lambda *args: _saving(arguments(*args)))
    whole, broken = _regret(tmp_path / "whole"), _regret(tmp_path / "broken")
    run = _own_run(chain, {**chain.anchors[0].shape, **PLAN.targets["both"][0]}, DATA, 2.0)
    expected = whole._model("", run).state_dict()

    class Killed(Exception):
        pass

    held_out, seen = broken.held_out, []

    def once(model: Any) -> dict[str, float]:
        seen.append(model)
        if len(seen) == 2:
            raise Killed
        return HeldOut.__call__(held_out, model)

    broken.held_out = once  # type: ignore[assignment]
    broken.held_out.results = held_out.results
    broken.held_out.texts = held_out.texts
    with pytest.raises(Killed):
        broken._model("", run)
    broken.held_out = held_out
    assert all(torch.equal(tensor, expected[name]) for name, tensor in broken._model("", run).state_dict().items())
    assert broken._curve(run) == whole._curve(run)


def _saving(args: Any) -> Any:
    args.save_steps = 1
    return args


@pytest.mark.slow
def test_a_report_and_its_resumption(chain, tmp_path, monkeypatch) -> None:
    chains, texts = [chain], ["a", "b"]
    rows = measure_chains(_regret(tmp_path, 256), chains, PLAN, lambda seed: DATA, ["both"], of_anchor=True)
    assert [row["anchor"] for row in rows] == [False, False, True]
    middle, second, anchor = rows
    assert regret_on(anchor, MEAN) == 0
    assert regret_on(middle, "a") == middle["target"]["loss"]["a"] - middle["own"]["loss"]["a"] != 0
    assert mean_regret(rows) == {"both": pytest.approx((regret_on(middle, MEAN) + regret_on(second, MEAN)) / 2)}
    report = table(rows, texts)
    assert report.count("\n| both | 5 |") == 3
    plot(rows, tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 5_000

    # The rates that were not chosen leave no weights, nothing is trained again, and another chain takes the choice.
    assert len(list((tmp_path / "own").glob("*/model"))) == 3
    monkeypatch.setattr(regret, "own_trainer", None)
    again = _regret(tmp_path, 256)
    found = measure_chains(again, [chain, chain], PLAN, lambda seed: DATA, ["both"], of_anchor=False)
    assert table(found[:2], texts) == table(rows[:2], texts)
    assert len(found) == 3 and found[2]["target"] == middle["target"]

    # A chain with another upper anchor is compared with the same models, if they are made from the first.
    other = Chain.from_pretrained(chain.path)
    files = {**other.anchors[0].files, "generation_config.json": "0" * 64}
    other.anchors = [other.anchors[0].model_copy(update={"files": files}), other.anchors[1]]
    found = measure_chains(again, [other], PLAN, lambda seed: DATA, ["both"], of_anchor=False, own_from=[chain])
    assert found[0]["own"] == middle["own"]
    with pytest.raises(TypeError):  # it would be trained
        measure_chains(again, [other], PLAN, lambda seed: DATA, ["both"], of_anchor=False)
    shutil.rmtree(tmp_path / "own")
    assert len(measure_chains(again, chains, PLAN, lambda seed: DATA, ["both"], of_anchor=False)) == 1


def _row(target: float, own: float, **more: Any) -> dict[str, Any]:
    """Losses on "a"; on "b" the larger anchor is not better, and all are 1 less there."""

    def measured(size: int, loss: float) -> dict[str, Any]:
        return {"num_parameters": size, "loss": {"a": loss, "b": loss - 1}}

    ends = {"small": measured(100, 4.0), "large": {"num_parameters": 300, "loss": {"a": 2.0, "b": 3.0}}}
    row = {"kind": "width", "seed": 3, "rate": 1e-3, "anchor": False, **ends}
    return {**row, "target": measured(150, target), "own": measured(150, own), **more}


def test_the_table_and_its_means() -> None:
    rows = [_row(3.5, 3.25), _row(3.5, 4.0), _row(4.0, 3.0, anchor=True)]
    lines = table(rows, ["a", "b"]).splitlines()
    # Means of the texts: 3.5 and 2.5 at the ends, 3 a quarter of the way up.
    assert (
        lines[2]
        == "| width | 3 | 150 | 0.25 | 0.001 | 3.500 / 2.500 | 3.250 / 2.250 | +0.250 | (+0.250) | +0.250 |  | 2.00 |"
    )
    assert lines[3].endswith("| -0.500 | (-0.500) | -0.500 |  | 2.00 |")
    assert lines[4].endswith("| +1.000 | (+1.000) | +1.000 |  |  |")
    assert lines[-1] == "mean regret in width: -0.125"


def test_sizes_nearest_to_the_middle(chain) -> None:
    [pair] = pairs_of(chain).values()
    assert chosen_sizes(pair, PLAN.targets["both"], 1) == [PLAN.targets["both"][1]]


def test_the_arguments_are_the_anchors_but_rate_and_hybrids(chain, monkeypatch) -> None:
    lower = chain.anchors[1]
    args = own_arguments(lower, 0.5)
    assert (args.learning_rate, args.swap_probability, args.max_steps) == (5e-4, 0.0, 3)
    monkeypatch.setitem(lower.arguments, "adam_beta2", 0.5)
    with pytest.raises(ValueError, match=r"trained with other adam_beta2 than benchmarks.real_text_chain"):
        own_arguments(lower, 0.5)
