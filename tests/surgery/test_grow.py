"""Growing in width and depth leaves the logits equal."""

import pytest
import torch

from cbd_trl.surgery.blocks import spaced_layers
from cbd_trl.surgery.grow import grow_depth, grow_width, zero_pad
from cbd_trl.surgery.least_squares import plain_cut
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    changed,
    described,
    difference,
    every_case,
    every_family,
    full_model,
)
from tests.tiny import HEADS, WIDTH_OF_HEADS, head_marks

WIDER = [
    {"width": 44},
    {"width": 70},
    {"ffn": 61},
    {"group": 3},
    {"query": 3},
    {"width": 44, "ffn": 60, "group": 3, "query": 3},
]
# No width without its heads, and one query a group.
WIDER_WITH_HEADS = [{"ffn": 140}, {"width": 48, "group": 6}, {"width": 40, "group": 5, "ffn": 200}]


def wider(family):
    return WIDER_WITH_HEADS if family in WIDTH_OF_HEADS else WIDER


WIDTHS = [
    pytest.param(
        family,
        tied,
        sizes,
        id=f"{family}-{'tied' if tied else 'untied'}-{'-'.join(sizes)}",
        marks=head_marks(family, tied),
    )
    for family, tied in HEADS
    for sizes in wider(family)
]


@pytest.mark.parametrize(("family", "tied", "sizes"), WIDTHS)
def test_growing_width_leaves_the_logits_equal(family, tied, sizes):
    model = full_model(family, tied)
    weights, architecture = described(model)
    grown, larger = grow_width(weights, architecture, architecture.resized(**sizes))
    conv = {"conv": larger.sizes["width"]} if "conv" in larger.sizes else {}
    assert {**architecture.sizes, **sizes, **conv} == larger.sizes
    ratio = 1 if architecture.fixed_eps else architecture.sizes["width"] / larger.sizes["width"]
    assert larger.eps == pytest.approx(architecture.eps * ratio)
    assert difference(build(grown, larger), model) <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_fixed_epsilon_counts_for_as_much_as_before(tied):
    """A stream so small that the epsilon of OPT's first norms matters."""
    weights, architecture = described(full_model("opt", tied))
    tables = [key for key in weights if ".embed_" in key]
    weights |= {key: 0.01 * weights[key] for key in tables}
    model = build(weights, architecture)
    grown, larger = grow_width(weights, architecture, architecture.resized(width=48, group=6))
    assert difference(build(grown, larger), model) <= TOLERANCE
    # What a growth that forgot it would compute.
    forgetful = build(weights, architecture)
    for module in forgetful.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps *= 48 / 32
    assert difference(forgetful, model) > 1e-3


@pytest.mark.parametrize("sizes", WIDER, ids="-".join)
def test_new_coordinates_can_learn(sizes):
    """What is grown does nothing yet, but its gradient is not zero."""
    weights, architecture = described(full_model("llama", False))
    model = build(*grow_width(weights, architecture, architecture.resized(**sizes)))
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            new = parameter.grad.reshape(-1)[(parameter == 0).reshape(-1)]
            assert not len(new) or (new != 0).any(), name


@pytest.mark.parametrize("depth", [5, 7, 11])
@every_case
def test_growing_depth_leaves_the_logits_equal(family, tied, depth):
    model = full_model(family, tied)
    weights, architecture = described(model)
    grown, deeper = grow_depth(weights, architecture, depth)
    assert deeper.depth == depth
    assert difference(build(grown, deeper), model) <= TOLERANCE


@every_family
def test_new_layers_can_learn(family):
    """What silences a new layer has a gradient, of the size of those of the old layers."""
    grown, deeper = grow_depth(*described(full_model(family, False, rms_norm_eps=1e-6)), 5)
    model = build(grown, deeper)
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    new = next(layer for layer in range(5) if layer not in spaced_layers(5, 4))
    sizes = {}
    for name, parameter in model.named_parameters():
        layer, inside = deeper.split_name(name)
        if layer is not None:
            sizes.setdefault(inside, {})[layer] = float(parameter.grad.norm())
    # Of what some old layer has, too.
    learning = [inside for inside, by_layer in sizes.items() if by_layer.get(new, 0) > 0 and len(by_layer) > 1]
    assert len(learning) >= 2
    for inside in learning:
        assert sizes[inside].pop(new) < 10 * max(sizes[inside].values()), inside


def test_new_layers_are_of_the_type_that_belongs_in_their_place():
    """And copies of layers of that type, which have other tensors than the others."""
    model = full_model("qwen3_5_text", True, full_attention_interval=4)
    grown, deeper = grow_depth(*described(model), 8)
    assert deeper.config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert difference(build(grown, deeper), model) <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_copies_of_a_head_under_a_norm_over_all_heads_share_its_square(tied):
    """OLMo 2: 2 groups of 2 queries to 3 of 3, the old ones copied unequally often."""
    weights, architecture = described(full_model("olmo2", tied))
    grown, _ = grow_width(weights, architecture, architecture.resized(group=3, query=3, width=40))
    query = "model.layers.1.self_attn.q_proj.weight"
    stream = torch.randn(7, 32, dtype=torch.float64)
    old, new = ((stream @ matrix[:, :32].T).square().mean(-1) for matrix in (weights[query], grown[query]))
    # The shared epsilon shrinks with the width; so does what it is compared with.
    torch.testing.assert_close(new, old * 32 / 40)
    key = "model.layers.1.self_attn.k_norm.weight"
    copied = (grown[key] / weights[key][torch.arange(24) % 16]).reshape(3, 8)[:, 0]
    torch.testing.assert_close(copied, torch.tensor([2, 1, 2]).double().sqrt() * (2 / 3) ** 0.5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_growing_depth_takes_sliding_layers_along(family):
    model = full_model(family, True, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    weights, architecture = described(model)
    grown, deeper = grow_depth(weights, architecture, 7)
    old = spaced_layers(7, 4)
    assert [deeper.config.layer_types[layer] for layer in old] == architecture.config.layer_types
    assert difference(build(grown, deeper), model) <= TOLERANCE


@every_family
def test_growing_to_the_same_shape_changes_nothing(family):
    weights, architecture = described(full_model(family, True))
    same, unchanged = grow_width(weights, architecture, architecture)
    assert not changed(same, weights) and unchanged.eps == architecture.eps
    deeper, _ = grow_depth(weights, architecture, architecture.depth)
    assert not changed(deeper, weights)


@every_family
def test_cutting_layers_by_growing_is_refused(family):
    weights, architecture = described(full_model(family, True))
    with pytest.raises(ValueError, match=r"\b4\b.*\b3\b"):
        grow_depth(weights, architecture, 3)


@every_family
def test_growing_changes_nothing_in_place(family):
    weights, architecture = described(full_model(family, True))
    before = {key: tensor.clone() for key, tensor in weights.items()}
    target = architecture.resized(**wider(family)[-1])
    grow_width(weights, architecture, target)
    grow_depth(weights, architecture, 6)
    assert not changed(weights, before)


@every_family
def test_zero_padding_is_undone_by_the_plain_cut_and_is_zero_elsewhere(family):
    weights, architecture = described(full_model(family, False))
    target = architecture.resized(**wider(family)[-1])
    padded = zero_pad(weights, architecture, target)
    assert not changed(plain_cut(padded, target, architecture), weights)
    for key, tensor in padded.items():
        assert tensor.count_nonzero() == weights[key].count_nonzero()
