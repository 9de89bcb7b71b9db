"""What a chain is said to take, beside what one takes; and how that is told."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from cbd_trl import DistillConfig
from cbd_trl.build.plan import ShapeSearch, plan_chain
from cbd_trl.build.shape_search import SCORED_TOKENS
from cbd_trl.recipe.check import Check, check_recipe, how_estimated, recipe_table
from cbd_trl.recipe.estimate import (
    Cost,
    Speed,
    anchor_cost,
    disk_needed,
    measure_speed,
    measuring_seconds,
    trained_tokens,
    writing_seconds,
)
from cbd_trl.recipe.run import build_checked
from cbd_trl.recipe.schema import parse_recipe
from cbd_trl.targets.many import multiplied_weights
from tests.chain.helpers import CHAIN_ANCHORS
from tests.recipe.helpers import ARGS, raw_recipe
from tests.surgery.helpers import described
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

SPEED = Speed(products=4e9, device="cpu", training=2e9, forward=2e9)
# What goes with the weights: config, tokenizer, card. Of a chain of any use it is nothing.
_BESIDE = 30_000


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cost(args: DistillConfig | None = None, speed: Speed = SPEED, **fields: int) -> Cost:
    """Of an anchor of half the layers, where nothing trains beside it."""
    upper = described(tiny_model("llama", num_hidden_layers=4))[1]
    args = args or _args()
    [step] = plan_chain(upper, [fields or {"num_hidden_layers": 2}], args, None)
    return anchor_cost(upper, step, 64, speed)


def _args(**changes: object) -> DistillConfig:
    return DistillConfig("unused", **{**ARGS, "swap_probability": 0.0, **changes})


def test_a_chain_takes_the_disk_that_was_told(inputs: Path, tmp_path: Path) -> None:
    """Twice as wide as the others' chain, so that its weights count beside the files of a few kB."""
    tiny_model(
        "llama", num_hidden_layers=4, hidden_size=192, intermediate_size=256, tie_word_embeddings=True
    ).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    anchors = [{"shape": {"num_hidden_layers": 2}}, {"shape": {"hidden_size": 96, "intermediate_size": 128}}]
    args = {**ARGS, "max_steps": 1}
    raw = raw_recipe(
        inputs,
        source=str(tmp_path / "source"),
        anchors=anchors,
        evaluation=None,
        output_dir=str(tmp_path / "chain"),
        args=args,
    )
    check = check_recipe(parse_recipe(raw, "some"))
    chain = build_checked(check)
    assert len(check.costs) == len(chain.anchors) == 3
    for cost, anchor in zip(check.costs, chain.anchors, strict=True):
        assert (cost.name, cost.architecture.num_parameters) == (anchor.name, anchor.num_parameters)
        weights = (anchor.path / "model.safetensors").stat().st_size
        assert weights == pytest.approx(4 * anchor.num_parameters, rel=0.05)
        assert cost.disk == pytest.approx(_size(anchor.path) - _BESIDE, rel=0.25, abs=_BESIDE)
    assert check.disk_needed == pytest.approx(_size(chain.path), rel=0.25)


def test_checkpoints_take_the_disk_that_was_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    # When a training has ended its checkpoints still stand.
    monkeypatch.setattr("cbd_trl.build.build.remove_work_folder", lambda *_: found.append(_checkpoints(tmp_path)))
    args = {**ARGS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    raw = raw_recipe(
        inputs, anchors=[{"shape": CHAIN_ANCHORS[0]}], evaluation=None, output_dir=str(tmp_path / "chain"), args=args
    )
    check = check_recipe(parse_recipe(raw, "some"))
    build_checked(check)
    head, anchor = check.costs
    assert head.checkpoints == 0 and anchor.checkpoints == 2 * 12 * anchor.architecture.num_parameters
    assert anchor.checkpoints == pytest.approx(found[-1], rel=0.25)


def _checkpoints(folder: Path) -> int:
    names = ("model.safetensors", "optimizer.pt")
    return sum(file.stat().st_size for file in folder.rglob("checkpoint-*/*") if file.name in names)


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 10}, 5),
        ({"save_steps": 0.4}, 3),
        # One is written before the other goes.
        ({"save_steps": 10, "save_total_limit": 1}, 2),
        ({"save_steps": 100, "save_total_limit": 1}, 1),
    ],
)
def test_how_many_checkpoints_there_are(changes: dict[str, object], copies: int) -> None:
    cost = _cost(_args(**{"max_steps": 50, "save_strategy": "steps", **changes}))
    assert cost.checkpoints == copies * 12 * cost.architecture.num_parameters


def test_the_disk_is_for_all_anchors_and_the_checkpoints_of_one() -> None:
    cost = _cost()
    costs = [dataclasses.replace(cost, disk=disk, checkpoints=more) for disk, more in ((5, 0), (3, 20), (1, 10))]
    assert disk_needed(costs) == 5 + 3 + 1 + 20
    assert disk_needed([]) == 0


def test_tokens_are_those_of_full_rows() -> None:
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_length": 16, "max_steps": 5}
    assert trained_tokens(_args(**args)) == 4 * 3 * 16 * 5
    by_epochs = _args(**{**args, "max_steps": -1})
    assert trained_tokens(by_epochs) is None
    assert _cost(by_epochs).seconds is None


