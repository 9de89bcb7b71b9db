"""Turning the residual stream onto its principal axes leaves what a model computes as it was."""

import pytest
import torch

from cbd_trl.architectures import describe
from cbd_trl.architectures.registry import family_of
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import folds
from cbd_trl.surgery.reorder import can_rotate, importance, principal_axes, rotate, sort_weights, to_principal_axes
from cbd_trl.surgery.weights import readers_of
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    changed,
    described,
    difference,
    every_case,
    full_model,
    keeps_bias,
    logits,
    moments,
    not_stored,
    scaled,
    stream_second,
)
from tests.tiny import FAMILIES, LAYER_NORM, WIDTH_OF_HEADS, tiny_model

# Norms over what is written to the stream.
POST_NORMS = tuple(
    family
    for family in FAMILIES
    if any(norm.axis == ("width",) for norm in describe(tiny_model(family).config).output_norms)
)
ROTATED = [family for family in FAMILIES if family not in POST_NORMS]
every_rotated_family = pytest.mark.parametrize("family", ROTATED)
every_layer_norm_family = pytest.mark.parametrize("family", LAYER_NORM)


@every_case
def test_what_can_be_rotated_is_told(family, tied):
    assert can_rotate(*described(full_model(family, tied))) == (not tied and family in ROTATED)


@every_rotated_family
def test_the_logits_stay_equal(family):
    model = full_model(family, False)
    weights, architecture = described(model)
    rotated, _ = to_principal_axes(weights, architecture, stream_second(architecture, moments(model, architecture)))
    along = {key for key, axes in architecture.tensors.items() if ("width",) in axes} - not_stored(architecture)
    biases = {key for key in weights if key.endswith(".bias")}
    assert along <= changed(rotated, weights) - not_stored(architecture) <= along | biases
    assert difference(build(rotated, architecture), model) <= TOLERANCE


@every_rotated_family
def test_the_statistics_are_those_of_the_rotated_model(family):
    model = full_model(family, False)
    weights, architecture = described(model)
    second = stream_second(architecture, moments(model, architecture))
    rotated, change = to_principal_axes(weights, architecture, second)
    statistics = moments(model, architecture, change=change)
    again = moments(build(rotated, architecture), architecture)
    assert statistics.tokens == again.tokens
    assert set(statistics.means) == set(statistics.seconds) == set(again.means)
    for site in again.means:
        torch.testing.assert_close(statistics.mean(site), again.mean(site), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.second(site), again.second(site), rtol=1e-4, atol=1e-5)


@every_rotated_family
def test_the_axes_are_orthogonal_and_hold_the_most_first(family):
    model = full_model(family, False)
    weights, architecture = described(model)
    statistics = moments(model, architecture)
    second = stream_second(architecture, statistics)
    axes = principal_axes(architecture, second)
    torch.testing.assert_close(axes.T @ axes, torch.eye(32, dtype=torch.float64))
    _, change = to_principal_axes(weights, architecture, second)
    rotated = moments(model, architecture, change=change)
    streams = [site.name for site in architecture.sites if site.axis == ("width",)]
    before, after = (sum(of.variances(site) for site in streams) for of in (statistics, rotated))
    assert after[:8].sum() > 1.2 * before.topk(8).values.sum()
    if family in LAYER_NORM:
        torch.testing.assert_close(axes.sum(1), torch.ones(32, dtype=torch.float64))
    else:
        assert (after.diff() <= 1e-6 * after[0]).all()
        # No order of the channels and no other axes hold more in their first ones.
        values = torch.linalg.eigvalsh(second).flip(0)
        torch.testing.assert_close(after, values, rtol=1e-4, atol=1e-4)


@every_rotated_family
def test_gains_keep_their_size(family):
    model = full_model(family, False)
    weights, architecture = described(model)
    rotated, _ = to_principal_axes(weights, architecture, stream_second(architecture, moments(model, architecture)))
    for site in [site for site in architecture.sites if site.norm][:-1]:
        gains = [of[f"{site.name}.weight"].abs().median() for of in (weights, rotated)]
        torch.testing.assert_close(gains[1].to(gains[0]), gains[0])


