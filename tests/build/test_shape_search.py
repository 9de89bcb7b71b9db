"""The shape of an anchor that is requested by its size: measured, chosen, remembered."""

import json

import pytest
import torch

from cbd_trl import Chain, build_chain
from cbd_trl.architectures import describe
from cbd_trl.build.plan import ShapeSearch, plan_chain
from cbd_trl.build.shape_search import SCORED_TOKENS, SearchText, best_shape, searched_steps
from cbd_trl.losses.held_out import HeldOutDivergence
from cbd_trl.shapes.solve import solve_anchor
from cbd_trl.surgery.block_search import BlockSearch
from cbd_trl.surgery.refit import refit_layers
from cbd_trl.utils.blocks import TokenBlocks, token_blocks
from tests.chain.helpers import chain_config, chain_rows
from tests.surgery.helpers import tokens
from tests.tiny import randomize, tiny_model
from tests.tokenizer import tiny_tokenizer

RATIO, SHAPES = 0.5, 5


def source():
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=6, hidden_size=64, intermediate_size=96)
    randomize(model, seed=1)
    return model


def build(folder, anchors=(RATIO,), **options):
    options = {"dataset": chain_rows(), "args": chain_config(max_steps=2), "shape_search": SHAPES, **options}
    options = {"calibration_tokens": 128, "processing_class": tiny_tokenizer(), **options}
    return build_chain(source(), list(anchors), output_dir=folder, **options)


TRAININGS = {"shape_trainings": 2, "shape_training_steps": 3}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Chain:
    return build(tmp_path_factory.mktemp("searched") / "chain", **TRAININGS)


def scores_of(chain, number=1):
    return chain.anchors[number].training["shape_search"]["scores"]


def never(*args, **options):
    raise AssertionError("measured already")


def test_the_shape_that_loses_least_is_distilled(searched):
    """Of those that were trained shortly, which are those that lose least untrained."""
    first, anchor = searched.anchors
    record = anchor.training["shape_search"]
    requested = {key: value for key, value in record.items() if key != "scores"}
    assert requested == {"size": RATIO, "shapes": SHAPES, "trainings": 2, "training_steps": 3}
    scores = record["scores"]
    assert len(scores) == SHAPES and scores[0]["shape"] == solve_anchor(first.architecture(), RATIO)
    assert len({entry["score"] for entry in scores}) == SHAPES
    trained = [entry for entry in scores if "trained" in entry]
    assert trained == [entry for entry in scores if entry in sorted(scores, key=lambda one: one["score"])[:2]]
    assert all(entry["trained"] < entry["score"] for entry in trained)
    best = min(trained, key=lambda entry: entry["trained"])
    assert anchor.shape == best["shape"] and anchor.num_parameters == best["size"]
    assert not (searched.path / ".work").exists()


def test_a_score_is_that_of_the_untrained_cut_at_the_requested_size(searched):
    """Layers alone: dropped by measured cost, refitted on the text; compared on the rows behind it."""
    upper = searched.source
    entry = next(one for one in scores_of(searched) if one["shape"]["hidden_size"] == upper.shape["hidden_size"])
    depth = entry["shape"]["num_hidden_layers"]
    assert entry["shape"] == {**upper.shape, "num_hidden_layers": depth}
    text = token_blocks(chain_rows(), tiny_tokenizer(), 10**4, 64)
    fit, rest = text.input_ids[:2], text.input_ids[2 : 2 + SCORED_TOKENS // 64]
    teacher = upper.load_model()
    blocks = BlockSearch(teacher, upper.architecture(), [{"input_ids": fit[:1]}], {"input_ids": fit[1:]}).cheapest(
        depth
    )
    student = upper.load_model()
    student.model.layers = torch.nn.ModuleList(student.model.layers[block.kept] for block in blocks)
    for position, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = position
    student.config.num_hidden_layers = depth
    architecture = upper.architecture().with_layers([block.kept for block in blocks])
    refit_layers(student, teacher, architecture, [block.layers for block in blocks], [{"input_ids": fit}])
    measured = HeldOutDivergence(teacher, TokenBlocks(rest, text.labels[2 : 2 + len(rest)]))(student)
    whole = upper.num_parameters
    expected = measured * (whole - RATIO * whole) / (whole - entry["size"])
    assert entry["score"] == pytest.approx(expected, rel=1e-3)


def test_a_chain_that_is_built_again_is_not_measured_again(searched, monkeypatch):
    monkeypatch.setattr(HeldOutDivergence, "__call__", never)
    again = build(searched.path, **TRAININGS)
    assert [anchor.files for anchor in again.anchors] == [anchor.files for anchor in searched.anchors]
    # The shape that was found may be requested as it is; another search may have found another.
    build(searched.path, [dict(searched.anchors[1].shape)], shape_search=None)
    with pytest.raises(ValueError, match=r"shape_search\.shapes.*there: 5; now: 6"):
        build(searched.path, **{**TRAININGS, "shape_search": 6})
    with pytest.raises(ValueError, match=r"shape_search\.size.*there: 0.5; now: 0.6"):
        build(searched.path, [0.6], **TRAININGS)


def test_an_interrupted_build_goes_on_with_the_same_shape(searched, tmp_path, interrupted, monkeypatch):
    """And a shape that is made the worst on purpose is not the one."""
    best, measured = searched.anchors[1].shape, HeldOutDivergence.__call__

    def worse(self, model):
        return measured(self, model) + 10.0 * (describe(model.config).shape == best)

    monkeypatch.setattr(HeldOutDivergence, "__call__", worse)
    interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "chain")
    assert (tmp_path / "chain/.work/below-152K/scores.json").exists()
    steps = interrupted(None)
    monkeypatch.setattr(HeldOutDivergence, "__call__", never)
    chain = build(tmp_path / "chain")
    # Of two steps the second one.
    assert steps == [1]
    ours, theirs = ({json.dumps(one["shape"]): one["score"] for one in scores_of(made)} for made in (chain, searched))
    assert ours.pop(json.dumps(best)) > theirs.pop(json.dumps(best)) + 5.0
    assert ours == theirs
    assert json.dumps(chain.anchors[1].shape) == min(ours, key=lambda shape: ours[shape])


