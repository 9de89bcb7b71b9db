"""Layers kept, the blocks they stand for, and stacks made of two models' blocks."""

import copy

import pytest
import torch
from torch import nn

from cbd_trl.architectures import decoder_layers
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.blocks import (
    Block,
    blocks_of,
    check_blocks,
    select_layers,
    similar_blocks,
    spaced_layers,
    swap_blocks,
)
from tests.surgery.helpers import (
    build,
    changed,
    described,
    difference,
    every_case,
    every_family,
    full_model,
    logits,
    not_stored,
    stored_tolerance,
)
from tests.tiny import own_names


@pytest.mark.parametrize(
    ("total", "kept", "expected"),
    [
        (30, 16, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 29]),
        (12, 6, [0, 2, 5, 8, 10, 11]),
        (5, 5, [0, 1, 2, 3, 4]),
        (5, 2, [0, 4]),
        (5, 1, [4]),
        (1, 1, [0]),
    ],
)
def test_spaced_layers(total, kept, expected):
    assert spaced_layers(total, kept) == expected


def test_spaced_layers_always_keeps_distinct_layers_and_both_ends():
    for total in range(1, 40):
        for kept in range(1, total + 1):
            layers = spaced_layers(total, kept)
            assert len(layers) == kept
            assert layers == sorted(set(layers))
            assert layers[-1] == total - 1
            assert kept == 1 or layers[0] == 0
            assert kept < 3 or layers[-2] == total - 2


@pytest.mark.parametrize("kept", [0, 6])
def test_spaced_layers_refuses(kept):
    with pytest.raises(ValueError, match=rf"{kept}\b.*\b5\b"):
        spaced_layers(5, kept)


