"""A tokenizer that begins every text with BOS: so does every block that a model reads, and no report scores it."""

import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import LlamaModel

from cbd_trl import build_chain, chain_from_anchors, from_chain
from cbd_trl.recipe.run import evaluate_chain
from cbd_trl.report.measure import ReportOptions, held_out_blocks, measure_chains
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer
from tests.chain.helpers import UPPER_DEPTH, chain_config
from tests.tiny import tiny_model

# Depth and width at once, so that layers are chosen and widths cut.
SMALLER = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
BETWEEN = {"num_hidden_layers": 5, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
BOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer(size=400)
    assert tokenizer.bos_token_id == BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture
def seen(monkeypatch):
    """The input_ids of every forward pass."""
    found, forward = [], LlamaModel.forward

    def watched(self, input_ids=None, **inputs):
        found.append(input_ids)
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    return found


def texts(seed):
    return Dataset.from_dict({"text": corpus(seed=seed, texts=12)})


def source():
    return tiny_model("llama", vocab_size=400, tie_word_embeddings=True, num_hidden_layers=UPPER_DEPTH)


@pytest.fixture(scope="module")
def chain(tokenizer, tmp_path_factory):
    return build_chain(
        source(),
        [SMALLER],
        dataset=texts(0),
        output_dir=tmp_path_factory.mktemp("begun") / "chain",
        args=chain_config(max_steps=1),
        processing_class=tokenizer,
        calibration_tokens=320,
    )


def assert_all_begin(seen, at_least):
    assert len(seen) >= at_least and all((ids[:, 0] == BOS).all() for ids in seen)


def test_every_reader_of_a_build_begins_with_it(tokenizer, seen, tmp_path):
    """Statistics of both anchors, the choice of layers, the refit, the training."""
    options = {"dataset": texts(0), "processing_class": tokenizer, "calibration_tokens": 320}
    chain = build_chain(source(), [SMALLER], output_dir=tmp_path / "chain", args=chain_config(max_steps=1), **options)
    assert_all_begin(seen, 10)
    assert [anchor.text_start for anchor in chain.anchors] == [[BOS], [BOS]]
    body = json.loads((tmp_path / "chain" / "chain.json").read_text())
    assert [anchor["text_start"] for anchor in body["anchors"]] == [[BOS], [BOS]]
    # Most of them begin inside a row, which a flat stream would cut without it.
    assert max(len(ids) for ids in seen) > 1
    seen.clear()
    models = [anchor.load_model() for anchor in chain.anchors]
    again = chain_from_anchors(models, output_dir=tmp_path / "again", **options)
    assert_all_begin(seen, 6)
    assert [anchor.text_start for anchor in again.anchors] == [[BOS], [BOS]]
    seen.clear()
    from_chain(chain, config=BETWEEN, calibration_dataset=texts(1))
    assert_all_begin(seen, 9)


def expected_loss(model, blocks):
    """Nats of every token that is not BOS, as this test sees it."""
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1].flatten(0, 1)
    wanted = blocks[:, 1:].flatten()
    return functional.cross_entropy(logits[wanted != BOS], wanted[wanted != BOS]).item(), int((wanted != BOS).sum())


def test_reports_score_all_but_it_in_nats_and_bits(chain, tokenizer, seen, tmp_path):
    rows, options = texts(5), ReportOptions(operators=("nested",), blocks=8, block_length=24)
    [report] = measure_chains([chain], rows, options)
    assert_all_begin(seen, 2 * len(chain.anchors))
    blocks = held_out_blocks(tokenizer, rows["text"], 24, 8)
    # One row ends inside a block at least, so that a BOS stands there too.
    assert (blocks.input_ids == BOS).sum() > 8
    recipe = evaluate_chain(chain, tmp_path, blocks, [], "cpu")
    loss, tokens = expected_loss(chain.source.load_model(), blocks.input_ids)
    kept = [id for id in blocks.input_ids[:, 1:].flatten().tolist() if id not in tokenizer.all_special_ids]
    num_bytes = sum(len(token) for token in tokenizer.convert_ids_to_tokens(kept))
    told = {"blocks": 8, "block_length": 24, "start": [BOS], "tokens": tokens, "bytes": num_bytes}
    assert report["text"] == told
    for found in (report["anchors"][0], recipe["anchors"][0]):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / num_bytes, rel=1e-5)
    assert "bits/byte" in (chain.path / "README.md").read_text()
