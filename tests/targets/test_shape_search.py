"""Of the shapes of one size the one that loses least is made."""

import dataclasses

import pytest
import torch

from cbd_trl import Chain, from_chain, make_targets
from cbd_trl.architectures import describe
from cbd_trl.architectures.axes import prefix_index
from cbd_trl.losses.held_out import HeldOutDivergence
from cbd_trl.shapes.budget import FlopCount
from cbd_trl.targets.from_chain import choose_shape, load_pair
from cbd_trl.targets.many import describe_shapes
from cbd_trl.targets.operators import Plan, layer_stack
from cbd_trl.targets.request import Request, find_targets
from cbd_trl.targets.shape_search import LostEnergy, score_by_statistics
from cbd_trl.utils.blocks import TokenBlocks
from tests.chain.helpers import BLOCKS, between, chain_rows, random_chain, random_pair
from tests.surgery.helpers import tokens
from tests.tiny import randomize, tiny_model


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Chain:
    return random_chain(tmp_path_factory.mktemp("both"))


def budgets(chain: Chain, count: int) -> list[float]:
    large, small = (anchor.num_parameters for anchor in chain.anchors)
    return [small + (large - small) * i / (count + 1) for i in range(1, count + 1)]


@pytest.fixture(scope="module")
def text() -> TokenBlocks:
    ids = tokens(4, 16)
    return TokenBlocks(ids, ids)


def test_shapes_of_one_size_differ_and_begin_on_the_line(both):
    for size in budgets(both, 5):
        (line,) = find_targets(both, Request(size))
        found = find_targets(both, Request(size, shape_search=6))
        assert found[0].architecture.shape == line.architecture.shape
        assert len({tuple(target.architecture.shape.items()) for target in found}) == len(found) > 2
        assert len({target.architecture.depth for target in found}) > 1
        assert all(abs(target.architecture.num_parameters / size - 1) <= 0.03 for target in found)
        fewer = find_targets(both, Request(size, shape_search=3))
        assert [one.architecture.shape for one in fewer] == [one.architecture.shape for one in found[:3]]


def test_sizes_are_monotone_and_anchors_themselves(both):
    """The size found follows the budget to a step of the FFN width, and at an anchor's it is that anchor."""
    large, small = both.anchors
    for anchor in (large, small):
        (summary,) = describe_shapes(both, anchor.num_parameters, 8)
        assert (summary.operator, summary.shape, summary.score) == ("anchor", anchor.shape, None)
    found = [describe_shapes(both, size, 8)[0] for size in budgets(both, 12)]
    sizes = [small.num_parameters, *(one.num_parameters for one in found), large.num_parameters]
    assert sizes == sorted(sizes)
    # Close to an anchor nothing is far from it.
    ends = [
        describe_shapes(both, anchor.num_parameters * (1 + sign * 0.002), 8)[0].score or end
        for anchor, sign, end in ((large, -1, 0.0), (small, 1, 1.0))
    ]
    assert ends == pytest.approx([0.0, 1.0], abs=0.05)


def test_a_search_among_shapes_of_equal_flops(both):
    """Monotone in the budget, that anchor at an anchor's FLOPs, and scores are charged for FLOPs."""
    ends = [anchor.size(FlopCount) for anchor in both.anchors]
    for anchor, flops in zip(both.anchors, ends, strict=True):
        (target,) = find_targets(both, Request(flops, shape_search=8, budget=FlopCount))
        assert (target.operator, target.anchors) == ("anchor", (anchor,))
    made = []
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        request = Request(ends[1] + share * (ends[0] - ends[1]), shape_search=8, budget=FlopCount)
        targets = find_targets(both, request)
        assert all(abs(FlopCount.of(target.architecture) / request.size - 1) <= 0.03 for target in targets)
        made.append(score_by_statistics(targets, request)[0])
    sizes = [ends[1], *(FlopCount.of(target.architecture) for target in made), ends[0]]
    assert sizes == sorted(sizes)
    scores = [target.score for target in made]
    assert scores == sorted(scores, reverse=True) and 1.0 > scores[0] > scores[-1] > 0.0
    # As much as the line between the anchors gives for the FLOPs that a shape has more.
    pair = load_pair(*targets[0].anchors)
    lost = LostEnergy(pair)
    best = made[-1]
    more = (FlopCount.of(best.architecture) - request.size) / (ends[0] - ends[1])
    assert best.score == pytest.approx(lost(best.architecture) + more, abs=1e-6)


