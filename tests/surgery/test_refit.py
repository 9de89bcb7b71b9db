"""Refitting a cut model's layers to the stream of the model it was cut from."""

import pytest
import torch

from cbd_trl.architectures import decoder_layers
from cbd_trl.surgery.blocks import blocks_of, select_layers, spaced_layers
from cbd_trl.surgery.least_squares import plain_cut
from cbd_trl.surgery.refit import refit_layers
from tests.surgery.helpers import build, described, difference, every_family, full_model, tokens


def cut_pair(family, **widths):
    """A model, the one cut from it, the cut one's architecture and the blocks."""
    teacher = full_model(family, tied=True)
    weights, architecture = described(teacher)
    kept = list(range(4)) if widths else spaced_layers(4, 2)
    weights, architecture = select_layers(weights, architecture, kept)
    if widths:
        narrow = architecture.resized(**widths)
        weights, architecture = plain_cut(weights, architecture, narrow), narrow
    student = build({key: tensor.clone() for key, tensor in weights.items()}, architecture)
    return teacher, student, architecture, blocks_of(kept)


@torch.no_grad()
def streams(model, layers, batch):
    """Outputs of these layers, in order."""
    found = {}
    stack = decoder_layers(model)

    def keep(layer):
        return lambda module, args, output: found.update({layer: output[0] if isinstance(output, tuple) else output})

    handles = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
    model(batch)
    for handle in handles:
        handle.remove()
    return [found[layer] for layer in layers]


def relative_error(student, teacher, blocks, batch):
    """Mean over layers and tokens of |student's stream - teacher's|^2 / |teacher's|^2."""
    ours = streams(student, range(len(blocks)), batch)
    theirs = streams(teacher, [block[-1] for block in blocks], batch)
    errors = [
        ((mine - other[..., : mine.shape[-1]]).pow(2).sum(-1) / other[..., : mine.shape[-1]].pow(2).sum(-1)).mean()
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(errors).mean())


@every_family
def test_the_refitted_stream_is_nearer_to_the_whole_model_on_other_text(family):
    teacher, student, architecture, blocks = cut_pair(family)
    unseen = tokens(8, seed=5)
    before = relative_error(student, teacher, blocks, unseen)
    refit_layers(student, teacher, architecture, blocks, [{"input_ids": tokens(24, seed=s)} for s in (1, 2)])
    assert relative_error(student, teacher, blocks, unseen) < 0.9 * before


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("llama", {"width": 24, "ffn": 40}),
        ("gpt2", {"width": 24, "group": 3}),
        ("gpt_neox", {"width": 24, "group": 3}),
    ],
)
def test_a_narrower_model_is_fitted_on_the_channels_it_shares(family, widths):
    teacher, student, architecture, blocks = cut_pair(family, **widths)
    unseen = tokens(8, seed=5)
    before = relative_error(student, teacher, blocks, unseen)
    refit_layers(student, teacher, architecture, blocks, [{"input_ids": tokens(24, seed=1)}])
    assert relative_error(student, teacher, blocks, unseen) < before


@every_family
def test_a_model_that_lost_nothing_stays_as_it_is(family):
    teacher = full_model(family, tied=False)
    weights, architecture = described(teacher)
    student = build({key: tensor.clone() for key, tensor in weights.items()}, architecture)
    refit_layers(student, teacher, architecture, [[0], [1], [2], [3]], [{"input_ids": tokens()}])
    assert difference(student, teacher) < 1e-5


def test_the_first_layer_is_the_weighted_least_squares_solution():
    """Against a naive fit of the first layer: rows scaled by 1 / sqrt(|t|), ridge as extra rows."""
    teacher, student, architecture, blocks = cut_pair("llama")
    batch = tokens(24, seed=1)
    down = decoder_layers(student)[1].mlp.down_proj
    inputs = []
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    (output,), (target,) = streams(student, [1], batch), streams(teacher, [3], batch)
    handle.remove()
    old, bias = down.weight.detach().clone(), down.bias.detach().clone()
    hidden, gap = inputs[0].flatten(0, 1), (target - output).flatten(0, 1)
    scale = 1 / target.flatten(0, 1).pow(2).mean(-1, keepdim=True).sqrt().sqrt()
    # Only layer 1 differs from its block (layer 0 is kept whole), so the fit of layer 0 changes nothing.
    weight = scale[:, 0] ** 2 / (scale**2).sum()
    centerd = hidden - weight @ hidden
    ridge = 0.1 * (weight @ centerd.pow(2)).mean()
    eye = ridge.sqrt() * torch.eye(hidden.shape[1]).double()
    rows = torch.cat([centerd * weight.sqrt()[:, None], eye])
    nothing = torch.zeros(hidden.shape[1], gap.shape[1]).double()
    goals = torch.cat([(gap - weight @ gap) * weight.sqrt()[:, None], nothing])
    change = torch.linalg.lstsq(rows, goals).solution.T
    refit_layers(student, teacher, architecture, blocks, [{"input_ids": batch}], ridge=0.1)
    torch.testing.assert_close(down.weight, old + change, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(down.bias, bias + weight @ gap - change @ (weight @ hidden), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_behind_the_projection_gets_the_gain_of_least_squares(family):
    """Given the refitted projection, against a naive fit of each channel; rows weighted by 1 / |t|."""
    teacher, student, architecture, blocks = cut_pair(family)
    batch = tokens(24, seed=1)
    refit_layers(student, teacher, architecture, blocks, [{"input_ids": batch}])
    norm, seen = decoder_layers(student)[1].post_feedforward_layernorm, []
    handle = norm.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    # Layer 0 is kept whole, so layer 1 has the inputs that it was fitted on.
    (output,), (target,) = streams(student, [1], batch), streams(teacher, [3], batch)
    handle.remove()
    raw, written = (stream.flatten(0, 1) for stream in seen)
    over_rms = raw / (raw.square().mean(-1, keepdim=True) + architecture.eps).sqrt()
    goal = target.flatten(0, 1) - (output.flatten(0, 1) - written)
    scale = 1 / target.flatten(0, 1).pow(2).mean(-1, keepdim=True).sqrt().sqrt()
    gains = [
        torch.linalg.lstsq((scale * over_rms)[:, [i]], (scale * goal)[:, [i]]).solution.item()
        for i in range(goal.shape[1])
    ]
    found = norm.weight + (1 if family == "gemma2" else 0)
    torch.testing.assert_close(found, torch.tensor(gains).double(), rtol=1e-3, atol=1e-4)


def test_without_text_nothing_is_refitted():
    teacher, student, architecture, blocks = cut_pair("llama")
    with pytest.raises(ValueError, match="calibration"):
        refit_layers(student, teacher, architecture, blocks, [])
