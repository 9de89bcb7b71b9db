"""A head is tied or not as the weights have it, whatever the config says: merged adapters and edited files differ."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from cbd_trl import build_chain, chain_from_anchors, from_chain
from cbd_trl.architectures import architecture_of, is_tied
from cbd_trl.bridge import reduce_vocabulary, transplant_vocabulary
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.weights import weights_of
from tests.bridge.tokenizers_of_kinds import make_tokenizer
from tests.build.bridged import bridge_step, build_bridged
from tests.chain.helpers import chain_config, chain_rows, depth_of
from tests.surgery.helpers import TOLERANCE, logits
from tests.tiny import TYING, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_trainer

# What the config says, what the weights are, and what counts.
TWO, EQUAL, SHARED = "tied, two tables", "tied, two equal tables", "not tied, one table"
every_state = pytest.mark.parametrize(("state", "tied"), [(TWO, False), (EQUAL, True), (SHARED, True)])


def contradicting(state: str, family: str = "llama", **overrides) -> PreTrainedModel:
    """A model whose config says something else of its head than its weights."""
    model = tiny_model(family, tie_word_embeddings=state != SHARED, **overrides)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if state == SHARED:
        head.weight = table.weight
    else:
        moved = 0.1 * torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(9))
        head.weight = nn.Parameter(table.weight.detach() + (moved if state == TWO else 0.0))
    return model


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("family", TYING)
@every_state
def test_every_family_is_taken_as_its_weights_are(family, state, tied, caplog):
    logging.get_logger("cbd_trl.architectures.registry").warning_once.cache_clear()
    model = contradicting(state, family)
    before = model.config.to_dict()
    architecture = architecture_of(model)
    assert (architecture.tied, architecture.config.tie_word_embeddings, is_tied(model)) == (tied, tied, tied)
    rebuilt = build_model(architecture, weights_of(model, architecture), torch.float32)
    assert rebuilt.num_parameters() == architecture.num_parameters
    assert_same(logits(rebuilt), logits(model))
    assert model.config.to_dict() == before
    assert caplog.text.count("as its weights are") == (state != EQUAL)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@every_state
def test_a_chain_keeps_the_function_of_a_model_in_memory(family, state, tied, tmp_path):
    source = contradicting(state, family)
    expected = logits(source)
    options = {"dataset": chain_rows(), "processing_class": tiny_tokenizer(), "calibration_tokens": 128}
    built = build_chain(
        source, [depth_of(family, 3)], output_dir=tmp_path / "built", args=chain_config(max_steps=1), **options
    )
    below = tiny_model(family, seed=4, tie_word_embeddings=True, intermediate_size=40)
    made = chain_from_anchors([source, below], output_dir=tmp_path / "made", **options)
    for chain in (built, made):
        assert [anchor.architecture().tied for anchor in chain.anchors] == [tied] * 2
        assert_same(logits(from_chain(chain, chain.source.num_parameters)), expected)
        assert chain.source.num_parameters == chain.source.load_model().num_parameters()
    assert_same(logits(made.anchors[1].load_model()), logits(below))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_looked_into_before_anything_is_planned(tmp_path, shards):
    model, place = contradicting(TWO), tmp_path / "merged"
    model.save_pretrained(place, max_shard_size="40KB" if shards > 1 else "5GB")
    tiny_tokenizer().save_pretrained(place)
    assert json.loads((place / "config.json").read_text())["tie_word_embeddings"] is True
    assert (len(list(place.glob("*.safetensors"))) > 1) is (shards > 1)
    assert not Source(place).architecture().tied
    chain = build_chain(
        place, [{"num_hidden_layers": 3}], dataset=chain_rows(), output_dir=tmp_path / "chain", calibration_tokens=128,
        args=chain_config(max_steps=1),
    )  # fmt: skip
    assert_same(logits(chain.source.load_model()), logits(model))
    assert chain.source.num_parameters == model.num_parameters()


@every_state
def test_the_model_of_a_bridge(state, tied, tmp_path):
    """It is trained as its weights are: one table stays one."""
    model = contradicting(state, "gpt2", vocab_size=300, n_positions=128)
    chain = build_bridged(tmp_path / "chain", bridge=bridge_step(model=model))
    assert chain.source.architecture().tied is tied
    trained = chain.source.load_model()
    assert trained.num_parameters() == chain.source.num_parameters
    assert is_tied(trained) is tied and not torch.equal(trained.transformer.wte.weight, model.transformer.wte.weight)


@every_state
def test_another_vocabulary(state, tied, tmp_path):
    old, new = make_tokenizer("byte_level", 420), make_tokenizer("byte_level", 300, seed=1)
    model = contradicting(state, vocab_size=420)
    same = transplant_vocabulary(model, old, old)
    assert torch.equal(logits(same)[..., : len(old)], logits(model)[..., : len(old)])
    texts = [f"the cat {i} sat on the mat" for i in range(30)]
    for made in (same, transplant_vocabulary(model, old, new), reduce_vocabulary(model, old, texts, 350).model):
        assert made.config.tie_word_embeddings is tied is is_tied(made)
        made.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(made))
    assert model.config.tie_word_embeddings is (state != SHARED)


@pytest.mark.parametrize(("state", "tied"), [(TWO, False), (EQUAL, False), (SHARED, True)])
def test_a_student_says_what_was_trained(state, tied, tmp_path, caplog):
    """Two equal tables are trained apart."""
    trainer = make_trainer(student=contradicting(state, num_hidden_layers=2))
    assert f"tie_word_embeddings={tied} from now on" in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is tied is (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(trainer.model))
