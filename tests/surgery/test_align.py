"""Matching two models: what was scrambled is found again, exactly, in every family."""

import itertools

import pytest
import torch

from cbd_trl.architectures.axes import prefix
from cbd_trl.surgery.align import (
    MeasuredModel,
    assignment,
    collect_cross_moments,
    layer_similarity,
    match_models,
    order_above,
    order_below,
    paired_sites,
    stream_axes,
)
from cbd_trl.surgery.blocks import spaced_layers
from cbd_trl.surgery.grow import grow_depth, grow_width
from cbd_trl.surgery.reorder import Order, importance, importance_order, permute, rotate
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    described,
    difference,
    full_model,
    moments,
    random_order,
    scaled,
    tokens,
)
from tests.tiny import FAMILIES, HEADS, MIXTURES, ROWS, WIDTH_OF_HEADS

# Experts are not matched.
every_case = pytest.mark.parametrize(("family", "tied"), [case for case in HEADS if case[0] not in MIXTURES])
every_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])

# The text of `moments`, in two batches.
BATCHES = [{"input_ids": batch} for batch in tokens(16, seed=1).split(8)]


def side(weights, architecture):
    model = build(weights, architecture)
    statistics = moments(model, architecture)
    return model, MeasuredModel(weights, architecture, statistics)


def matched(upper, lower, prefix=False):
    """The match of two (weights, architecture), with the upper layers beside the lower ones and both sides."""
    (upper_model, upper_side), (lower_model, lower_side) = side(*upper), side(*lower)
    kept = spaced_layers(upper[1].depth, lower[1].depth, upper[1].fits)
    cross = collect_cross_moments(upper_model, upper[1], lower_model, lower[1], kept, BATCHES)
    return match_models(upper_side, lower_side, cross, kept, prefix), kept, upper_side, lower_side


def ffn_sites(architecture):
    return [site for site in architecture.sites if site.axis == ("ffn",)]


@every_case
def test_a_scrambled_copy_is_recovered(family, tied):
    weights, architecture = described(full_model(family, tied))
    order = random_order(architecture, seed=5)
    match, _, upper, _ = matched((weights, architecture), (permute(weights, architecture, order), architecture))
    assert torch.equal(match.width, order.width)
    attending = [architecture.split_name(site.name)[0] for site in architecture.sites if site.axis[0] == "group"]
    for name in ("group", "query"):
        assert torch.equal(getattr(match, name)[attending], getattr(order, name)[attending]), name
    others = [layer for layer in range(architecture.depth) if layer not in attending]
    assert match.conv is None or torch.equal(match.conv[others], order.conv[others])
    # Neurons of a ReLU that are silent on the text look all alike.
    fires = torch.stack([upper.statistics.variances(site.name) > 0 for site in ffn_sites(architecture)])
    for layer, spoke in enumerate(fires):
        found, wanted = match.ffn[layer], order.ffn[layer]
        assert torch.equal(found[spoke[wanted]], wanted[spoke[wanted]]) and spoke.float().mean() > 0.9
    assert torch.equal(match.signs, torch.ones(32) if order.signs is None else order.signs)
    assert match.quality.keys() - {"conv"} == {"width", "ffn", "heads"}
    for quality in match.quality.values():
        silent = 1 - fires.float().mean().item() if quality is match.quality["ffn"] else 0
        assert quality.matched == pytest.approx(1 - silent, abs=1e-4) and quality.random < 0.5


