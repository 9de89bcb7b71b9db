"""Chains of models that exist already: exact where it can be, refused with the reason where it cannot."""

import copy
import itertools
import json

import pytest
import torch
from datasets import Dataset

from cbd_trl import from_chain
from cbd_trl.architectures import describe
from cbd_trl.architectures.axes import tensor_shape
from cbd_trl.surgery.blocks import select_layers
from cbd_trl.surgery.least_squares import plain_cut
from cbd_trl.surgery.reorder import importance, permute, sort_weights
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.utils.blocks import token_blocks
from tests.build.apart import NARROW, differs, make, sizes
from tests.chain.helpers import assert_statistics_of, chain_rows, depth_of, random_pair, same_weights
from tests.surgery.helpers import TOLERANCE, build, described, full_model, logits, random_order, tokens
from tests.tiny import FAMILIES, MIXTURES, ROWS, by_kind, own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

# Experts are not matched.
MATCHED = [family for family in FAMILIES if family not in MIXTURES]

# Layers of the sorts of those they stand for.
LOWER = {"llama": NARROW, "gemma2": {**NARROW, "layer_types": 2 * ["sliding_attention"] + ["full_attention"]}}
# Anchors and targets are float32.
SINGLE = 1e-4
# Where a width differs: stored statistics have a few bits an entry, so a last digit may move one by a whole step.
STEPS = 5e-3


def scrambled(model, seed):
    weights, architecture = described(model)
    return build(permute(weights, architecture, random_order(architecture, seed)), architecture)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", by_kind(MATCHED))
def test_every_anchor_computes_what_it_computed(family, tied, tmp_path):
    pair = random_pair(family, tied, "both")
    models = [build(pair.upper, pair.upper_architecture), build(pair.lower, pair.lower_architecture)]
    chain = make(tmp_path / "chain", [model.float() for model in models])
    for anchor, model in zip(chain.anchors, models, strict=True):
        weights, architecture = described(model)
        assert not same_weights(anchor.load_weights(), weights)
        assert differs(anchor.load_model(torch.float64), build(weights, architecture).double()) <= TOLERANCE
    # Gemma 2's layers in turn leave no block that would give five.
    for config in (depth_of(family, 6 if family == "gemma2" else 5), own_names(family, hidden_size=24)):
        made = from_chain(chain, config=config)
        assert type(made) is type(models[0]) and logits(made).isfinite().all()


@pytest.mark.parametrize(
    ("family", "what"),
    [
        *itertools.product(("llama", "gpt2"), ("depth", "width")),
        *(pytest.param(*kind.values, "both", marks=kind.marks) for kind in by_kind(MATCHED)),
    ],
)
def test_scrambling_the_anchors_changes_no_target(family, what, tmp_path):
    """Of two strangers: the same coordinates are found, however they were numbered."""
    pair = random_pair(family, True, what, **ROWS[family].smooth)
    models = [build(pair.upper, pair.upper_architecture), build(pair.lower, pair.lower_architecture)]
    moved = [scrambled(model, seed).float() for seed, model in enumerate(models)]
    chains = [make(tmp_path / name, given) for name, given in (("a", [m.float() for m in models]), ("b", moved))]
    large, small = (anchor.num_parameters for anchor in chains[0].anchors)
    # At other depths `linear` averages layers that do not stand for each other and were never matched.
    for operator in ("nested", "linear") if what == "width" else ("nested",):
        one, other = (
            from_chain(chain, (large + small) / 2, tolerance=0.3, operator=operator, dtype=torch.float64)
            for chain in chains
        )
        assert differs(one, other) <= (SINGLE if what == "depth" else STEPS)


TEXT = tokens(16, 64, seed=1)


def sorted_on(text, weights, architecture):
    statistics = collect_statistics(build(weights, architecture), architecture, [{"input_ids": text}])
    scores = importance(weights, architecture, statistics)
    return dict(sort_weights(weights, architecture, scores)[0]), architecture


def nested_pair(family):
    """A sorted model of 6 layers, and one of 4 of its layers and 5/6 of its neurons; the rest does little."""
    weights, architecture = sorted_on(
        TEXT, *described(full_model(family, True, **depth_of(family, 6), **ROWS[family].smooth))
    )
    neurons = architecture.sizes["ffn"] * 5 // 6
    over_output = {norm.projection: norm.name for norm in architecture.output_norms}
    for site in architecture.sites:
        layer, key = architecture.split_name(site.name)[0], f"{site.readers[0]}.weight"
        if layer in (1, 3) and site.axis != ("width",):
            writer = over_output.get(site.readers[0], site.readers[0])
            for silenced in {f"{writer}.weight", f"{writer}.bias"} & weights.keys():
                weights[silenced] *= 0.01
        elif site.axis == ("ffn",):
            axis = architecture.tensors[key].index(("ffn",))
            weights[key].narrow(axis, neurons, architecture.sizes["ffn"] - neurons).mul_(0.01)
    weights, _ = sorted_on(TEXT, weights, architecture)
    lower, lower_architecture = select_layers(weights, architecture, [0, 2, 4, 5])
    fewer = lower_architecture.resized(ffn=neurons)
    return build(weights, architecture), build(plain_cut(lower, lower_architecture, fewer), fewer)


