"""Renumbering every coordinate of a model leaves what it computes as it was."""

import dataclasses

import pytest
import torch

from cbd_trl.architectures.axes import dims_of
from cbd_trl.surgery.reorder import Order, permute
from tests.surgery.helpers import (
    TOLERANCE,
    build,
    changed,
    described,
    difference,
    every_case,
    every_family,
    full_model,
    not_stored,
    random_order,
)


@every_case
def test_the_logits_stay_equal(family, tied):
    model = full_model(family, tied)
    weights, architecture = described(model)
    permuted = permute(weights, architecture, random_order(architecture))
    assert len(changed(permuted, weights)) > len(weights) / 2
    assert difference(build(permuted, architecture), model) <= TOLERANCE


def still(architecture):
    """The order that moves nothing."""
    layers, sizes = architecture.depth, architecture.sizes
    width, ffn, group, query = (torch.arange(sizes[dim]) for dim in ("width", "ffn", "group", "query"))
    query = query.expand(layers, sizes["group"], -1)
    if "expert" not in sizes:
        return Order(width, ffn.expand(layers, -1), group.expand(layers, -1), query)
    expert = torch.arange(sizes["expert"]).expand(layers, -1)
    ffn = ffn.expand(layers, sizes["expert"], -1)
    return Order(width, ffn, group.expand(layers, -1), query, expert=expert)


@every_family
@pytest.mark.parametrize("dim", ["width", "ffn", "group", "query", "signs", "expert"])
def test_each_part_of_an_order_moves_what_it_names(family, dim):
    weights, architecture = described(full_model(family, False))
    order = still(architecture)
    if dim not in ("signs", *architecture.sizes):
        pytest.skip("its FFN is one")
    assert changed(permute(weights, architecture, order), weights) == set()
    if dim == "signs":
        if architecture.family.norm_type == "layer":
            pytest.skip("a LayerNorm has no signs")
        order = dataclasses.replace(order, signs=-torch.ones(32))
        gains = {f"{norm}.weight" for norm in architecture.norms}
        expected = {key for key, axes in architecture.tensors.items() if ("width",) in axes} - gains
    else:
        order = dataclasses.replace(order, **{dim: getattr(order, dim).flip(-1)})
        several = architecture.sizes[dim] > 1
        expected = {key for key, axes in architecture.tensors.items() if several and dim in dims_of(axes)}
    assert changed(permute(weights, architecture, order), weights) == expected - not_stored(architecture)


def test_neurons_move_inside_their_own_expert():
    weights, architecture = described(full_model("qwen3_moe", True, num_experts=2))
    ffn = torch.arange(48).expand(4, 2, -1).clone()
    ffn[:, 0] = ffn[:, 0].flip(-1)
    order = dataclasses.replace(still(architecture), ffn=ffn, expert=torch.tensor([[1, 0]] * 4))
    moved = permute(weights, architecture, order)
    key = "model.layers.2.mlp.experts.up_proj.weight"
    assert torch.equal(moved[key], torch.stack([weights[key][1].flip(0), weights[key][0]]))
    assert torch.equal(moved["model.layers.2.mlp.gate.weight"], weights["model.layers.2.mlp.gate.weight"].flip(0))


def test_queries_move_inside_their_own_group():
    weights, architecture = described(full_model("llama", True))
    order = dataclasses.replace(
        random_order(architecture),
        width=torch.arange(32),
        signs=None,
        group=torch.tensor([[1, 0]] * 4),
        query=torch.tensor([[[1, 0], [0, 1]]] * 4),
    )
    key = "model.layers.2.self_attn.q_proj.weight"
    heads, moved = (each[key].view(4, 8, 32) for each in (weights, permute(weights, architecture, order)))
    assert torch.equal(moved, heads[[3, 2, 0, 1]])


def test_no_channel_of_a_layer_norm_changes_sign():
    weights, architecture = described(full_model("gpt2", True))
    order = dataclasses.replace(random_order(architecture), signs=torch.ones(32))
    permute(weights, architecture, order)
    order.signs[5] = -1
    with pytest.raises(ValueError, match=r"gpt2.*signs"):
        permute(weights, architecture, order)
