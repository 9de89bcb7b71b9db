"""The measure of merit, and the pairs and rules it is taken on."""

import pytest
import torch

from benchmarks.merit import boomerang, eta, pairs_of
from cbd_trl import from_chain
from cbd_trl.chain.manifest import Chain, write_anchor
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

DEPTHS = (8, 4, 2)


def test_eta_by_hand() -> None:
    sizes = [0.25, 0.5, 0.75]
    assert eta(4.0, 2.0, [3.5, 3.0, 2.5], sizes) == pytest.approx(1.0)
    assert eta(4.0, 2.0, [4.0, 4.0, 4.0], sizes) == pytest.approx(0.0)
    # 0.25 of the way where 0.5 was due.
    assert eta(4.0, 2.0, [3.5], [0.5]) == pytest.approx(0.5)
    assert eta(4.0, 2.0, [4.5], [0.5]) == pytest.approx(-0.5)


def test_eta_needs_a_larger_anchor_that_is_better() -> None:
    with pytest.raises(ValueError, match=r"larger anchor's loss is 3.000 and the smaller one's 2.500.*better on"):
        eta(2.5, 3.0, [2.7], [0.5])


@pytest.fixture
def chain(tmp_path) -> Chain:
    """Three anchors that differ in depth alone."""
    parent = None
    for i, depth in enumerate(DEPTHS):
        model = tiny_model("llama", seed=i, num_hidden_layers=depth)
        blocks = blocks_of(spaced_layers(DEPTHS[i - 1], depth)) if i else None

        def fill(folder, model=model):
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)

        write_anchor(tmp_path, {"name": f"of-{depth}", "parent": parent, "block_map": blocks}, fill)
        parent = f"of-{depth}"
    return Chain.from_pretrained(tmp_path)


def test_the_third_anchor_stands_for_what_the_second_did(chain: Chain) -> None:
    pairs = pairs_of(chain)
    assert [[anchor.name for anchor in pair.anchors] for pair in pairs.values()] == [
        ["of-8", "of-4"],
        ["of-4", "of-2"],
        ["of-8", "of-2"],
    ]
    blocks = pairs["both"].anchors[1].block_map
    assert [layer for block in blocks for layer in block] == list(range(8)) and len(blocks) == 2
    middle, bottom = chain.anchors[1].block_map, chain.anchors[2].block_map
    assert blocks[0] == [layer for i in bottom[0] for layer in middle[i]]
    # Each keeps the last of its block, here as there.
    assert pairs["both"].anchors[1].kept_layers == [block[-1] for block in blocks]


def test_blocks_from_either_end(chain: Chain) -> None:
    pair = pairs_of(chain)["depth"]
    blocks = pair.anchors[1].block_map
    upper, lower = (anchor.load_model() for anchor in pair.anchors)
    longest = max(len(block) for block in blocks)
    depth = 4 + longest - 1
    fields = {**pair.anchors[0].shape, "num_hidden_layers": depth}
    first = boomerang(pair, fields, first=True)
    assert first.config.num_hidden_layers == depth
    # From the first: it begins with the larger anchor's layers and ends with the smaller one's last.
    q = "self_attn.q_proj.weight"
    assert torch.equal(first.model.layers[0].get_parameter(q), upper.model.layers[0].get_parameter(q))
    assert torch.equal(first.model.layers[-1].get_parameter(q), lower.model.layers[-1].get_parameter(q))
    last = boomerang(pair, fields, first=False)
    assert torch.equal(last.model.layers[0].get_parameter(q), lower.model.layers[0].get_parameter(q))
    assert torch.equal(last.model.layers[-1].get_parameter(q), upper.model.layers[-1].get_parameter(q))
    assert last.config.num_hidden_layers == from_chain(pair, config=fields).config.num_hidden_layers == depth