@pytest.mark.parametrize("family", by_kind(MATCHED))
def test_a_scrambled_anchor_of_a_nested_pair_is_recovered(family, tmp_path):
    """Targets are those of the pair before its lower anchor was scrambled."""
    upper, lower = (model.float() for model in nested_pair(family))
    options = {"dataset": Dataset.from_dict({"input_ids": TEXT.tolist()}), "calibration_tokens": TEXT.numel()}
    nested = make(tmp_path / "nested", [upper, lower], align=False, **options)
    found = make(tmp_path / "found", [upper, scrambled(lower, 3)], **options)
    assert found.anchors[1].training["match"]["ffn"]["matched"] > 0.9
    few, many = (describe(model.config).sizes["ffn"] for model in (lower, upper))
    for depth, ffn in ((5, few), (5, many), (4, many)):
        config = {**depth_of(family, depth), **own_names(family, intermediate_size=ffn)}
        # By themselves, what is found counts in full, and what shares coordinates by its size.
        options = {"config": config, "alpha": 0.4, "dtype": torch.float64}
        one, other = (from_chain(chain, **options) for chain in (found, nested))
        assert differs(one, other) <= STEPS


def test_three_anchors_nest(tmp_path):
    """What the smallest has comes first in both above it, and every pair is the one that was matched."""
    models = [*sizes(), tiny_model("llama", seed=3, **{**NARROW, "hidden_size": 16, "num_hidden_layers": 2})]
    chain = make(tmp_path / "chain", models)
    assert [anchor.block_map for anchor in chain.anchors] == [None, [[0], [1, 2], [3]], [[0], [1, 2]]]
    below = make(tmp_path / "below", models[1:])
    assert same_weights(chain.anchors[1].load_state_dict(), below.anchors[0].load_state_dict())
    for upper, lower in ((0, 1), (1, 2)):
        large, small = (chain.anchors[i].num_parameters for i in (upper, lower))
        made = from_chain(chain, (large + small) / 2, tolerance=0.2)
        assert made.config.cbd_trl["anchors"] == [chain.anchors[upper].name, chain.anchors[lower].name]
        assert logits(made).isfinite().all()


def test_what_chain_json_tells(tmp_path):
    models = sizes()
    models[0].generation_config.update(do_sample=True, temperature=0.7)
    chain = make(tmp_path / "chain", models)
    upper, lower = json.loads((tmp_path / "chain" / "chain.json").read_text())["anchors"]
    assert (upper["parent"], lower["parent"]) == (None, upper["name"])
    assert upper["training"]["match"] == {} and upper["training"]["aligned"] is True
    assert lower["training"]["match"].keys() == {"width", "ffn", "heads"}
    for quality in lower["training"]["match"].values():
        assert 0 < quality["random"] < quality["matched"] < 1
    assert upper["training"]["sources"] == lower["training"]["sources"]
    assert chain.anchors[0].load_model().generation_config.temperature == 0.7
    assert chain.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    assert not (tmp_path / "chain" / ".work").exists()


def test_the_statistics_are_those_of_the_stored_anchor(tmp_path):
    chain = make(tmp_path / "chain", sizes())
    blocks = token_blocks(chain_rows(60), tiny_tokenizer(), 512, 64).input_ids
    for anchor in chain.anchors:
        assert_statistics_of(anchor, blocks)


def test_unaligned_anchors_stay_as_they_are(tmp_path):
    models = sizes()
    chain = make(tmp_path / "chain", models, align=False)
    for anchor, model in zip(chain.anchors, models, strict=True):
        assert same_weights(anchor.load_state_dict(), weights_of(model, anchor.architecture()))
        assert anchor.training["match"] == {} and anchor.training["aligned"] is False


def test_models_in_memory_are_left_as_they_were(tmp_path):
    models = [model.train() for model in sizes()]
    make(tmp_path / "chain", models)
    for model, before in zip(models, sizes(), strict=True):
        assert same_weights(dict(model.state_dict()), dict(before.state_dict()))
        assert model.training and model.config.to_dict() == before.config.to_dict()


def test_folders_keep_their_dtype_and_their_tokenizer(tmp_path):
    for name, model in zip("ab", sizes(), strict=True):
        model.bfloat16().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    chain = make(tmp_path / "chain", [tmp_path / "a", str(tmp_path / "b")], processing_class=None)
    assert [anchor.dtype for anchor in chain.anchors] == ["bfloat16"] * 2
    assert [anchor.training["source"].partition("@")[0] for anchor in chain.anchors] == ["a", "b"]
    assert chain.tokenizer().chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("untied", [0, 1])
def test_a_tied_anchor_beside_an_untied_one_gets_a_head_of_its_own(untied, family, tmp_path):
    models = [tiny_model(family, seed=1, tie_word_embeddings=untied != 0)]
    models += [tiny_model(family, seed=2, **LOWER[family], tie_word_embeddings=untied != 1)]
    chain = make(tmp_path / "chain", models)
    tied = models[1 - untied]
    for anchor, model in zip(chain.anchors, models, strict=True):
        assert not anchor.architecture().tied
        assert differs(anchor.load_model(torch.float64), copy.deepcopy(model).double()) <= TOLERANCE
        table = tensor_shape((("vocab",), ("width",)), anchor.architecture().sizes)
        assert anchor.num_parameters == model.num_parameters() + (table[0] * table[1] if model is tied else 0)
    assert logits(from_chain(chain, config={"hidden_size": 28, "num_attention_heads": 4})).isfinite().all()


@pytest.mark.parametrize("rows", [(80, 64), (64, 80), (72, 60)])
def test_padding_rows_are_cut_to_those_that_all_have(rows, tmp_path):
    models = [
        tiny_model("llama", seed=1, vocab_size=rows[0]),
        tiny_model("llama", seed=2, **NARROW, vocab_size=rows[1]),
    ]
    chain = make(tmp_path / "chain", models)
    text = tokens() % 60
    for anchor, model in zip(chain.anchors, models, strict=True):
        assert anchor.config().vocab_size == min(rows)
        with torch.no_grad():
            expected = model.double()(text).logits[..., : min(rows)]
            found = anchor.load_model(torch.float64)(text).logits
        assert (found - expected).abs().max() <= TOLERANCE * expected.std()
