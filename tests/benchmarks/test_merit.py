"""The pairs and rules that merit is taken on."""

import itertools

import pytest
import torch

from benchmarks.merit import boomerang, excesses, pairs_of, targets_at
from cbd_trl import from_chain
from cbd_trl.chain.chain import Chain, write_anchor
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

DEPTHS = (8, 4, 2)


def _write(folder, model, name, parent, blocks):
    def fill(folder):
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    write_anchor(folder, {"name": name, "parent": parent, "blocks": blocks}, fill)


@pytest.fixture
def chain(tmp_path) -> Chain:
    """Three anchors that differ in depth alone."""
    parent = None
    for i, depth in enumerate(DEPTHS):
        model = tiny_model("llama", seed=i, num_hidden_layers=depth)
        blocks = blocks_of(spaced_layers(DEPTHS[i - 1], depth)) if i else None

        _write(tmp_path, model, f"of-{depth}", parent, blocks)
        parent = f"of-{depth}"
    return Chain.from_pretrained(tmp_path)


def test_pairs_are_neighbours_named_by_what_they_differ_in(tmp_path) -> None:
    narrow = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    shapes = [{"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"num_hidden_layers": 2, **narrow}]
    names = ["of-8", "shallow", "narrow"]
    for (parent, name), shape in zip(itertools.pairwise(["", *names]), shapes, strict=True):
        blocks = [[0, 1], [2, 3]] if name == "shallow" else [[0], [1]] if name == "narrow" else None
        _write(tmp_path / "two", tiny_model("llama", **shape), name, parent or None, blocks)
    pairs = pairs_of(Chain.from_pretrained(tmp_path / "two"))
    found = {kind: [anchor.name for anchor in pair.anchors] for kind, pair in pairs.items()}
    assert found == {"depth": ["of-8", "shallow"], "width": ["shallow", "narrow"]}
    # The upper one of a pair stands for itself.
    assert pairs["width"].anchors[0].block_map is None

    top, _, bottom = Chain.from_pretrained(tmp_path / "two").anchors
    _write(tmp_path / "one", top.load_model(), "top", None, None)
    _write(tmp_path / "one", bottom.load_model(), "bottom", "top", [[0, 1], [2, 3]])
    assert list(pairs_of(Chain.from_pretrained(tmp_path / "one"))) == ["both"]


def test_blocks_from_either_end(chain: Chain) -> None:
    chain.anchors = chain.anchors[:2]
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


def test_a_size_against_the_best_smaller_one() -> None:
    def measured(loss: float) -> dict:
        return {"loss": {"a": loss - 1, "b": loss + 1}}

    assert excesses(measured(4.0), [measured(loss) for loss in (4.25, 3.0, 3.5)]) == [0.25, -1.0, 0.5]


def test_targets_at_shares_are_shapes_between_each_once(chain: Chain) -> None:
    chain.anchors = chain.anchors[:2]
    pair = pairs_of(chain)["depth"]
    # Between 4 and 8 layers there are 6; the anchor itself is none between.
    assert [shape["num_hidden_layers"] for shape in targets_at(pair, [0.02, 0.45, 0.55])] == [6]