@pytest.mark.parametrize("what", ["depth", "width", "both"])
def test_lost_energy_is_0_and_1_at_the_anchors(what):
    pair = random_pair("llama", True, what)
    lost = LostEnergy(pair)
    assert lost(pair.upper_architecture) == 0.0
    assert lost(pair.lower_architecture) == pytest.approx(1.0)
    assert 0.0 < lost(between(pair)) < 1.0


def test_lost_energy_by_hand():
    """What least squares leaves of each site's variance, summed over the layers by what these cost."""
    costs = [0.3 * (len(block) > 1) + 0.1 * i for i, block in enumerate(BLOCKS)]
    pair = dataclasses.replace(random_pair("llama", True, "both"), costs=costs)
    upper, statistics, target = pair.upper_architecture, pair.moments(), between(pair)

    def left(site):
        kept = prefix_index(site.axis, upper.sizes, target.sizes)
        covariance = statistics.second(site.name) - torch.outer(statistics.mean(site.name), statistics.mean(site.name))
        covariance += statistics.ridge * torch.diag(covariance.diagonal())
        given = covariance[:, kept] @ torch.linalg.solve(covariance[kept][:, kept], covariance[kept])
        return float(1 - given.trace() / covariance.trace())

    pruned = {layer: costs[i] / (len(b) - 1) for i, b in enumerate(BLOCKS) for layer in b if layer != pair.kept[i]}
    mean = sum(pruned.values()) / len(pruned)

    def total(shape, layers):
        lost = sum(worth for layer, worth in pruned.items() if layer not in layers)
        for layer in (None, *layers):
            sites = [site for site in upper.sites if upper.split_name(site.name)[0] == layer]
            lost += pruned.get(layer, mean) * sum(map(shape, sites)) / len(sites)
        return lost

    cut = total(left, {layer for _, layer in layer_stack(pair, Plan(target))})
    target, middle = pair.lower_architecture, target
    assert LostEnergy(pair)(middle) == pytest.approx(cut / total(left, set(pair.kept)), rel=1e-4)


def test_divergence_of_predictions(text):
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    for model in models:
        randomize(model, seed=3 + (model is models[1]))
    divergence = HeldOutDivergence(models[0], text)
    assert divergence(models[0]) == 0.0
    with torch.no_grad():
        ours, theirs = (model(text.input_ids).logits[:, :-1].log_softmax(-1) for model in models)
    assert divergence(models[1]) == pytest.approx(float((ours.exp() * (ours - theirs)).sum(-1).mean()), rel=1e-4)


def test_the_best_shape_is_made(both, tmp_path):
    (size,) = budgets(both, 1)
    best = describe_shapes(both, size, 6)[0]
    model = from_chain(both, size, shape_search=6)
    assert model.config.cbd_trl["shape"] == best.shape
    assert model.config.cbd_trl["shape_search"] == {"shapes": 6, "score": best.score}
    (made,) = make_targets(both, [size], tmp_path, shape_search=6)
    assert made.provenance["shape"] == best.shape
    assert not made.kept and make_targets(both, [size], tmp_path, shape_search=6)[0].kept
    assert not make_targets(both, [size], tmp_path)[0].kept


def test_text_chooses_the_shape(both, text, monkeypatch):
    """With a score that calls one shape the best, that one comes out, and only those of the search are tried."""
    (size,) = budgets(both, 1)
    request = Request(size, shape_search=4)
    targets = find_targets(both, request)
    pair = load_pair(*targets[0].anchors)
    for target in targets:
        wanted = target.architecture

        def score(self, model, wanted=wanted):
            return 0.0 if describe(model.config).shape == wanted.shape else 5.0

        monkeypatch.setattr(HeldOutDivergence, "__call__", score)
        assert choose_shape(targets, request, text, pair).architecture.shape == wanted.shape
    # The last one, no longer the first on the line, is what is made.
    model = from_chain(both, size, shape_search=4, calibration_dataset=chain_rows(1))
    assert model.config.cbd_trl["shape"] == wanted.shape != targets[0].architecture.shape
    assert model.config.cbd_trl["calibration_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"config": {"num_hidden_layers": 5}, "num_parameters": 1e5}, "config="),
        ({"num_parameters": 1e5, "shape_search": 1}, "at least 2"),
        ({"num_parameters": 1e5, "operator": "slice"}, "operator='slice'"),
    ],
)
def test_a_search_that_has_nothing_to_search(both, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        from_chain(both, **{"shape_search": 4, **arguments})
