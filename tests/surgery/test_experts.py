"""Mixtures of experts: what is measured of them, and what surgery does to their number."""

import pytest
import torch

from cbd_trl.surgery.experts import routed_rows
from cbd_trl.surgery.grow import grow_width
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.reorder import importance, permute
from cbd_trl.surgery.statistics import collect_statistics
from tests.surgery.helpers import TOLERANCE, build, described, difference, full_model, moments, random_order, tokens
from tests.tiny import MIXTURES

every_mixture = pytest.mark.parametrize("family", MIXTURES)


def experts_of(model, architecture):
    return [model.get_submodule(site.name) for site in architecture.sites if site.routed]


@every_mixture
@torch.no_grad()
def test_what_experts_compute_adds_up_to_what_the_model_adds(family):
    model = full_model(family, True)
    weights, architecture = described(model)
    calls = []
    module = experts_of(model, architecture)[1]
    module.register_forward_hook(lambda module, inputs, output: calls.append((inputs, output)))
    model(tokens())
    ((stream, chosen, shares), output), found = calls[0], torch.zeros(96, 32, dtype=torch.float64)
    name = architecture.layer_name(1, "mlp.experts.down_proj")
    axes, bias = architecture.tensors[f"{name}.weight"], weights.get(f"{name}.bias")
    width = axes.index(("width",))
    for expert, places, rows in routed_rows(module, (stream, chosen, shares)):
        matrix = weights[f"{name}.weight"][expert].movedim(width - 1, 0)
        found[places] += rows @ matrix.T
        if bias is not None:
            found[places] += ((chosen[places] == expert) * shares[places]).sum(1, keepdim=True) * bias[expert]
    torch.testing.assert_close(found, output)


@every_mixture
@torch.no_grad()
def test_moments_of_experts_are_over_all_tokens_without_padding(family):
    model = full_model(family, True)
    _, architecture = described(model)
    rows = tokens(3, 12)
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in (12, 7, 1)])
    padded = collect_statistics(model, architecture, [{"input_ids": rows, "attention_mask": mask}])
    calls = {}
    for layer, module in enumerate(experts_of(model, architecture)):
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: calls.setdefault(layer, []).append(inputs))
    for row, length in zip(rows, (12, 7, 1), strict=True):
        model(row[None, :length])
    for layer, module in enumerate(experts_of(model, architecture)):
        neurons, mass = torch.zeros(6, 48, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for stream, chosen, shares in calls[layer]:
            mass.index_add_(0, chosen.flatten(), shares.flatten())
            for expert, _, found in routed_rows(module, (stream, chosen, shares)):
                neurons[expert] += found.square().sum(0)
        name = architecture.layer_name(layer, "mlp.experts")
        torch.testing.assert_close(padded.neurons[name].double(), neurons / 20, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(padded.mass[name].double(), mass / 20, rtol=1e-4, atol=1e-6)


@every_mixture
def test_an_expert_that_gets_the_most_comes_first(family):
    model = full_model(family, True)
    weights, architecture = described(model)
    before = importance(weights, architecture, moments(model, architecture)).expert
    routed = moments(model, architecture).mass
    assert torch.equal(before, torch.stack([mass.double() for mass in routed.values()]))
    order = random_order(architecture)
    moved = permute(weights, architecture, order)
    after = importance(moved, architecture, moments(build(moved, architecture), architecture)).expert
    torch.testing.assert_close(after, before.take_along_dim(order.expert, 1), rtol=1e-4, atol=1e-6)


@every_mixture
def test_dropped_experts_leave_the_others_as_they_are(family):
    model = full_model(family, True)
    weights, architecture = described(model)
    target = architecture.resized(expert=4)
    cut = least_squares_cut(weights, architecture, moments(model, architecture), target)
    for key, axes in architecture.tensors.items():
        assert torch.equal(cut[key], weights[key][:4] if axes[0] == ("expert",) else weights[key])
    with pytest.raises(ValueError, match=r"num_experts=1 is less than num_experts_per_tok=2.*at least 2"):
        architecture.resized(expert=1)


def test_a_router_without_a_bias_gets_no_new_experts():
    weights, architecture = described(full_model("qwen3_moe", True))
    with pytest.raises(ValueError, match=r"grow 6 experts to 8: the router of qwen3_moe has no bias"):
        grow_width(weights, architecture, architecture.resized(expert=8))


def test_new_experts_are_never_chosen():
    model = full_model("gpt_oss", True)
    weights, architecture = described(model)
    grown, larger = grow_width(weights, architecture, architecture.resized(expert=9, ffn=61))
    assert larger.sizes["expert"] == 9
    assert difference(build(grown, larger), model) <= TOLERANCE


@every_mixture
def test_the_kernel_of_transformers_computes_the_same(family):
    """Default there, and with no float64: the other proofs run without it."""
    model = full_model(family, True).float()
    weights, architecture = described(model)
    moved = build(dict(permute(weights, architecture, random_order(architecture))), architecture)
    for one in (model, moved):
        one.set_experts_implementation("grouped_mm")
    assert difference(moved, model) <= 10 * TOLERANCE
