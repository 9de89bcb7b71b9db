"""Choosing what an anchor starts from."""

import json

import pytest
import torch

from cbd_trl.architectures import describe
from cbd_trl.build import student
from cbd_trl.build.plan import plan_chain
from cbd_trl.build.student import choose_blocks, initial_student, width_hybrid
from cbd_trl.surgery.block_search import BlockSearch
from cbd_trl.surgery.blocks import spaced_blocks
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source

TOKENS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked():
    """A model of 6 layers, and the step to one of 4."""
    model = chain_source()
    return model, plan_chain(describe(model.config), [{"num_hidden_layers": 4}], chain_config(), chain_rows())[0]


def test_blocks_are_measured_on_text_they_were_not_fitted_on(asked, tmp_path):
    model, step = asked
    blocks = choose_blocks(tmp_path / "blocks.json", model, step, TOKENS)
    fit, held_out = [{"input_ids": TOKENS[:2]}], {"input_ids": TOKENS[2:]}
    assert blocks == BlockSearch(model, describe(model.config), fit, held_out).cheapest(4)
    stored = json.loads((tmp_path / "blocks.json").read_text())
    assert [(block["layers"], block["kept"], block["cost"]) for block in stored] == [
        (list(block.layers), block.kept, block.cost) for block in blocks
    ]


def test_what_an_earlier_run_chose_stays(asked, tmp_path, monkeypatch):
    first = choose_blocks(tmp_path / "blocks.json", *asked, TOKENS)
    monkeypatch.setattr(student, "block_search", lambda *args, **kwargs: pytest.fail("chosen again"))
    assert choose_blocks(tmp_path / "blocks.json", *asked, TOKENS.flip(0)) == first


def test_one_row_of_text_is_enough(asked, tmp_path):
    assert len(choose_blocks(tmp_path / "blocks.json", *asked, TOKENS[:1])) == 4


def test_a_hybrid_has_the_shapes_of_the_setting(chain, monkeypatch):
    upper, taken = chain.anchors[1], []
    [step] = plan_chain(upper.architecture(), [CHAIN_ANCHORS[1]], chain_config(), chain_rows())
    blocks = spaced_blocks(4, 4)
    monkeypatch.setattr(student, "WidthHybrid", lambda pair, probability, seed, shapes: taken.append(shapes))
    for shapes in (["one"], ["one", "another"]):
        monkeypatch.setattr(student, "HYBRID_SHAPES", lambda upper, lower, blocks, shapes=shapes: shapes)
        width_hybrid(upper, upper.load_model(), step, initial_student(upper, step, blocks), blocks, None)
    assert taken == [["one"], ["one", "another"]]
