"""The same proofs for the options that a family's config has beside the default ones."""

import pytest
import torch

from cbd_trl.surgery.grow import grow_depth, grow_width
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import fold_norms, folds
from cbd_trl.surgery.reorder import importance, sort_weights
from tests.surgery.helpers import TOLERANCE, build, described, difference, doubled, full_model, moments
from tests.tiny import LONGROPE

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.0}}),
    ("opt", {"enable_bias": False}),
    ("phi3", {"sliding_window": 6}),
    ("phi3", {"rope_parameters": PARTIAL}),
    # The text is longer than the 16 positions of the short factors.
    ("phi3", {"rope_parameters": LONGROPE}),
]
every_variant = pytest.mark.parametrize(("family", "options"), VARIANTS, ids=lambda value: str(value)[:40])
every_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@every_variant
def test_the_option_changes_the_model(family, options):
    """Otherwise nothing below could fail."""
    weights, architecture = described(full_model(family, False, **options))
    plain, plain_architecture = described(full_model(family, False))
    same = {key: weights.get(key, torch.zeros_like(tensor)) for key, tensor in plain.items()}
    if options in ({"attention_bias": False}, {"enable_bias": False}):
        assert weights.keys() < plain.keys()
    else:
        assert difference(build(same, plain_architecture), build(weights, architecture)) > 1e-2


@every_head
@every_variant
def test_sorting_leaves_the_logits_equal(family, options, tied):
    model = full_model(family, tied, **options)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    sorted_weights, _ = sort_weights(weights, architecture, importance(weights, architecture, statistics))
    assert not torch.equal(*(w[f"{architecture.family.embedding}.weight"] for w in (sorted_weights, weights)))
    assert difference(build(sorted_weights, architecture), model) <= TOLERANCE


@every_head
@every_variant
def test_folding_leaves_the_logits_equal(family, options, tied):
    model = full_model(family, tied, **options)
    weights, architecture = described(model)
    assert difference(build(fold_norms(weights, architecture), architecture), model) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "option", "folded"), [("gpt_neox", "attention_bias", 4), ("opt", "enable_bias", 0)]
)
def test_a_norm_with_a_bias_is_folded_where_every_reader_can_take_it(family, option, folded):
    _, architecture = described(full_model(family, True, **{option: False}))
    assert sum(folds(site, architecture) for site in architecture.sites) == folded


@every_head
@every_variant
def test_growing_leaves_the_logits_equal(family, options, tied):
    model = full_model(family, tied, **options)
    weights, architecture = described(model)
    heads = 48 // (architecture.sizes["dim"] * architecture.sizes["query"])
    target = architecture.resized(width=48, group=heads, ffn=60)
    grown, deeper = grow_depth(*grow_width(weights, architecture, target), 7)
    assert (deeper.depth, deeper.sizes) == (7, target.sizes)
    assert difference(build(grown, deeper), model) <= TOLERANCE


@every_variant
def test_a_cut_that_drops_copies_is_exact(family, options):
    weights, architecture = described(full_model(family, False, **options))
    copies, wide = doubled(weights, architecture)
    statistics = moments(build(copies, wide), wide, rows=64, ridge=1e-9)
    cut = least_squares_cut(copies, wide, statistics, architecture)
    assert difference(build(cut, architecture), build(weights, architecture)) <= TOLERANCE
