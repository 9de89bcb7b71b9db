"""Sizes in other units than parameters, and several shapes of one size."""

import itertools

import pytest

from cbd_trl.architectures import describe
from cbd_trl.shapes.budget import FlopCount, ParameterCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import solve_anchor, solve_target
from cbd_trl.shapes.spread import spread_anchors, spread_targets
from tests.shapes.test_solve import CONFIGS, anchors, target_of

# A ratio of heads that is free, heads that the width follows, experts, and depths that keep a pattern.
FAMILIES = ("llama", "gpt2", "qwen3_moe", "gemma3_text")


def path(low, high, count):
    return [low + (high - low) * i / (count - 1) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_in_flops_are_monotone_and_end_at_the_anchors(family):
    upper, lower, blocks = anchors(family, "both")
    ends = FlopCount.of(lower), FlopCount.of(upper)
    found = [solve_target(upper, lower, blocks, size, budget=FlopCount) for size in path(*ends, 13)]
    assert (found[0], found[-1]) == (lower.shape, upper.shape)
    sizes = [FlopCount.of(target_of(upper, fields, blocks)) for fields in found]
    assert all(abs(size / wanted - 1) <= 0.03 for size, wanted in zip(sizes, path(*ends, 13), strict=True))
    for field, dim in upper.family.shape_fields.items():
        values = [fields[field] for fields in found]
        assert dim == "ffn" or values == sorted(values)


@pytest.mark.parametrize("budget", [ParameterCount, FlopCount])
def test_targets_of_one_size_in_any_budget(budget):
    upper, lower, blocks = anchors("llama", "both")
    for size in path(budget.of(lower), budget.of(upper), 5)[1:-1]:
        found = spread_targets(upper, lower, blocks, size, 6, budget=budget)
        assert found[0] == solve_target(upper, lower, blocks, size, budget=budget)
        assert len({tuple(fields.items()) for fields in found}) == 6
        assert all(abs(budget.of(target_of(upper, fields, blocks)) / size - 1) <= 0.03 for fields in found)


def test_equal_parameters_are_not_equal_flops():
    """A mixture of experts computes with a part of its weights; a tied table is one of both."""
    upper = describe(CONFIGS["qwen3_moe"])
    sizes = upper.num_parameters, FlopCount.of(upper) // 2
    used = upper.config.num_experts_per_tok / upper.sizes["expert"]
    experts = 3 * upper.sizes["expert"] * upper.sizes["ffn"] * upper.sizes["width"] * upper.depth
    norms = sizes[0] - sizes[1] - (1 - used) * experts
    table = 0 if upper.tied else upper.sizes["vocab"] * upper.sizes["width"]
    assert 0 <= norms - table <= 10 * upper.depth * upper.sizes["width"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_anchors_of_one_size(family, ratio):
    upper = describe(CONFIGS[family])
    wanted = ratio * upper.num_parameters
    found = spread_anchors(upper, ratio, 8)
    assert found == spread_anchors(upper, wanted, 8)
    assert found[:3] == spread_anchors(upper, ratio, 3)
    assert found[0] == solve_anchor(upper, ratio)
    cut = [cut_architecture(upper, fields) for fields in found]
    for one, other in itertools.combinations(cut, 2):
        assert one.shape != other.shape
    for one in cut[2:]:
        assert abs(one.num_parameters / wanted - 1) <= 0.03
        assert one.depth >= ratio * upper.depth and one.sizes["ffn"] >= ratio * upper.sizes["ffn"]
        assert one.sizes["group"] >= ratio * upper.sizes["group"]
        assert all(one.fits(layer, layer) for layer in range(one.depth))
    # Where the width does not go in whole heads, depth, stream, heads and FFN each differ between the shapes.
    if len(cut) == 8 and family == "llama":
        for dim in ("width", "ffn", "group"):
            assert len({one.sizes[dim] for one in cut}) > 1
        assert len({one.depth for one in cut}) > 2


def test_anchors_of_equal_flops():
    upper = describe(CONFIGS["llama"])
    found = spread_anchors(upper, 0.6, 6, budget=FlopCount)
    flops = [FlopCount.of(cut_architecture(upper, fields)) / FlopCount.of(upper) for fields in found]
    assert len(found) == 6 and all(abs(share / 0.6 - 1) <= 0.03 for share in flops[1:])