def test_blocks_end_at_the_kept_layers():
    assert blocks_of([0, 2, 5, 6]) == [[0], [1, 2], [3, 4, 5], [6]]
    assert blocks_of([3]) == [[0, 1, 2, 3]]
    for kept in range(1, 12):
        check_blocks(blocks_of(spaced_layers(11, kept) if kept < 12 else []), kept, 11)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[0], [1]], r"\b3 layers.*\b2 blocks.*\[\[0\], \[1\]\]"),
        ([[0, 1, 2]], r"into 2 blocks"),
        ([[1, 0], [2]], r"in order"),
        ([[0, 1], [1, 2]], r"into 2 blocks"),
        ([[], [0, 1, 2]], r"empty block"),
    ],
)
def test_check_blocks_refuses(blocks, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(blocks, lower_depth=2, upper_depth=3)


def _with_layers(model, layers, sorts):
    """The naive twin: the model with another ModuleList put in, each layer of its sort (full or sliding)."""
    twin = copy.deepcopy(model)
    stack = decoder_layers(twin)
    parent = next(module for module in twin.modules() if stack in module.children())
    name = next(name for name, child in parent.named_children() if child is stack)
    setattr(parent, name, nn.ModuleList(layers))
    twin.config.num_hidden_layers = len(layers)
    twin.config.layer_types = sorts
    if hasattr(twin.base_model, "rotary_emb"):
        # A layer type may have positions of its own.
        twin.base_model.rotary_emb = type(twin.base_model.rotary_emb)(twin.config)
    # A moved layer keeps the cache index of its old place.
    twin.config.use_cache = False
    return twin


def _sorts(model):
    return getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers


@pytest.mark.parametrize("layers", [[0, 3], [3], [0, 1, 1, 2, 3]], ids=str)
@every_case
def test_selected_layers_compute_what_those_layers_compute(family, tied, layers):
    model = full_model(family, tied)
    selected, architecture = select_layers(*described(model), layers)
    assert architecture.depth == len(layers)
    sorts = [_sorts(model)[layer] for layer in layers]
    expected = _with_layers(model, [decoder_layers(model)[layer] for layer in layers], sorts)
    assert difference(build(selected, architecture), expected) <= stored_tolerance(architecture)


def test_a_layer_picked_twice_is_two_layers():
    """In the model that is made of it: they are trained, and saved, apart."""
    selected, architecture = select_layers(*described(full_model("llama", True)), [0, 1, 1])
    model = build_model(architecture, selected, torch.float64)
    one, two = (model.model.layers[layer].mlp.up_proj.weight for layer in (1, 2))
    assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()


BLOCKS = [[0], [1, 2], [3, 4], [5]]


def _pair(family: str, tied: bool):
    """Models of 4 and of 6 layers, each lower layer of the sort of the last layer of its block."""
    upper = full_model(family, tied, seed=2, **own_names(family, num_hidden_layers=6))
    kept = [block[-1] for block in BLOCKS]
    lists = {
        name: [getattr(upper.config, name)[layer] for layer in kept]
        for name in ("layer_types", "no_rope_layers")
        if getattr(upper.config, name, None) is not None
    }
    return full_model(family, tied, seed=1, **lists), upper


@pytest.mark.parametrize("swapped", [[0, 1, 2, 3], [], [1], [2, 3], [0, 2]], ids=str)
@every_case
def test_swapped_blocks_run_in_place_of_lower_layers(family, tied, swapped):
    lower, upper = _pair(family, tied)
    mixed, architecture = swap_blocks(*described(lower), *described(upper), BLOCKS, swapped)
    low, high = decoder_layers(lower), decoder_layers(upper)
    layers, sorts = zip(*[
        pair
        for i, block in enumerate(BLOCKS)
        for pair in ([(high[j], _sorts(upper)[j]) for j in block] if i in swapped else [(low[i], _sorts(lower)[i])])
    ], strict=True)  # fmt: skip
    assert architecture.depth == len(layers)
    # Everything outside the layers is the lower model's.
    expected = _with_layers(lower, layers, list(sorts))
    assert difference(build(mixed, architecture), expected) <= stored_tolerance(architecture)


@every_family
def test_swapping_none_is_the_lower_model(family):
    lower, upper = _pair(family, True)
    weights, _ = described(lower)
    mixed, architecture = swap_blocks(weights, described(lower)[1], *described(upper), BLOCKS, [])
    assert not changed(mixed, weights)
    assert difference(build(mixed, architecture), lower) <= stored_tolerance(architecture)


@every_family
def test_swapping_all_is_the_upper_model_with_the_lowers_ends(family):
    lower, upper = _pair(family, False)
    (low, low_architecture), (high, high_architecture) = described(lower), described(upper)
    mixed, architecture = swap_blocks(low, low_architecture, high, high_architecture, BLOCKS, range(4))
    outside = {key for key in low if low_architecture.split_name(key)[0] is None} - not_stored(architecture)
    assert architecture.shape == high_architecture.shape
    assert changed(mixed, high) == outside
    assert all(torch.equal(mixed[key], low[key]) for key in outside)
    whole = build({**mixed, **{key: high[key] for key in outside}}, architecture)
    assert difference(whole, upper) <= stored_tolerance(architecture)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layer_types_of_swapped_blocks_are_the_upper_layers(family):
    upper = full_model(
        family, True, num_hidden_layers=6, use_sliding_window=True, sliding_window=6, max_window_layers=4
    )
    weights, architecture = described(upper)
    lower, lower_architecture = select_layers(weights, architecture, [0, 2, 4, 5])
    assert lower_architecture.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    _, mixed = swap_blocks(lower, lower_architecture, weights, architecture, BLOCKS, [2, 3])
    # Layers 0, 2 (of the lower model), then 3, 4, 5 of the upper one.
    assert mixed.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 2
    # Layer 2 of the lower model is layer 4 of the upper one, the last of its block.
    _, mixed = swap_blocks(lower, lower_architecture, weights, architecture, BLOCKS, [3])
    assert mixed.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    everything, whole = swap_blocks(lower, lower_architecture, weights, architecture, BLOCKS, range(4))
    assert torch.equal(logits(build(everything, whole)), logits(upper))


def test_a_wrong_block_map_is_refused():
    lower, upper = _pair("llama", True)
    with pytest.raises(ValueError, match=r"\b6\b.*\b4\b"):
        swap_blocks(*described(lower), *described(upper), [[0], [1], [2], [3]], [1])


def test_similar_blocks_keep_what_writes_alike_and_end_where_the_streams_are_alike():
    written = torch.tensor([[0.9, 0.1, 0.2, 0.0, 0.3], [0.2, 0.3, 0.3, 0.8, 0.1], [0.0, 0.0, 0.9, 0.0, 0.5]])
    streams = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.1], [0.1, 0.1, 0.1, 0.1, 0.2], [0.9, 0.9, 0.0, 0.0, 0.0]])
    # The third layer writes most like upper layer 2, but the second one stands beside 3.
    assert similar_blocks(written, streams) == [Block((0, 1, 2), 0), Block((3,), 3), Block((4,), 4)]
    # Where layer 3 may not stand, 1 and 2 are kept, and all above the last kept layer belongs to the last block.
    fits = lambda layer, position: layer != 3  # noqa: E731
    assert similar_blocks(written, streams, fits) == [Block((0,), 0), Block((1,), 1), Block((2, 3, 4), 2)]
    assert similar_blocks(written, streams, lambda layer, position: layer < 2) is None
