"""Choosing the layers of a shallower model by what each block costs."""

import copy
import itertools

import pytest
import torch
from torch import nn

from cbd_trl.architectures import decoder_layers
from cbd_trl.losses import fused
from cbd_trl.surgery import block_search
from cbd_trl.surgery.block_search import (
    BlockSearch,
    _Candidate,
    _Measure,
    _shortest_path,
    measured_blocks,
)
from cbd_trl.surgery.blocks import Block, anywhere, check_blocks
from cbd_trl.surgery.refit import layer_inputs, output_projection, refit_layer
from tests.largest_tensor import LargestTensor
from tests.surgery.helpers import described, every_family, full_model, tokens
from tests.tiny import own_names

FIT = [{"input_ids": tokens(24, seed=1)}, {"input_ids": tokens(24, seed=2)}]
HELD_OUT = {"input_ids": tokens(24, seed=3)}
# What adds to the stream in a Llama layer.
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def deep_model(family="llama", layers=6):
    return full_model(family, tied=True, **own_names(family, num_hidden_layers=layers))


def silenced(model, silent):
    with torch.no_grad():
        for layer in silent:
            for name in OUTPUTS:
                decoder_layers(model)[layer].get_parameter(name).zero_()
    return model


@torch.no_grad()
def test_a_layer_that_does_nothing_goes_and_its_neighbour_stays():
    model = silenced(deep_model(), [1, 3])
    blocks = BlockSearch(model, described(model)[1], FIT, HELD_OUT).cheapest(4)
    check_blocks([block.layers for block in blocks], 4, 6)
    assert {block.kept for block in blocks} == {0, 2, 4, 5}
    assert sum(block.cost for block in blocks) < 1e-6
    # Where layers that do something must go, it costs.
    assert sum(block.cost for block in BlockSearch(model, described(model)[1], FIT, HELD_OUT).cheapest(3)) > 1e-3


@every_family
@torch.no_grad()
def test_a_cost_is_the_divergence_of_the_model_with_one_layer_for_the_block(family):
    model = deep_model(family)
    architecture = described(model)[1]
    before = copy.deepcopy(model.state_dict())
    measure = _Measure(model, architecture, FIT, HELD_OUT)
    reference = model(**HELD_OUT).logits.log_softmax(-1)
    for kept in (1, 2):
        changed = copy.deepcopy(model)
        layers = decoder_layers(changed)
        recorded = [layer_inputs(model, decoder_layers(model), batch) for batch in FIT]
        streams, calls, goals = zip(*((into[1], calls[kept], into[3]) for into, calls in recorded), strict=True)
        refit_layer(output_projection(layers[kept], kept, architecture), streams, calls, goals)
        layers[3 - kept] = PassOn()
        logits = changed(**HELD_OUT, use_cache=False).logits.log_softmax(-1)
        expected = (reference.exp() * (reference - logits)).sum(-1).mean()
        found = _Candidate((1, 2), kept)
        measure.bound(found)
        assert found.cost <= float(expected) and not found.whole
        measure.measure_whole([found])
        assert found.cost == pytest.approx(float(expected), rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model(**HELD_OUT).logits.log_softmax(-1) - reference).abs().max() == 0