def test_time_follows_the_measured_speed_and_the_tokens() -> None:
    twice = dataclasses.replace(SPEED, training=4e9, forward=4e9)
    seconds = _cost().seconds
    assert seconds and _cost(speed=twice).seconds == pytest.approx(seconds / 2)
    beside = seconds - (_cost(_args(max_steps=4)).seconds - seconds)
    assert _cost(_args(max_steps=200)).seconds == pytest.approx(100 * (seconds - beside) + beside)
    # Hybrids beside the steps are more work.
    assert _cost(_args(swap_probability=1.0)).seconds - beside > 1.3 * (seconds - beside)


@pytest.mark.parametrize(("depth", "blocks"), [(4, 0), (3, 2), (2, 3)])
def test_time_counts_the_choosing_and_refitting_of_layers(depth: int, blocks: int) -> None:
    """Nothing is trained: what is left are forward passes, of 64 tokens of calibration and of each block."""
    fields = {"num_hidden_layers": depth, "intermediate_size": 32}
    one, two = (_cost(_args(max_steps=steps), **fields) for steps in (1, 2))
    untrained = 2 * one.seconds - two.seconds  # type: ignore[operator]
    upper = described(tiny_model("llama", num_hidden_layers=4))[1]
    calibration = 1.2 * 64 * (multiplied_weights(upper) + multiplied_weights(one.architecture))
    chosen = blocks * upper.config.max_position_embeddings * multiplied_weights(upper)
    assert untrained == pytest.approx(2 * (calibration + chosen) / SPEED.forward)


def test_time_counts_the_shapes_of_a_search() -> None:
    """Each takes as long as an anchor does before its training, and is compared; the best are trained for a while."""
    upper, args = described(tiny_model("llama", num_hidden_layers=4))[1], _args(max_steps=8)

    def seconds(search: ShapeSearch | None) -> float:
        [step] = plan_chain(upper, [0.5], args, None, search=search)
        return anchor_cost(upper, step, 64, SPEED).seconds or 0.0

    plain, three, five, trained = map(
        seconds, (None, ShapeSearch(3), ShapeSearch(5), ShapeSearch(5, trainings=2, training_steps=4))
    )
    lower = plan_chain(upper, [0.5], args, None)[0].architecture
    assert three - plain >= 3 * 2 * multiplied_weights(lower) * SCORED_TOKENS / SPEED.forward
    assert (five - plain) / (three - plain) == pytest.approx(5 / 3)
    # Twice half of the training.
    training = anchor_cost(upper, plan_chain(upper, [0.5], _args(max_steps=16), None)[0], 64, SPEED).seconds - plain
    assert trained - five == pytest.approx(training, rel=0.3)


def test_measuring_and_writing_follow_the_weights_and_the_tokens() -> None:
    for seconds, forward_passes in ((measuring_seconds, 1), (writing_seconds, 6)):
        per_token = (seconds([1e6, 3e6], 101, SPEED) - seconds([1e6, 3e6], 1, SPEED)) / 100
        assert per_token == pytest.approx(forward_passes * 2 * 4e6 / SPEED.forward)


def test_the_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = measure_speed(_args(), 64)
    assert speed.device == "cpu" and speed.products > 1e8
    assert speed.training == speed.forward == 0.5 * speed.products
    now = iter(range(100))
    monkeypatch.setattr("cbd_trl.recipe.estimate.time.perf_counter", lambda: next(now))
    assert measure_speed(_args(), 64).products == 2 * 1024 * 64 * 64


def _shown(check: Check) -> str:
    out = io.StringIO()
    Console(width=160, file=out).print(recipe_table(check))
    return out.getvalue()


def test_the_table_of_a_dry_run(inputs: Path, tmp_path: Path) -> None:
    raw = raw_recipe(inputs, output_dir=str(tmp_path / "chain"))
    check = check_recipe(parse_recipe(raw, "mine"))
    shown = _shown(check)
    assert "What mine would build" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "6 layers, 32 wide" in lines["49K"] and "48.54k" in lines["49K"]
    assert "4 layers, 32 wide" in lines["33K"] and " 64 " in lines["33K"]
    assert "4 layers, 16 wide, 2/1 heads, ffn 24" in lines["8.8K"] and "about 0 s" in lines["8.8K"]
    assert " 128 " in lines["all"]
    assert check.measuring and "about" in lines["evaluation"]
    check.finished = 2
    lines = {line.split()[0]: line for line in _shown(check).splitlines() if line.strip()}
    assert lines["49K"].split()[-1] == lines["33K"].split()[-1] == "finished"
    assert " 64 " in lines["left"] and "all" not in lines
    assert "a matrix product does" in how_estimated(check)


def test_epochs_and_days_are_told() -> None:
    check = Check(parse_recipe(raw_recipe(Path("folder")), "mine"))
    cost = dataclasses.replace(_cost(), tokens=None, seconds=None, disk=3_210_000_000, checkpoints=12_000_000)
    check.costs = [cost]
    shown = _shown(check)
    assert "by epochs" in shown and "not known" in shown and "3.21 GB" in shown and "12 MB" in shown
    check.costs = [dataclasses.replace(cost, tokens=2_000_000_000, seconds=3 * 86400.0)]
    assert "2B" in _shown(check) and "about" in _shown(check)
    for products, told in ((4e9, "4"), (0.31e9, "0.31"), (60e12, "60,000")):
        check.speed = dataclasses.replace(SPEED, products=products)
        assert f"a matrix product does {told} GFLOP/s" in how_estimated(check)
    check.speed = dataclasses.replace(SPEED, device="cuda:0")
    assert "assumed and not compared with any run on such a device" in how_estimated(check)