@every_case
def test_a_scrambled_copy_is_put_back_where_it_was(family, tied):
    weights, architecture = described(full_model(family, tied, **ROWS[family].smooth))
    scrambled = permute(weights, architecture, random_order(architecture, seed=5))
    match, *_ = matched((weights, architecture), (scrambled, architecture), prefix=True)
    back = permute(scrambled, architecture, order_below(match))
    for key, tensor in weights.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_rotated_copy_is_turned_back(family):
    weights, architecture = described(full_model(family, tied=False))
    size = architecture.sizes["width"]
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if architecture.family.norm_type == "layer":
        # What keeps the mean: axes whose rows sum to 1.
        random[:, 0] = 1
        basis = torch.linalg.qr(random).Q * torch.linalg.qr(random).R.diagonal().sign()
        mixed = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=torch.Generator().manual_seed(4)).double()).Q
        axes = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), mixed) @ basis.T
    else:
        axes = torch.linalg.qr(random).Q
    turned = rotate(weights, architecture, axes)
    (model, _), (copy, _) = side(weights, architecture), side(turned, architecture)
    kept = list(range(architecture.depth))
    cross = collect_cross_moments(model, architecture, copy, architecture, kept, BATCHES)
    found = stream_axes(cross, architecture, architecture, kept)
    torch.testing.assert_close(axes @ found, torch.eye(size, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    if architecture.family.norm_type == "layer":
        torch.testing.assert_close(found.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-9, rtol=0)


def test_similarity_sees_no_rotation_and_no_scale():
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(50, size, generator=generator) for size in (6, 8)]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    found = layer_similarity(streams, [3 * streams[0] @ turn + 5, streams[1]])
    torch.testing.assert_close(found.diagonal(), torch.ones(2))
    # ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) of the centered streams.
    one, other = (stream - stream.mean(0) for stream in streams)
    expected = (one.T @ other).square().sum() / ((one.T @ one).norm() * (other.T @ other).norm())
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(found[1, 0], expected)
    # A layer that writes nothing is like no other.
    assert torch.equal(layer_similarity([torch.zeros(50, 6), streams[0]], streams)[:, 0], torch.zeros(2))


GROWN, GROWN_WITH_HEADS = {"width": 40, "group": 3, "query": 3, "ffn": 64}, {"width": 48, "group": 6, "ffn": 160}


def grown_and_scrambled(family, tied):
    """A model, and one grown from it in depth and every width, which computes the same, both scrambled."""
    weights, architecture = described(full_model(family, tied, **ROWS[family].smooth))
    sizes = GROWN_WITH_HEADS if family in WIDTH_OF_HEADS else GROWN
    larger, larger_architecture = grow_width(weights, architecture, architecture.resized(**sizes))
    # New neurons are copies of old ones, save for what they write; here they are to be nobody's.
    larger = dict(larger)
    old, generator = architecture.sizes["ffn"], torch.Generator().manual_seed(4)
    for reader in [reader for site in larger_architecture.sites if site.axis == ("width",) for reader in site.readers]:
        axes = larger_architecture.tensors.get(key := f"{reader}.weight", ())
        if ("ffn",) in axes:
            new = larger[key].narrow(axes.index(("ffn",)), old, sizes["ffn"] - old)
            new.copy_(torch.randn(new.shape, generator=generator, dtype=new.dtype))
        elif ("part", "conv") in axes:
            new = larger[key].unflatten(0, (3, -1))[:, architecture.sizes["conv"] :]
            new.copy_(torch.randn(new.shape, generator=generator, dtype=new.dtype))
    larger, larger_architecture = grow_depth(larger, larger_architecture, 6)
    scrambled = permute(larger, larger_architecture, random_order(larger_architecture, seed=6))
    small = permute(weights, architecture, random_order(architecture, seed=7))
    return (scrambled, larger_architecture), (small, architecture)


@every_case
def test_what_was_grown_and_scrambled_comes_back_as_a_prefix(family, tied):
    upper, lower = grown_and_scrambled(family, tied)
    match, kept, upper_side, lower_side = matched(upper, lower)
    lower_order = importance_order(importance(*vars(lower_side).values()))
    upper_order = order_above(match, lower_order, upper[1], importance(*vars(upper_side).values()), kept)
    aligned, small = permute(*upper, upper_order), permute(*lower, lower_order)
    assert difference(build(aligned, upper[1]), build(*lower)) <= TOLERANCE
    # Of a head under a norm over all heads (OLMo 2) growth makes copies of several sizes.
    resized = {name for norm in lower[1].output_norms if "group" in norm.axis for name in (norm.name, norm.projection)}
    for key, axes in lower[1].tensors.items():
        layer, name = lower[1].split_name(key)
        module = key.rsplit(".", 1)[0]
        if module in resized:
            continue
        above = key if layer is None else upper[1].layer_name(kept[layer], name)
        cut = prefix(aligned[above], axes, upper[1].sizes, lower[1].sizes)
        # Growing multiplies some tensors as a whole.
        torch.testing.assert_close(cut / cut.norm(), small[key] / small[key].norm())


@every_family
def test_unmatched_coordinates_follow_by_importance(family):
    upper, lower = grown_and_scrambled(family, True)
    match, kept, upper_side, _ = matched(upper, lower)
    scores = importance(*vars(upper_side).values())
    width = torch.arange(lower[1].sizes["width"])
    inner = {
        dim: torch.arange(lower[1].sizes[dim]).expand(4, -1)
        for dim in ("ffn", "group", "conv")
        if dim in lower[1].sizes
    }
    identity = Order(width, **inner)
    order = order_above(match, identity, upper[1], scores, kept)
    width, skipped = lower[1].sizes["width"], next(i for i in range(6) if i not in kept)
    assert torch.equal(order.width[:width], match.width)
    assert (scores.width[order.width[width:]].diff() <= 0).all()
    assert (scores.ffn[kept[2]][order.ffn[kept[2]][lower[1].sizes["ffn"] :]].diff() <= 0).all()
    for name in ("ffn", "group"):
        score = getattr(scores, name)[skipped]
        assert (score[getattr(order, name)[skipped]].diff() <= 0).all()
    for name, size in (("width", (1,)), ("ffn", (6,)), ("group", (6,)), ("query", (6, upper[1].sizes["group"]))):
        entries = getattr(order, name).reshape(*size, -1)
        assert torch.equal(entries.sort(-1).values, torch.arange(entries.shape[-1]).expand_as(entries))


def test_orders_compose_over_three_models():
    """The lower model's own new order, signs and queries included, decides the upper one's."""
    upper, lower = grown_and_scrambled("llama", False)
    match, kept, upper_side, _ = matched(upper, lower)
    order = random_order(lower[1], seed=8)
    above = order_above(match, order, upper[1], importance(*vars(upper_side).values()), kept)
    aligned, small = permute(*upper, above), permute(*lower, order)
    for layer, name in itertools.product(range(4), "qvo"):
        key = f"model.layers.{{}}.self_attn.{name}_proj.weight"
        axes = lower[1].tensors[key.format(layer)]
        cut = prefix(aligned[key.format(kept[layer])], axes, upper[1].sizes, lower[1].sizes)
        assert torch.equal(cut, small[key.format(layer)])


def test_heads_match_whatever_basis_they_compute_in():
    weights, architecture = described(full_model("llama", True, attention_bias=False))
    order = random_order(architecture, seed=5)
    turned = dict(permute(weights, architecture, order))
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for layer in range(4):
        value, output = (f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "vo")
        turned[value] = (basis @ turned[value].view(-1, 8, 32)).reshape(-1, 32)
        turned[output] = (turned[output].view(32, -1, 8) @ basis.T).reshape(32, -1)
    match, *_ = matched((weights, architecture), (turned, architecture))
    assert torch.equal(match.group, order.group) and torch.equal(match.query, order.query)
    assert match.quality["heads"].matched == pytest.approx(1, abs=1e-4)


def test_models_of_two_seeds_match_no_better_than_chance_allows():
    """The report tells a stranger from a copy."""
    one, other = (described(full_model("llama", True, seed=seed)) for seed in (0, 1))
    match, *_ = matched(one, other)
    for quality in match.quality.values():
        assert quality.random < quality.matched < 0.8


def test_assignment_is_the_best_one_and_not_the_greedy_one():
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.1], [0.0, 0.0]])
    assert assignment(scores).tolist() == [1, 0]


