"""Operators by function: what each equals at its ends, and tensor by tensor between them."""

import dataclasses

import pytest
import torch

from cbd_trl.architectures import describe
from cbd_trl.surgery.blocks import select_layers, spaced_layers, swap_blocks
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import balance_norms, fold_norms
from cbd_trl.targets.operators import (
    OPERATORS,
    Pair,
    Plan,
    cut_upper,
    expand,
    linear,
    mixer,
    nested,
    patch,
    slice_upper,
)
from tests.chain.helpers import BLOCKS, between, depth_of, random_pair, same_weights
from tests.surgery.helpers import TOLERANCE, build, changed, difference, every_case, full_model
from tests.targets.naive import linear_twin, nested_twin
from tests.tiny import FAMILIES, by_head_in

_CASE = ("family", "tied", "what")
every_kind = pytest.mark.parametrize("what", ["depth", "width", "both"])
every_pair = pytest.mark.parametrize(_CASE, by_head_in("depth", "width", "both"))
every_pair_in_width = pytest.mark.parametrize(_CASE, by_head_in("width", "both"))
# Mixing operators return float32.
SINGLE = 1e-4


def upper_model(pair: Pair):
    return build(pair.upper, pair.upper_architecture)


def lower_model(pair: Pair):
    return build(pair.lower, pair.lower_architecture)


def made(result):
    weights, architecture = result
    return build({key: tensor.double() for key, tensor in weights.items()}, architecture)


def test_random_pairs_are_of_two_different_functions():
    """Otherwise nothing below could fail."""
    for family in FAMILIES:
        pair = random_pair(family, True, "both")
        assert difference(lower_model(pair), upper_model(pair)) > 1


@every_pair
def test_expand_computes_what_the_lower_anchor_computes(family, tied, what):
    pair = random_pair(family, tied, what)
    for target in (between(pair), pair.upper_architecture, pair.lower_architecture):
        weights, architecture = expand(pair, Plan(target))
        assert architecture.shape == target.shape
        assert difference(build(weights, architecture), lower_model(pair)) <= TOLERANCE


@every_kind
def test_expand_keeps_each_layer_sort(what):
    """Sliding-window layers stay what they were, wherever new layers come between."""
    layer_types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    layer_types.append("full_attention")
    options = {"use_sliding_window": True, "sliding_window": 4, "layer_types": layer_types, "num_hidden_layers": 6}
    pair = random_pair("qwen2", True, what)
    upper = full_model("qwen2", True, seed=1, **options)
    upper_architecture = describe(upper.config)
    lower_architecture = upper_architecture.with_layers([block[-1] for block in pair.blocks])
    lower_architecture = lower_architecture.resized(**pair.lower_architecture.sizes)
    assert "sliding_attention" in lower_architecture.config.layer_types
    pair = dataclasses.replace(pair, upper_architecture=upper_architecture, lower_architecture=lower_architecture)
    assert difference(build(pair.upper, upper_architecture), upper) == 0
    weights, architecture = expand(pair, Plan(between(pair)))
    assert difference(build(weights, architecture), lower_model(pair)) <= TOLERANCE


@every_pair
def test_slice_is_the_upper_anchor_cut(family, tied, what):
    pair = random_pair(family, tied, what)
    weights, architecture = slice_upper(pair, Plan(pair.upper_architecture))
    assert same_weights(weights, pair.upper) and architecture.shape == pair.upper_architecture.shape

    target = between(pair)
    weights, architecture = slice_upper(pair, Plan(target))
    assert architecture.shape == target.shape
    narrow = pair.upper_architecture.resized(**target.sizes)
    layers = list(range(6)) if what == "width" else spaced_layers(6, 5, pair.upper_architecture.fits)
    expected, _ = select_layers(pair.upper, pair.upper_architecture, layers)
    if what != "depth":
        cut = least_squares_cut(pair.upper, pair.upper_architecture, pair.statistics, narrow)
        expected = balance_norms(*select_layers(cut, narrow, layers), like=expected)
    assert same_weights(weights, expected)


