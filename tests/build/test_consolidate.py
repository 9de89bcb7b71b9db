"""Consolidation: a chain whose anchors are trained together, for the sizes between them."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from datasets import Dataset

from cbd_trl import BridgeDistillConfig, Chain, consolidate_chain, from_chain
from cbd_trl.build.consolidate import OWN_SHARE, SHAPES, ConsolidationTrainer, shapes_between
from cbd_trl.build.width_hybrid import MixedModel, parameters_of
from cbd_trl.chain.manifest import CONSOLIDATION
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import Plan
from cbd_trl.targets.request import open_pair
from cbd_trl.utils.blocks import calibration_length, token_blocks
from tests.chain.helpers import (
    assert_statistics_of,
    chain_config,
    chain_rows,
    random_chain,
    same_weights,
)
from tests.tokenizer import tiny_tokenizer
from tests.trainers.dense import dense_terms, gradients
from tests.training import assert_same_gradient, make_config, one_step, text_rows

STEPS, SAVE_STEPS = 5, 2


def consolidate(chain, folder, **options):
    args = chain_config(max_steps=STEPS, save_steps=SAVE_STEPS, learning_rate=1e-3, seed=1)
    given = {"args": args, "eval_dataset": chain_rows(4, seed=9), "calibration_tokens": 256, **options}
    return consolidate_chain(chain, given.pop("dataset", chain_rows()), output_dir=folder, **given)


@pytest.fixture(scope="module")
def consolidated(chain_folder, tmp_path_factory):
    return consolidate(chain_folder, tmp_path_factory.mktemp("consolidated") / "chain")


def trainer_of(chain, **overrides):
    pairs, args = [load_pair(*anchors) for anchors in pairwise(chain.anchors)], make_config(**overrides)
    return ConsolidationTrainer(
        [anchor.load_model() for anchor in chain.anchors],
        pairs,
        [shapes_between(pair, args.seed) for pair in pairs],
        args=args,
        train_dataset=text_rows(),
        processing_class=tiny_tokenizer(),
    )


def test_the_source_stays_and_every_other_anchor_is_trained(chain, consolidated):
    assert [anchor.name for anchor in consolidated.anchors] == [anchor.name for anchor in chain.anchors]
    assert consolidated.source.files == chain.source.files
    text = token_blocks(
        chain_rows(), chain.tokenizer(), 256, calibration_length(chain.source.config()), chain_config()
    )
    for before, after in zip(chain.anchors[1:], consolidated.anchors[1:], strict=True):
        assert after.shape == before.shape and after.blocks == before.blocks
        assert not same_weights(after.load_state_dict(), before.load_state_dict())
        assert_statistics_of(after, text.input_ids)
        assert after.losses.keys() == {"eval_loss", "eval_kd", "eval_ce", "eval_teacher_ce"}
        assert after.losses != before.losses and after.arguments == before.arguments
        (record,) = after.training[CONSOLIDATION]
        assert record["chain"]["checksum"] == chain.checksum and record["tokens_seen"] > 0
        assert record["arguments"]["values"]["max_steps"] == STEPS
        assert "consolidated" in (after.path / "README.md").read_text()
    assert consolidated.anchors[1].block_costs
    assert not [path for path in consolidated.path.rglob(".*")]
    assert from_chain(consolidated, config={"num_hidden_layers": 5}).num_parameters() < chain.source.num_parameters


def test_an_interrupted_run_goes_on_to_the_same_weights(chain, consolidated, tmp_path, monkeypatch):
    folder, stock, steps = tmp_path / "chain", ConsolidationTrainer.training_step, []

    def interrupted(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return stock(trainer, *args, **kwargs)

    monkeypatch.setattr(ConsolidationTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        consolidate(chain, folder)
    again = consolidate(chain, folder)
    assert steps == [0, 1, 2, 3, 2, 3, 4]
    for ours, theirs in zip(again.anchors, consolidated.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict()) and ours.losses == theirs.losses
    before = (folder / "chain.json").read_bytes()
    assert consolidate(chain, folder).checksum == again.checksum == json.loads(before)["checksum"]
    assert len(steps) == 7 and not (folder / ".work").exists()


@pytest.fixture
def drawn(monkeypatch):
    """drawn(number, shape) makes every step train that."""
    return lambda *target: monkeypatch.setattr(ConsolidationTrainer, "draw", lambda trainer, step: target)


def naive_step(chain, number, shape, seed=42):
    """Loss and gradient of one step over all rows, the long way round."""
    models = [anchor.load_model() for anchor in chain.anchors]
    pair, ids = (
        load_pair(*chain.anchors[number : number + 2]),
        [tiny_tokenizer()(row["text"] + " </s>")["input_ids"] for row in text_rows()],
    )
    run, lower = models[number + 1], models[number + 1]
    if shape is not None:
        upper = parameters_of(models[number], pair.upper_architecture)
        run = MixedModel(pair, Plan(shapes_between(pair, seed)[shape]), upper).mixed_with(lower.train()).run
    terms = dense_terms(run, models[:1], ids)
    (terms["kd"] + 0.5 * terms["ce"]).backward()
    grads = {"": gradients(models[-1])}
    if len(models) > 2:
        grads["distill_projectors.anchors.0."] = gradients(models[1])
    found = {f"{prefix}{name}": grad for prefix, some in grads.items() for name, grad in some.items()}
    return terms, found


def reached(gradient):
    return {name: grad for name, grad in gradient.items() if grad.any()}


@pytest.mark.parametrize(
    "target", [(0, 0), (0, None), (1, 3), (1, None)], ids=["depth", "middle anchor", "width", "last anchor"]
)
def test_a_step_distills_a_target_from_the_source(target, chain, drawn):
    """The loss is that of the target on the source, its gradient goes to both anchors where both are trained."""
    drawn(*target)
    log, gradient = one_step(trainer_of(chain))
    terms, naive = naive_step(chain, *target)
    for name, value in terms.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4), name
    assert log["loss"] == pytest.approx((terms["kd"] + 0.5 * terms["ce"]).item(), rel=1e-4)
    assert_same_gradient(reached(gradient), reached(naive), rtol=1e-4)
    trained = {name.startswith("distill_projectors") for name in reached(gradient)}
    assert trained == {(0, 0): {True}, (0, None): {True}, (1, 3): {True, False}, (1, None): {False}}[target]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow, id="two"
        ),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, id="four"),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow, id="checkpointed"),
        pytest.param({"packing": True, "max_length": 20}, id="packed"),
    ],
)
def test_how_a_step_is_taken_changes_nothing(how, chain, drawn):
    drawn(1, 3)
    options = {"gradient_checkpointing": False}
    (one, gradient), (other, same) = (one_step(trainer_of(chain, **each)) for each in (options, {**options, **how}))
    assert_same_gradient(same, gradient)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_it_runs_in_the_dtype_of_the_training(chain, drawn):
    """Under autocast, targets too."""
    seen = set()
    for target in ((1, 3), (0, None)):
        drawn(*target)
        trainer = trainer_of(chain, bf16=True)
        handles = [
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, args, output: seen.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
            )
        ]
        one_step(trainer)
        for handle in handles:
            handle.remove()
    assert seen == {torch.bfloat16}


def test_sizes_are_drawn_evenly_in_parameters_and_anchors_themselves_at_times(chain):
    trainer = trainer_of(chain)
    draws = [trainer.draw(step) for step in range(1000)]
    assert draws == [trainer.draw(step) for step in range(1000)]
    sizes = [anchor.num_parameters for anchor in chain.anchors]
    pairs = Counter(number for number, _ in draws)
    for number, (upper, lower) in enumerate(pairwise(sizes)):
        assert pairs[number] / 1000 == pytest.approx((upper - lower) / (sizes[0] - sizes[-1]), abs=0.04)
        shapes = Counter(shape for pair, shape in draws if pair == number)
        assert shapes.pop(None) / pairs[number] == pytest.approx(OWN_SHARE, abs=0.05)
        assert min(shapes.values()) > 0.5 * max(shapes.values())
    trainer.args.seed = 1
    assert draws != [trainer.draw(step) for step in range(1000)]


def test_the_shapes_between_lie_all_over_the_way(tmp_path):
    pair = open_pair(*random_chain(tmp_path).anchors)
    shapes = shapes_between(pair, seed=0)
    upper, lower = pair.upper_architecture, pair.lower_architecture
    ways = [pair.fraction(shape) for shape in shapes]
    assert len(shapes) == SHAPES and ways == sorted(ways)
    assert all(way == pytest.approx((i + 0.5) / SHAPES, abs=1 / SHAPES) for i, way in enumerate(ways))
    assert all(upper.depth >= shape.depth >= lower.depth for shape in shapes)
    # On the line and beside it.
    assert len({shape.depth for shape in shapes}) > 1 < len({shape.sizes["width"] for shape in shapes})
    assert [shape.shape for shape in shapes_between(pair, seed=1)] != [shape.shape for shape in shapes]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": Dataset.from_dict({"text": []})}, ValueError, "dataset .*no rows"),
        (
            {"args": BridgeDistillConfig(output_dir="x", use_cpu=True, bf16=False)},
            TypeError,
            "must be a DistillConfig",
        ),
        ({"args": chain_config(hidden_weight=1.0)}, ValueError, "hidden_weight=1.0.*no counterparts"),
        ({"args": chain_config(swap_probability=0.5)}, ValueError, "swap_probability=0.5"),
        ({"args": chain_config(model_init_kwargs={"dtype": "bfloat16"})}, ValueError, r"model_init_kwargs.*dtype"),
        ({"args": chain_config(teacher_model_name_or_path="x")}, ValueError, "teacher_model_name_or_path"),
        ({"args": chain_config(eos_token="w1")}, ValueError, "eos_token='w1'.*tokenizer"),
    ],
    ids=["no rows", "a bridge's", "hidden term", "hybrids", "loading", "teacher", "eos"],
)
def test_what_cannot_be_is_refused_first(options, error, message, chain, tmp_path):
    with pytest.raises(error, match=message):
        consolidate(chain, tmp_path / "chain", **options)
    assert not (tmp_path / "chain").exists()


def test_sharded_anchors_are_refused(chain, tmp_path, monkeypatch):
    args = chain_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard each on their own"):
        consolidate(chain, tmp_path / "chain", args=args)


def test_a_chain_of_one_anchor_is_refused(chain, tmp_path):
    one = Chain.from_pretrained(chain.path)
    del one.anchors[1:]
    with pytest.raises(ValueError, match=r"49K.*Build a chain with a smaller anchor"):
        consolidate(one, tmp_path / "chain")


def test_another_chain_is_not_written_over(chain, consolidated, tmp_path):
    with pytest.raises(ValueError, match="is the folder of the chain, which stays as it is"):
        consolidate(chain, chain.path)
    with pytest.raises(ValueError, match=r"holds another chain .*changed: .*max_steps.* \(there: 5; now: 7\)"):
        consolidate(chain, consolidated.path, args=chain_config(max_steps=7, learning_rate=1e-3, seed=1))
    other = random_chain(tmp_path).path
    with pytest.raises(ValueError, match=r"holds another chain .*changed: chain"):
        consolidate(chain, other)