def test_a_channel_that_never_varies_spoils_nothing():
    weights, architecture = described(full_model("llama", False))
    norms = {f"{site.name}.weight" for site in architecture.sites if site.norm}
    silent = weights
    for key, axes in architecture.tensors.items():
        if ("width",) in axes and key not in norms:
            silent = scaled(silent, architecture, key, "width", 3, 0.0)
    order = random_order(architecture, seed=5)
    match, *_ = matched((silent, architecture), (permute(silent, architecture, order), architecture))
    assert torch.equal(match.width, order.width)
    assert match.quality["width"].matched == pytest.approx(31 / 32, abs=1e-4)


@every_family
def test_cross_moments_are_those_of_the_streams(family):
    upper, lower = grown_and_scrambled(family, False)
    models = build(*upper), build(*lower)
    kept = spaced_layers(6, 4)
    found = collect_cross_moments(models[0], upper[1], models[1], lower[1], kept, BATCHES)
    pairs = paired_sites(upper[1], lower[1], kept)
    assert found.keys() == {site.name for site in lower[1].sites}
    text = torch.cat([batch["input_ids"] for batch in BATCHES])
    above, below = (
        _streams(model, architecture, sites, text)
        for model, (_, architecture), sites in zip(models, (upper, lower), zip(*pairs, strict=True), strict=True)
    )
    for one, other in pairs:
        expected = above[one.name].T @ below[other.name] / text.numel()
        torch.testing.assert_close(found[other.name].double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _streams(model, architecture, sites, text):
    """{site: (tokens, width) float64}, by a hook of its own."""
    seen = {}
    for site in sites:

        def hook(module, inputs, site=site):
            stream = inputs[0]
            if site.norm and architecture.family.norm_type == "layer":
                stream = stream - stream.mean(-1, keepdim=True)
            if site.norm:
                stream = stream / (stream.square().mean(-1, keepdim=True) + architecture.eps).sqrt()
            seen[site.name] = stream.flatten(0, -2)

        model.get_submodule(site.name).register_forward_pre_hook(hook)
    model(text)
    return seen


def test_no_text_is_refused():
    weights, architecture = described(full_model("llama", True))
    model = build(weights, architecture)
    with pytest.raises(ValueError, match="dataset"):
        collect_cross_moments(model, architecture, model, architecture, [0, 1, 2, 3], [])
