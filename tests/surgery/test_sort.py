"""Importance, and the exact permutation that sorts by it."""

from dataclasses import replace

import pytest
import torch

from cbd_trl.surgery.reorder import Importance, importance, sort_weights
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    described,
    difference,
    every_case,
    every_family,
    full_model,
    moments,
    scaled,
)
from tests.tiny import ROWS


@every_case
def test_sorting_leaves_the_logits_equal(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    sorted_weights, _ = sort_weights(weights, architecture, importance(weights, architecture, statistics))
    key = f"{architecture.family.embedding}.weight"
    assert not torch.equal(sorted_weights[key], weights[key])
    assert difference(build(sorted_weights, architecture), model) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sorting_leaves_the_logits_equal_with_sliding_layers(family):
    model = full_model(family, True, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    sorted_weights, _ = sort_weights(weights, architecture, importance(weights, architecture, statistics))
    assert difference(build(sorted_weights, architecture), model) <= TOLERANCE


@every_case
def test_sorted_statistics_are_those_of_the_sorted_model(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    sorted_weights, change = sort_weights(weights, architecture, importance(weights, architecture, statistics))
    sorted_statistics = moments(model, architecture, change=change)
    again = moments(build(sorted_weights, architecture), architecture)
    assert sorted_statistics.tokens == again.tokens
    assert set(sorted_statistics.means) == set(sorted_statistics.seconds) == set(again.means)
    assert set(sorted_statistics.squares) == set(again.squares)
    for norm in again.squares:
        torch.testing.assert_close(sorted_statistics.variances(norm), again.variances(norm), rtol=1e-4, atol=1e-5)
    for site in again.means:
        torch.testing.assert_close(sorted_statistics.mean(site), again.mean(site), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sorted_statistics.second(site), again.second(site), rtol=1e-4, atol=1e-5)


@every_case
def test_sorted_importance_descends(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    scores = importance(weights, architecture, statistics)
    sizes = architecture.sizes
    assert scores.width.shape == (sizes["width"],)
    experts = [sizes["expert"]] if "expert" in sizes else []
    assert scores.ffn.shape == (architecture.depth, *experts, sizes["ffn"])
    assert scores.group.shape == (architecture.depth, sizes["group"])
    sorted_weights, change = sort_weights(weights, architecture, scores)
    statistics = moments(model, architecture, change=change)
    # What experts see of the text has no other coordinates.
    own = moments(build(sorted_weights, architecture), architecture)
    again = importance(sorted_weights, architecture, replace(statistics, neurons=own.neurons, mass=own.mass))
    for score in (again.width, again.ffn, again.group, *([again.expert] if experts else [])):
        assert (score.diff(dim=-1) <= (1e-6 if experts else 1e-9)).all()


@every_family
@pytest.mark.parametrize("how", ["active", "read strongly"])
def test_a_huge_channel_comes_first(family, how):
    weights, architecture = described(full_model(family, False))
    if how == "active":
        weights = scaled(weights, architecture, f"{architecture.family.embedding}.weight", "width", 19, 100.0)
    else:
        for site in architecture.sites:
            if site.norm:
                weights = scaled(weights, architecture, f"{site.name}.weight", "width", 19, 100.0)
    statistics = moments(build(weights, architecture), architecture)
    assert importance(weights, architecture, statistics).width.argmax() == 19


@every_family
@pytest.mark.parametrize(("dim", "index"), [("ffn", 31), ("group", 1)])
@pytest.mark.parametrize("how", ["active", "read strongly"])
def test_a_huge_neuron_or_group_comes_first_in_its_layer_alone(family, dim, index, how):
    model = full_model(family, True, **ROWS[family].smooth)
    weights, architecture = described(model)
    before = importance(weights, architecture, moments(model, architecture))
    if how == "read strongly":
        name = next(site for site in architecture.family.sites if site.axis[0] == dim).readers[0]
    else:
        ffn, values = ROWS[family].writers
        name = {"ffn": ffn, "group": values}[dim]
    # Where layers differ, the last one, which has attention.
    layer = 3 if architecture.family.own_modules else 2
    weights = scaled(weights, architecture, architecture.layer_name(layer, f"{name}.weight"), dim, index, 100.0)
    model = build(weights, architecture)
    statistics = moments(model, architecture)
    scores = importance(weights, architecture, statistics)
    # Of every expert by itself.
    rows = getattr(scores, dim)[layer].reshape(-1, architecture.sizes[dim])
    first, second = rows.topk(2).values.T
    assert (rows.argmax(-1) == index).all()
    assert (first > 1.5 * second).all()
    torch.testing.assert_close(getattr(scores, dim)[:layer], getattr(before, dim)[:layer])
    sorted_weights, _ = sort_weights(weights, architecture, scores)
    assert difference(build(sorted_weights, architecture), model) <= TOLERANCE


def test_sorting_moves_whole_groups_and_nothing_inside_a_head():
    weights, architecture = described(full_model("llama", True))
    order = torch.arange(32, 0, -1.0, dtype=torch.float64)
    scores = Importance(order, torch.arange(48, 0, -1.0).expand(4, 48), torch.tensor([[1.0, 2.0]]).expand(4, 2))
    moved, _ = sort_weights(weights, architecture, scores)
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert torch.equal(moved[query], torch.cat([weights[query][16:], weights[query][:16]]))
    assert torch.equal(moved[key], torch.cat([weights[key][8:], weights[key][:8]]))