@every_case
def test_nested_in_depth_is_patch_is_swapped_blocks(family, tied):
    pair = random_pair(family, tied, "depth")
    plan = Plan(between(pair))
    expected, expected_architecture = swap_blocks(
        pair.lower, pair.lower_architecture, pair.upper, pair.upper_architecture, BLOCKS, {2, 3}
    )
    for operator in (nested, patch):
        weights, architecture = operator(pair, plan)
        assert same_weights(weights, expected)
        assert architecture.shape == expected_architecture.shape == plan.target.shape
        # Layers 0 and 1 are the lower anchor's, 3 to 5 the upper one's, and what is around them the lower one's.
        reference = made((dict(expected), expected_architecture))
        assert difference(made((weights, architecture)), reference) == 0


@every_case
def test_nested_in_depth_at_its_ends(family, tied):
    pair = random_pair(family, tied, "depth")
    weights, _ = nested(pair, Plan(pair.lower_architecture))
    assert same_weights(weights, pair.lower)
    weights, architecture = nested(pair, Plan(pair.upper_architecture))
    outer = {key: tensor for key, tensor in pair.lower.items() if pair.lower_architecture.split_name(key)[0] is None}
    assert len(outer) >= 2
    assert same_weights(weights, {**pair.upper, **outer})
    assert architecture.shape == pair.upper_architecture.shape


def test_chosen_blocks_are_swapped():
    pair = random_pair("llama", True, "depth")
    weights, _ = patch(pair, Plan(between(pair), swapped={1}))
    expected, _ = swap_blocks(pair.lower, pair.lower_architecture, pair.upper, pair.upper_architecture, BLOCKS, {1})
    assert same_weights(weights, expected)


@every_pair_in_width
def test_nested_in_width_at_its_ends(family, tied, what):
    pair = random_pair(family, tied, what)
    lower_end = nested(pair, Plan(pair.lower_architecture, alpha=1.0))
    assert lower_end[1].shape == pair.lower_architecture.shape
    assert difference(made(lower_end), lower_model(pair)) <= SINGLE
    upper_end = nested(pair, Plan(pair.upper_architecture, alpha=0.0))
    assert upper_end[1].shape == pair.upper_architecture.shape
    assert difference(made(upper_end), upper_model(pair)) <= SINGLE


@every_pair_in_width
def test_nested_without_the_lower_anchor_is_the_cut(family, tied, what):
    pair = random_pair(family, tied, what)
    target = between(pair)
    narrow = pair.upper_architecture.resized(**target.sizes)
    upper = fold_norms(pair.upper, pair.upper_architecture)
    cut = least_squares_cut(upper, pair.upper_architecture, pair.statistics, narrow)
    layers = list(range(6)) if what == "width" else [0, 2, 3, 4, 5]
    expected = made(select_layers(cut, narrow, layers))
    assert difference(made(nested(pair, Plan(target, alpha=0.0))), expected) <= SINGLE


@pytest.mark.parametrize((*_CASE, "alpha"), by_head_in(("width", 0.3), ("width", 1.0), ("both", 1.0), ("both", 0.3)))
def test_nested_in_width_tensor_by_tensor(family, tied, what, alpha):
    pair = random_pair(family, tied, what)
    target = between(pair)
    plan = Plan(target, alpha=alpha)
    cut, architecture = cut_upper(pair, plan)
    assert architecture.shape == target.shape
    weights = mixer(pair, plan)(cut, pair.lower)
    model = full_model(family, tied, seed=1, **depth_of(family, 6))
    expected = nested_twin(pair, architecture, alpha, model)
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-4, atol=1e-4, msg=key)
    # What nested gives is this with balanced norms.
    balanced = nested(pair, plan)
    assert difference(made(balanced), made((weights, architecture))) <= SINGLE
    assert bool(changed(balanced[0], weights)) == any(site.norm for site in architecture.sites[:-1])


@every_pair
def test_linear_is_the_papers_formula(family, tied, what):
    pair = random_pair(family, tied, what)
    target = between(pair)
    weights, architecture = linear(pair, Plan(target, alpha=0.3))
    assert architecture.shape == target.shape
    expected = linear_twin(pair, architecture, 0.3)
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-6, atol=1e-6, msg=key)