class PassOn(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_sample_of_the_positions_leads_to_the_same_blocks(family, depth, monkeypatch):
    model = deep_model(family)
    architecture, held_out = described(model)[1], {"input_ids": torch.randint(0, 64, (2, 48))}
    wanted = BlockSearch(model, architecture, FIT, held_out).cheapest(depth)
    whole = []
    original = _Measure.measure_whole
    monkeypatch.setattr(_Measure, "measure_whole", lambda self, found: whole.extend(found) or original(self, found))
    monkeypatch.setattr(block_search, "_SAMPLE", 24)
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", {"cpu": 10 * 64})
    monkeypatch.setattr(block_search, "_BLOCK_ELEMENTS", 3 * 64)
    found = BlockSearch(model, architecture, FIT, held_out).cheapest(depth)
    assert [(block.layers, block.kept) for block in found] == [(block.layers, block.kept) for block in wanted]
    assert [block.cost for block in found] == pytest.approx([block.cost for block in wanted], rel=1e-3)
    # Fewer than all: the sample alone rules the others out.
    assert 0 < len(whole) < 2 * len(measured_blocks(architecture, depth))


def test_memory_does_not_grow_with_the_logits(monkeypatch):
    """64 positions: all logits would be 64 x 4,096 numbers; a chunk of 16 rows and the sample's 16 are held."""
    monkeypatch.setattr(block_search, "_SAMPLE", 16)
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", {"cpu": 16 * 4096})
    model = full_model("llama", tied=False, num_hidden_layers=4, vocab_size=4096)
    held_out = {"input_ids": torch.randint(0, 4096, (2, 32))}
    with LargestTensor() as largest:
        BlockSearch(model, described(model)[1], FIT, held_out).cheapest(3)
    # The head itself has 32 x 4,096.
    assert largest.elements <= 32 * 4096


def test_the_cheapest_split_of_all():
    """Against every way to split seven layers into four blocks."""
    generator = torch.Generator().manual_seed(0)
    total, depth = 7, 4
    for _ in range(20):
        costs = {(i, i): {i: 0.0} for i in range(total)}
        for first, last in itertools.combinations(range(total), 2):
            if last - first < 3:
                costs[first, last] = {kept: float(torch.rand((), generator=generator)) for kept in (first, last)}
        sums = []
        for cuts in itertools.combinations(range(1, total), depth - 1):
            spans = list(itertools.pairwise([0, *cuts, total]))
            if all((first, end - 1) in costs for first, end in spans):
                sums.append(sum(min(costs[first, end - 1].values()) for first, end in spans))
        blocks = _shortest_path(costs, total, depth, anywhere, anywhere)
        check_blocks([block.layers for block in blocks], depth, total)
        assert sum(block.cost for block in blocks) == pytest.approx(min(sums))


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6])
def test_no_candidate_is_measured_that_is_not_named_before(depth, monkeypatch):
    measured = []

    def bound(self, candidate):
        measured.append((*candidate.block, candidate.kept))
        candidate.hidden_ND, candidate.cost, candidate.whole = torch.zeros(1, 1), 1.0, True

    monkeypatch.setattr(_Measure, "bound", bound)
    model = deep_model()
    BlockSearch(model, described(model)[1], FIT, HELD_OUT).cheapest(depth)
    named = {(*block, kept) for block in measured_blocks(described(model)[1], depth) for kept in block}
    assert len(measured) == len(set(measured)) and set(measured) <= named
    assert bool(measured) == (depth not in (1, 6))


def test_what_needs_no_measuring():
    model = deep_model()
    architecture = described(model)[1]
    assert BlockSearch(model, architecture, [], {}).cheapest(6) == [Block((i,), i) for i in range(6)]
    assert BlockSearch(model, architecture, [], {}).cheapest(1) == [Block(tuple(range(6)), 5)]


def test_bad_input():
    model = deep_model()
    architecture = described(model)[1]
    with pytest.raises(ValueError, match=r"\b7\b.*\b6\b"):
        BlockSearch(model, architecture, FIT, HELD_OUT).cheapest(7)
    with pytest.raises(ValueError, match="calibration"):
        BlockSearch(model, architecture, [], HELD_OUT).cheapest(4)


def test_what_one_depth_measured_the_next_one_knows(monkeypatch):
    model = deep_model()
    architecture = described(model)[1]
    wanted = [BlockSearch(model, architecture, FIT, HELD_OUT).cheapest(depth) for depth in (4, 3)]
    search, measured = BlockSearch(model, architecture, FIT, HELD_OUT), []
    bound = _Measure.bound
    monkeypatch.setattr(
        _Measure, "bound", lambda self, one: (measured.append((one.block, one.kept)), bound(self, one))
    )
    assert [search.cheapest(depth) for depth in (4, 3)] == wanted
    assert len(set(measured)) == len(measured)
    count = len(measured)
    assert search.cheapest(4) == wanted[0] and len(measured) == count
