"""Blocks that are chosen by the assembled model."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch

from cbd_trl import from_chain
from cbd_trl.chain.model import build_model
from cbd_trl.losses.held_out import HeldOutDivergence, held_out_loss
from cbd_trl.surgery.blocks import blocks_of
from cbd_trl.targets import block_choice
from cbd_trl.targets.block_choice import Assembled, better_blocks, blocks_in_context
from cbd_trl.targets.operators import OPERATORS, Pair, Plan, swapped_blocks
from cbd_trl.utils.blocks import TokenBlocks
from tests.chain.helpers import DEEP, between, chain_rows, random_pair
from tests.surgery.helpers import described, full_model, tokens
from tests.tiny import ROWS

TEXT = TokenBlocks(tokens(4, 12), tokens(4, 12))


def _made(pair, plan, operator="nested"):
    weights, architecture = OPERATORS[operator].make(pair, plan)
    return build_model(architecture, weights, torch.float32)


FAMILIES = [
    pytest.param(name, marks=[] if name in ("llama", "gemma3_text") else pytest.mark.slow, id=name) for name in ROWS
]


@pytest.mark.parametrize("what", ["depth", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_assembled_model_is_the_target(family, what):
    pair = random_pair(family, True, what)
    plan = Plan(between(pair), alpha=None if what == "depth" else 0.4)
    assembled, text = Assembled(pair, plan, "nested"), tokens(2, 12)
    for swapped in map(frozenset, ((2, 3), (0, 1), (0, 2))):
        expected = _made(pair, dataclasses.replace(plan, swapped=swapped))
        with torch.no_grad(), assembled.of(swapped) as model:
            torch.testing.assert_close(model(text).logits, expected(text).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def deep() -> Pair:
    """Ten layers to five: one block of three, three of two, one of one."""
    _, architecture = described(full_model("llama", True, num_hidden_layers=10))
    kept = [2, 4, 6, 8, 9]
    return Pair({}, architecture, {}, architecture.with_layers(kept), None, blocks_of(kept), kept)


def _depth(pair, swapped):
    return sum(len(block) if i in swapped else 1 for i, block in enumerate(pair.blocks))


def test_worth_in_context_beats_worth_alone(deep):
    # Alone each of the two is worth the most; what one gives the other gives as well.
    def divergence(swapped):
        seen.append(swapped)
        twins = 0.9 if {1, 2} & swapped else 0.0
        return 2.0 - twins - 0.1 * (1 in swapped) - 0.5 * (3 in swapped)

    seen: list[frozenset[int]] = []
    found = better_blocks(deep, 7, frozenset({1, 2}), divergence)
    assert found == {1, 3}
    # No set is measured twice, and their number is bounded.
    assert len(seen) == len(set(seen)) <= 3 * (len(deep.blocks) + 2)


def test_a_block_of_one_layer_is_taken_at_any_depth(deep):
    start = frozenset({1, 2})

    def divergence(swapped, single):
        return 2.0 - 0.3 * len({1, 2} & swapped) + single * (4 in swapped)

    assert better_blocks(deep, 7, start, partial(divergence, single=-0.1)) == {1, 2, 4}
    assert better_blocks(deep, 7, start | {4}, partial(divergence, single=0.1)) == start
    # Alone, where it is not better with the blocks that seem to be.
    trap = {frozenset({1, 2}): 2.0, frozenset({1, 2, 4}): 1.9}
    assert better_blocks(deep, 7, start, lambda swapped: trap.get(swapped, 3.0 - 0.5 * (3 in swapped))) == {1, 2, 4}


def test_the_blocks_give_the_depth_and_are_never_worse(deep):
    for seed, depth in itertools.product(range(5), (6, 7, 8, 9)):
        generator = torch.Generator().manual_seed(seed)
        costs = {}

        def divergence(swapped, costs=costs, generator=generator):
            return costs.setdefault(swapped, float(torch.rand(1, generator=generator)))

        start = frozenset(swapped_blocks(deep, Plan(deep.upper_architecture.with_layers(range(depth)))))
        found = better_blocks(deep, depth, start, divergence)
        assert _depth(deep, found) == depth
        assert divergence(found) <= divergence(start)


@pytest.mark.parametrize("what", ["depth", "both"])
def test_neither_divergence_nor_loss_rises(what):
    pair = random_pair("llama", True, what)
    plan = Plan(between(pair))
    found = blocks_in_context(pair, plan, "nested", TEXT)
    divergence = HeldOutDivergence(_made(pair, Plan(pair.upper_architecture), "slice"), TEXT)
    models = [_made(pair, each) for each in (plan, found)]
    before, after = (divergence(model) for model in models)
    assert after <= before + 1e-6
    assert held_out_loss(models[1], TEXT) <= held_out_loss(models[0], TEXT) + 1e-6
    assert found is plan or after < before


def test_a_lower_divergence_at_a_higher_loss_is_no_reason(monkeypatch):
    pair = random_pair("llama", True, "both")
    plan, losses = Plan(between(pair)), iter([1.0, 2.0])
    monkeypatch.setattr(block_choice, "better_blocks", lambda *args: frozenset({0, 1}))
    monkeypatch.setattr(block_choice, "held_out_loss", lambda *args: next(losses))
    assert blocks_in_context(pair, plan, "nested", TEXT) is plan
    losses = iter([1.0, 1.0])
    assert blocks_in_context(pair, plan, "nested", TEXT).swapped == {0, 1}


@pytest.mark.parametrize(
    ("what", "operator", "depth"), [("width", "nested", None), ("both", "nested", 4), ("both", "slice", None)]
)
def test_where_no_block_is_chosen_nothing_is_measured(what, operator, depth, monkeypatch):
    monkeypatch.setattr(block_choice, "Assembled", None)
    pair = random_pair("llama", True, what)
    plan = Plan(between(pair, depth))
    assert blocks_in_context(pair, plan, operator, TEXT) is plan


def test_from_chain_takes_them(chain, monkeypatch):
    monkeypatch.setattr(
        "cbd_trl.targets.from_chain.blocks_in_context",
        lambda pair, plan, operator, tokens: dataclasses.replace(plan, swapped=frozenset({0, 1})),
    )
    monkeypatch.setattr(
        "cbd_trl.targets.from_chain.choose_plan", lambda pair, plan, operator, tokens: (operator, plan)
    )
    model = from_chain(chain, config=DEEP, calibration_dataset=chain_rows(4))
    assert model.config.cbd_trl["swapped_blocks"] == [0, 1]
