"""The whole way in every family that is not plain Llama: a chain is built, and models made from it are stock ones."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbd_trl import build_chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.targets.operators import OPERATORS
from tests.chain.helpers import CHAIN_ANCHORS, DEEP, UPPER_DEPTH, WIDE, chain_config, chain_rows
from tests.surgery.helpers import TOLERANCE, difference, logits, tokens
from tests.tiny import by_kind, tiny_model
from tests.tokenizer import tiny_tokenizer

FAMILIES = ["mistral", "smollm3", "gemma2", "gemma3_text", "olmo2"]
every_family = pytest.mark.parametrize("family", by_kind(FAMILIES))


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory):
    """family -> its source and a chain of 6 layers, 4 layers, and 4 layers half as wide, two steps an anchor."""

    @functools.cache
    def make(family):
        source = tiny_model(family, tie_word_embeddings=True, num_hidden_layers=UPPER_DEPTH)
        return source, build_chain(
            source,
            CHAIN_ANCHORS,
            dataset=chain_rows(),
            output_dir=tmp_path_factory.mktemp(family) / "chain",
            args=chain_config(max_steps=2, save_strategy="no"),
            processing_class=tiny_tokenizer(),
            calibration_tokens=256,
        )

    return make


@every_family
def test_layers_are_trained_on_hybrids_of_their_own_types(chain_of, family):
    """By default half of the steps in depth and all in width."""
    _, chain = chain_of(family)
    assert [anchor.arguments["swap_probability"] for anchor in chain.anchors[1:]] == [0.5, 1.0]
    upper, lower = (anchor.config() for anchor in chain.anchors[:2])
    for name in ("layer_types", "no_rope_layers"):
        if getattr(upper, name, None) is not None:
            assert getattr(lower, name) == [getattr(upper, name)[i] for i in chain.anchors[1].kept_layers]


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "patch"])
@pytest.mark.parametrize("shape", [DEEP, WIDE], ids=["depth", "width"])
@every_family
def test_every_operator_makes_a_stock_model(chain_of, family, shape, operator, tmp_path):
    source, chain = chain_of(family)
    model = from_chain(chain, config=shape, operator=operator, save_directory=tmp_path / "model", dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model) is type(source)
    assert {field: getattr(loaded.config, field) for field in shape} == shape
    assert torch.equal(logits(loaded), logits(model)) and logits(model).isfinite().all()
    assert describe(loaded.config).sizes == describe(model.config).sizes
    assert describe(loaded.config).sizes["dim"] == 8


@every_family
def test_expand_computes_and_writes_what_the_lower_anchor_does(chain_of, family):
    """Beyond the sliding window, with and without a cache."""
    _, chain = chain_of(family)
    prompt = tokens(2, 10, seed=3)
    for shape, lower in ((DEEP, chain.anchors[1]), (WIDE, chain.anchors[2])):
        model = from_chain(chain, config=shape, operator="expand", dtype="float64")
        reference = lower.load_model(torch.float64)
        assert difference(model, reference) <= TOLERANCE
        options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
        written = [
            one.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cached, **options)
            for one, cached in ((reference, False), (model, False), (model, True))
        ]
        assert written[0].shape == (2, 24)
        assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