# The axes of a LayerNorm's stream are near the principal ones, not those themselves.
@pytest.mark.parametrize("family", [family for family in ROTATED if family not in LAYER_NORM])
def test_rotating_twice_is_rotating_once(family):
    model = full_model(family, False)
    weights, architecture = described(model)
    once, change = to_principal_axes(weights, architecture, stream_second(architecture, moments(model, architecture)))
    statistics = moments(model, architecture, change=change)
    twice, _ = to_principal_axes(once, architecture, stream_second(architecture, statistics))
    for key in once:
        torch.testing.assert_close(twice[key].double(), once[key].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "fields"), [("gpt_neox", {"attention_bias": False}), ("opt", {"enable_bias": False})]
)
def test_biases_that_readers_inside_the_layers_do_not_take(family, fields):
    model = full_model(family, False, **fields)
    weights, architecture = described(model)
    assert sum(not folds(site, architecture) for site in architecture.sites if site.norm) > architecture.depth
    rotated, _ = to_principal_axes(weights, architecture, stream_second(architecture, moments(model, architecture)))
    assert difference(build(rotated, architecture), model) <= TOLERANCE


@every_layer_norm_family
def test_a_bias_without_a_reader_needs_gains_that_can_divide_it(family):
    weights, architecture = described(full_model(family, False))
    final = architecture.sites[-1].name
    inner = architecture.sites[0].name
    assert can_rotate(scaled(weights, architecture, f"{inner}.weight", "width", 5, 1e-6), architecture)
    without = scaled(weights, architecture, f"{final}.weight", "width", 5, 1e-6)
    assert can_rotate(without, architecture) != keeps_bias(architecture.sites[-1], architecture)


def test_other_orthogonal_axes_are_as_exact():
    model = full_model("llama", False)
    weights, architecture = described(model)
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator)).Q
    assert difference(build(rotate(weights, architecture, axes), architecture), model) <= TOLERANCE


@every_rotated_family
def test_a_stream_of_few_dimensions_is_cut_without_loss(family):
    """20 of 32 dimensions in use, none of them a channel: only principal axes can be cut to them."""
    # An epsilon that matters would make more of a stream of fewer channels.
    field = family_of(family).eps_field
    model = full_model(family, False, **({} if field is None else {field: 1e-9}))
    weights, architecture = described(model)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(32, 20, dtype=torch.float64, generator=generator)
    if family in LAYER_NORM:
        basis -= basis.mean(0)
    keep = torch.linalg.qr(basis).Q
    flat, readers = dict(weights), readers_of(architecture)
    reads_width = {f"{module}.weight" for module, site in readers.items() if site.axis == ("width",)}
    for key, axes in architecture.tensors.items():
        if ("width",) in axes and key not in reads_width and key.rsplit(".", 1)[0] not in architecture.norms:
            at = axes.index(("width",))
            flat[key] = (flat[key].movedim(at, -1) @ keep @ keep.T).movedim(-1, at)
    sizes = {"width": 24}
    if family in WIDTH_OF_HEADS:
        # The width is that of the heads: the last one of each layer says nothing and may go.
        sizes["group"] = 3
        for module, site in readers.items():
            if site.axis[0] == "group":
                flat = scaled(flat, architecture, f"{module}.weight", "group", 3, 0.0)
    for module, site in readers.items():
        # A convolution loses channels with the width: the last ones say nothing.
        for channel in range(24, 32) if site.axis == ("conv",) else ():
            flat = scaled(flat, architecture, f"{module}.weight", "conv", channel, 0.0)
    target = architecture.resized(**sizes)
    model = build(flat, architecture)
    statistics = moments(model, architecture, rows=64, ridge=1e-9)
    scores = importance(flat, architecture, statistics)
    ways = {
        "in order": sort_weights(flat, architecture, scores),
        "on axes": to_principal_axes(flat, architecture, stream_second(architecture, statistics)),
    }
    lost = {}
    for name, (these, change) in ways.items():
        moved = moments(model, architecture, rows=64, ridge=1e-9, change=change)
        cut = build(least_squares_cut(these, architecture, moved, target), target)
        lost[name] = float((logits(cut) - logits(model)).square().mean() / logits(model).var())
    # A LayerNorm's kept channels have a variance of their own, token by token.
    assert lost["on axes"] < (lost["in order"] / 2 if family in LAYER_NORM else 1e-9)