def test_what_is_requested_below_is_planned_for_every_shape():
    """A shape from which the rest cannot be cut is not compared; sizes below are of the shape."""
    upper, args = describe(source().config), chain_config()

    def plan(requested):
        anchors = [RATIO, *requested]
        return lambda search: plan_chain(upper, anchors, args, chain_rows(1), search=search)

    def found(*requested):
        plans = searched_steps(upper, 0, RATIO, ShapeSearch(8), plan(requested))
        assert [steps[0].search for steps in plans] == [ShapeSearch(8).record(RATIO)] * len(plans)
        return plans

    free, wide = found(0.8), found({"hidden_size": 48, "num_hidden_layers": 3})
    assert len({str(steps[0].architecture.shape) for steps in free}) == 8
    for first, second in free:
        assert abs(second.architecture.num_parameters / first.architecture.num_parameters - 0.8) < 0.2
    assert 1 < len(wide) < 8 and all(first.architecture.sizes["width"] >= 48 for first, _ in wide)
    with pytest.raises(ValueError, match="larger than"):
        found({"hidden_size": 72})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"anchors": [{"num_hidden_layers": 4}]}, "requested by their size"),
        ({"shape_search": 1}, "shape_search=1 .*at least 2"),
        ({"shape_search": True}, "shape_search=True"),
        ({"shape_trainings": 9}, "shape_trainings=9 .*from 2 to the 5"),
        ({"shape_trainings": 2, "shape_training_steps": 0}, "shape_training_steps=0"),
        ({"shape_search": None, "shape_trainings": 2}, "shape_trainings=2 .* there is none"),
        ({"dataset": chain_rows(2)}, "one row of calibration text"),
        ({"anchors": [{"size": 0.5, "num_hidden_layers": 4}]}, "has a size and num_hidden_layers"),
        ({"anchors": ["0.5"], "shape_search": 4}, r"anchors\[0\] is the text '0.5'.*A size is a number: 0.5"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_any_work(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        build(tmp_path / "chain", **options)
    assert not (tmp_path / "chain").exists()


def test_a_size_may_have_arguments_of_its_own(tmp_path):
    own = {"size": RATIO, "args": chain_config(max_steps=1)}
    chain = build(tmp_path / "chain", [own], shape_search=None)
    assert chain.anchors[1].shape == solve_anchor(chain.source.architecture(), RATIO)
    assert "shape_search" not in chain.anchors[1].training
    assert chain.anchors[1].training["arguments"]["values"]["max_steps"] == 1


def test_best_is_by_training_where_there_was_one():
    scores = [{"score": 1.0}, {"score": 2.0, "trained": 0.9}, {"score": 3.0, "trained": 0.8}]
    assert (best_shape(scores), best_shape(scores[:1])) == (2, 0)
    assert ShapeSearch(4).with_chosen(0, {"layers": 3}).chosen == {0: {"layers": 3}}


def test_text_is_split_into_rows_to_fit_and_rows_to_score():
    blocks = TokenBlocks(tokens(8, 16), tokens(8, 16))
    for fit, expected in ((5, (5, 3)), (8, (6, 2)), (20, (6, 2))):
        text = SearchText.of(blocks, fit)
        assert (len(text.fit), len(text.scored)) == expected
        assert torch.equal(torch.cat([text.fit.input_ids, text.scored.input_ids]), blocks.input_ids)
