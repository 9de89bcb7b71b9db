"""With calibration text, the measured loss decides."""

import pytest
import torch

from cbd_trl import from_chain
from cbd_trl.architectures import describe
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.surgery.blocks import blocks_of
from cbd_trl.targets.calibrate import CALIBRATION_TOKENS, choose_plan, mean_loss
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import Pair, Plan, layer_stack, swapped_blocks
from cbd_trl.utils.blocks import TokenBlocks, token_blocks
from tests.chain.helpers import DEEP, SHAPES, WIDE, between, chain_rows, random_pair
from tests.surgery.helpers import tokens
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("operator", "shape", "alpha"),
    [
        *(pytest.param(*case.values, None, id=str(case.id)) for case in SHAPES),
        ("nested", WIDE, 0.5),
        ("linear", DEEP, 0.5),
    ],
)
def test_calibrated_is_never_worse_than_the_ends(chain, operator, shape, alpha):
    text = chain_rows(30, seed=5)
    model = from_chain(chain, config=shape, operator=operator, alpha=alpha, calibration_dataset=text)
    tokens = token_blocks(text, chain.tokenizer(), CALIBRATION_TOKENS, 64)
    assert tokens.input_ids.shape[1] == 64 == model.config.max_position_embeddings
    with torch.no_grad():
        loss = float(model(tokens.input_ids, labels=tokens.labels).loss)
    upper, lower = chain.anchors[:2] if shape is DEEP else chain.anchors[1:]
    pair, target = load_pair(upper, lower), cut_architecture(upper.architecture(), model.config.cbd_trl["shape"])
    ends = [mean_loss(pair, Plan(target), end, tokens) for end in ("expand", "slice")]
    assert loss <= min(ends) + 1e-5
    plain = mean_loss(pair, Plan(target, alpha), operator, tokens)
    assert loss <= plain + 1e-5
    if model.config.cbd_trl["operator"] == operator and alpha is not None and shape is WIDE:
        assert model.config.cbd_trl["alpha"] == alpha


def test_calibration_chooses_by_its_text(chain, monkeypatch):
    """Whichever candidate has the lowest loss is the one that comes out."""
    for wanted, alpha in (("expand", None), ("slice", None), ("nested", 0.45)):

        def loss(pair, plan, operator, tokens, wanted=wanted, alpha=alpha):
            return 0.0 if (operator, plan.alpha) == (wanted, alpha) else 1.0

        monkeypatch.setattr("cbd_trl.targets.calibrate.mean_loss", loss)
        provenance = from_chain(chain, config=WIDE, calibration_dataset=chain_rows(4)).config.cbd_trl
        assert (provenance["operator"], provenance["alpha"]) == (wanted, alpha)

    def first_blocks(pair, plan, operator, tokens):
        return 0.0 if plan.swapped == frozenset({0, 1}) else 1.0

    monkeypatch.setattr("cbd_trl.targets.calibrate.mean_loss", first_blocks)
    monkeypatch.setattr("cbd_trl.targets.from_chain.blocks_in_context", lambda pair, plan, *args: plan)
    provenance = from_chain(chain, config=DEEP, calibration_dataset=chain_rows(4)).config.cbd_trl
    assert provenance["swapped_blocks"] == [0, 1]


def test_mean_loss_is_that_of_the_model(chain):
    """Also where the last batch holds fewer rows."""
    upper, lower = chain.anchors[:2]
    text = tokens(6, 16)
    with torch.no_grad():
        expected = float(upper.load_model()(text, labels=text).loss)
    plan = Plan(upper.architecture())
    assert mean_loss(load_pair(upper, lower), plan, "slice", TokenBlocks(text, text)) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("what", ["depth", "width", "both"])
def test_every_candidate_is_of_the_shape_asked_for(what, monkeypatch):
    tried = []

    def loss(pair, plan, operator, text):
        tried.append((operator, plan.alpha, plan.swapped))
        return 0.0

    monkeypatch.setattr("cbd_trl.targets.calibrate.mean_loss", loss)
    pair = random_pair("llama", True, what)
    choose_plan(pair, Plan(between(pair)), "nested", TokenBlocks(tokens(), tokens()))
    assert len(tried) == len(set(tried)) and {("expand", None, None), ("slice", None, None)} < set(tried)
    alphas = {alpha for operator, alpha, _ in tried if operator == "nested"}
    assert alphas == {None} if what == "depth" else {0.0, 1.0, None} < alphas
    swaps = {swapped for operator, _, swapped in tried if operator == "nested"}
    # Five of four to six layers: the last block of two is swapped, or the first one.
    assert swaps == {frozenset()} if what == "width" else {frozenset({2, 3}), frozenset({0, 1})} <= swaps
    wanted = 6 if what == "width" else 5
    assert {sum(len(block) if i in chosen else 1 for i, block in enumerate(pair.blocks)) for chosen in swaps} == {
        wanted
    }


def test_calibration_keeps_the_pattern_of_layers(monkeypatch):
    """The choice without text is always a candidate, and none leaves a layer where engines take it for another."""
    upper = describe(tiny_model("gemma3_text", num_hidden_layers=24, sliding_window_pattern=6).config)
    kept, depth = [2, 4, 6, 8, 10, 11, 14, 16, 18, 19, 22, 23], 18
    lower, blocks, target = upper.with_layers(kept), blocks_of(kept), upper.with_layers(range(depth))
    differing = 0
    for seed in range(20):
        costs = torch.rand(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
        pair, tried = Pair({}, upper, {}, lower, None, blocks, kept, costs), []
        monkeypatch.setattr(
            "cbd_trl.targets.calibrate.mean_loss",
            lambda pair, plan, operator, text, tried=tried: tried.append(plan.swapped) or 0.0,
        )
        choose_plan(pair, Plan(target), "nested", TokenBlocks(tokens(), tokens()))
        assert frozenset(swapped_blocks(pair, Plan(target))) in tried
        for swapped in filter(None, tried):
            stack = layer_stack(pair, Plan(target, swapped=swapped))
            assert all(upper.fits(layer, position) for position, (_, layer) in enumerate(stack))
        differing += blocks_for_depth(blocks, depth, costs) not in tried
    # By their costs alone, others would be among them.
    assert differing