@every_pair
def test_linear_at_its_ends(family, tied, what):
    pair = random_pair(family, tied, what)
    upper_end = linear(pair, Plan(pair.upper_architecture, alpha=0.0))
    assert difference(made(upper_end), upper_model(pair)) <= SINGLE
    lower_end = linear(pair, Plan(pair.lower_architecture, alpha=1.0))
    assert difference(made(lower_end), lower_model(pair)) <= SINGLE


@pytest.mark.parametrize("what", ["width", "both"])
def test_alpha_follows_the_size(what):
    pair = random_pair("llama", True, what)
    target = between(pair)
    large, small = pair.upper_architecture.num_parameters, pair.lower_architecture.num_parameters
    fraction = (large - target.num_parameters) / (large - small)
    assert 0.1 < fraction < 0.9
    assert OPERATORS["linear"].default_alpha(pair, target) == pytest.approx(fraction)
    assert OPERATORS["nested"].default_alpha(pair, target) == pytest.approx(fraction**0.75)
    assert [name for name, row in OPERATORS.items() if row.default_alpha(pair, target)] == ["nested", "linear"]
    depth = random_pair("llama", True, "depth")
    assert OPERATORS["nested"].default_alpha(depth, between(depth)) is None


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_describes_what_its_function_makes(name):
    for what in ("depth", "width", "both") if name != "patch" else ("depth",):
        pair, row = random_pair("gemma3_text", True, what), OPERATORS[name]
        target = between(pair)
        planned = row.architecture(dataclasses.replace(pair, upper={}, lower={}, statistics=None), target)
        weights, architecture = row.make(pair, Plan(target))
        assert planned.shape == architecture.shape == target.shape
        assert planned.config.layer_types == architecture.config.layer_types
        # It reads its sources and nothing else.
        for anchor in ("upper", "lower"):
            other = {key: tensor + 1 for key, tensor in getattr(pair, anchor).items()}
            changed_pair = dataclasses.replace(pair, **{anchor: other})
            assert same_weights(weights, row.make(changed_pair, Plan(target))[0]) == (anchor not in row.sources)
        # It mixes by the alpha that the row gives, if it mixes.
        if (alpha := row.default_alpha(pair, target)) is not None:
            assert same_weights(weights, row.make(pair, Plan(target, alpha=alpha))[0])
            assert not same_weights(weights, row.make(pair, Plan(target, alpha=alpha / 2))[0])


@pytest.mark.parametrize("what", ["width", "both"])
def test_patch_refuses_unequal_widths(what):
    pair = random_pair("llama", True, what)
    with pytest.raises(ValueError, match=r"operator='patch'.*operator='nested'"):
        patch(pair, Plan(between(pair)))


def test_patch_refuses_a_narrower_target_of_equal_anchors():
    pair = random_pair("llama", True, "depth")
    target = pair.upper_architecture.resized(width=24)
    with pytest.raises(ValueError, match=r"target \{.*'hidden_size': 24"):
        patch(pair, Plan(target))


@pytest.mark.parametrize("operator", [nested, slice_upper])
def test_width_needs_the_statistics(operator):
    pair = dataclasses.replace(random_pair("llama", True, "width"), statistics=None)
    with pytest.raises(ValueError, match="statistics"):
        operator(pair, Plan(between(pair)))


@pytest.mark.parametrize(
    ("name", "what"), [(n, w) for n in OPERATORS for w in ("depth", "width", "both") if n != "patch" or w == "depth"]
)
def test_nothing_is_changed_in_place(name, what):
    pair = random_pair("gpt2", True, what)
    before = [{key: tensor.clone() for key, tensor in weights.items()} for weights in (pair.upper, pair.lower)]
    shapes = pair.upper_architecture.shape, pair.lower_architecture.shape
    OPERATORS[name].make(pair, Plan(between(pair)))
    assert same_weights(before[0], pair.upper) and same_weights(before[1], pair.lower)
    assert shapes == (pair.upper_architecture.shape, pair.lower_architecture.shape)
