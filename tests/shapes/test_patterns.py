"""Families whose engines tell layers apart by position: the depths on offer keep the pattern, others are named."""

import pytest
import torch

from cbd_trl import Chain, build_chain, from_chain
from cbd_trl.architectures import describe, supported_model_types
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.depths import blocks_for_depth, reachable_depths
from cbd_trl.shapes.solve import list_sizes, solve_anchor, solve_target
from cbd_trl.surgery.blocks import blocks_of, fitting_layers, spaced_layers
from cbd_trl.targets.many import describe_targets
from cbd_trl.targets.operators import OPERATORS
from tests.chain.helpers import chain_config, chain_rows
from tests.tiny import FAMILIES, own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

# What llama.cpp has built in, by layer: src/models/smollm3.cpp, gemma2.cpp, gemma3.cpp, cohere2.cpp, olmo2.cpp,
# exaone4.cpp.
RULES = {
    "smollm3": ("no_rope_layers", lambda layer: int((layer + 1) % 4 != 0)),
    "gemma2": ("layer_types", lambda layer: "sliding_attention" if layer % 2 == 0 else "full_attention"),
    "gemma3_text": ("layer_types", lambda layer: "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention"),
    "olmo3": ("layer_types", lambda layer: "full_attention" if (layer + 1) % 4 == 0 else "sliding_attention"),
    "cohere2": ("layer_types", lambda layer: "full_attention" if (layer + 1) % 4 == 0 else "sliding_attention"),
    "exaone4": ("layer_types", lambda layer: "full_attention" if (layer + 1) % 4 == 0 else "sliding_attention"),
    "qwen3_5_text": ("layer_types", lambda layer: "full_attention" if (layer + 1) % 4 == 0 else "linear_attention"),
}
# The families' own intervals; those of `tiny_model` are shorter.
STOCK = {
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None},
    "gemma3_text": {"sliding_window_pattern": 6},
    "cohere2": {"sliding_window_pattern": 4},
    "exaone4": {"sliding_window_pattern": 4},
    "qwen3_5_text": {"full_attention_interval": 4},
}


def on_pattern(config) -> bool:
    """Whether a config's layers are those that llama.cpp takes them for; always, where it reads them all."""
    field, rule = RULES.get(config.model_type, (None, None))
    return field is None or getattr(config, field) == [rule(layer) for layer in range(config.num_hidden_layers)]


def stock_model(family, depth):
    return tiny_model(
        family, **own_names(family, num_hidden_layers=depth, tie_word_embeddings=True), **STOCK.get(family, {})
    )


def test_every_model_type_is_looked_at():
    assert set(FAMILIES) == set(supported_model_types())


@pytest.mark.parametrize("depth", [12, 14, 18])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_depths_on_offer_keep_the_pattern(family, depth):
    """Of every family and depth: anchors by size, and what lies between an anchor and the one above it."""
    upper = describe(stock_model(family, depth).config)
    assert on_pattern(upper.config) and not upper.off_pattern
    offered = {solve_anchor(upper, ratio / 20)[upper.family.depth_field] for ratio in range(8, 20)}
    for lower_depth in offered - {depth}:
        lower = cut_architecture(upper, {upper.family.depth_field: lower_depth})
        assert on_pattern(lower.config)
        kept = spaced_layers(depth, lower_depth, upper.fits)
        blocks = blocks_of(kept)
        between = list_sizes(upper, lower, blocks, kept)["shape"][upper.family.depth_field]
        assert between == reachable_depths(depth, blocks, kept, upper.fits)
        if family not in RULES:
            assert between == reachable_depths(depth, blocks)
        for target in between:
            swapped = blocks_for_depth(blocks, target, None, kept, upper.fits)
            stack = [n for i, block in enumerate(blocks) for n in (block if i in swapped else [kept[i]])]
            assert len(stack) == target and on_pattern(upper.with_layers(stack).config)


@pytest.mark.parametrize("family", RULES)
def test_a_depth_that_breaks_the_pattern_is_named(family):
    upper = describe(stock_model(family, 12).config)
    broken = cut_architecture(upper, {"num_hidden_layers": 5})
    field, rule = RULES[family]
    wrong = [layer for layer in range(5) if getattr(broken.config, field)[layer] != rule(layer)]
    assert broken.off_pattern == wrong and wrong
    assert field in broken.engine_limit() and f"{', '.join(map(str, wrong))} of this model" in broken.engine_limit()
    planned = broken.engine_limit(chosen=False)
    assert planned and field in planned and f"{wrong[-1]} of this model" not in planned
    assert upper.engine_limit() is None


def test_a_size_between_those_on_offer_says_how_others_are_had():
    upper = describe(stock_model("gemma3_text", 12).config)
    lower, blocks = cut_architecture(upper, {"num_hidden_layers": 6}), blocks_of(spaced_layers(12, 6))
    middle = (upper.num_parameters + lower.num_parameters) / 2
    with pytest.raises(ValueError, match=r"llama.cpp.* others are made where config names one \({'num_hidden_layers'"):
        solve_target(upper, lower, blocks, middle)
    with pytest.raises(ValueError, match=r"'num_hidden_layers': 6.*free\.$"):
        solve_target(upper, lower, blocks, middle, config={"num_hidden_layers": 6})


def test_a_source_off_the_pattern_has_all_depths_on_offer():
    """Nothing is kept by leaving depths out, and the limit is the source's own."""
    upper = describe(tiny_model("smollm3", num_hidden_layers=12).config)
    assert upper.off_pattern and "smollm3" in upper.engine_limit()
    lower = cut_architecture(upper, {"num_hidden_layers": 6})
    assert list_sizes(upper, lower, blocks_of(spaced_layers(12, 6)))["shape"]["num_hidden_layers"] == list(
        range(6, 13)
    )


@pytest.mark.parametrize(("total", "wanted"), [(9, [0, 4, 8]), (12, [0, 2, 5, 8, 11]), (12, [0, 1, 2, 3, 11])])
def test_fitting_layers_are_the_nearest(total, wanted):
    """Against every choice, where a layer may stand only at positions of its own parity."""
    import itertools

    def fits(layer, position):
        return layer % 2 == position % 2 or layer == total - 1

    choices = itertools.combinations(range(total - 1), len(wanted) - 1)
    fitting = [[*c, total - 1] for c in choices if all(fits(n, i) for i, n in enumerate(c))]
    found = fitting_layers(wanted, total, fits)
    assert found in fitting
    assert sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) == min(
        sum((a - b) ** 2 for a, b in zip(choice, wanted, strict=True)) for choice in fitting
    )
    assert fitting_layers(wanted, total, lambda layer, position: False) is None


# Family -> depths of a source and an anchor.
DEPTHS = {"smollm3": (16, 8), "gemma3_text": (24, 12)}


@pytest.fixture(scope="module", params=DEPTHS)
def chain(request, tmp_path_factory) -> Chain:
    """A source and an anchor of half its layers, chosen by measure."""
    source, anchor = DEPTHS[request.param]
    return build_chain(
        stock_model(request.param, source),
        [{"num_hidden_layers": anchor}],
        dataset=chain_rows(),
        output_dir=tmp_path_factory.mktemp(request.param) / "chain",
        args=chain_config(max_steps=1, save_strategy="no"),
        processing_class=tiny_tokenizer(),
        calibration_tokens=256,
    )


def test_a_built_anchor_keeps_the_pattern(chain):
    assert all(on_pattern(anchor.config()) for anchor in chain.anchors)


@pytest.mark.parametrize("operator", OPERATORS)
def test_targets_by_size_keep_the_pattern(chain, operator):
    """A size half way, where whole blocks give one; and the dry run has the layers that the target has."""
    middle = sum(anchor.num_parameters for anchor in chain.anchors) / 2
    model = from_chain(chain, middle, operator=operator)
    assert on_pattern(model.config) and "engine_limit" not in model.config.cbd_trl
    assert model.config.num_hidden_layers == sum(anchor.config().num_hidden_layers for anchor in chain.anchors) / 2
    summary = describe_targets(chain, [middle], operator=operator)[0]
    assert (summary.shape["num_hidden_layers"], summary.engine_limit) == (model.config.num_hidden_layers, None)


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_depths_by_name(chain, operator, tmp_path):
    """Made, and named where the pattern is left: in the record, on the card and in a dry run."""
    upper, lower = chain.anchors
    total = upper.config().num_hidden_layers
    by_blocks = reachable_depths(total, lower.block_map)
    pattern = reachable_depths(total, lower.block_map, lower.kept_layers, upper.architecture().fits)
    depth = {"num_hidden_layers": next(number for number in by_blocks if number not in pattern)}
    model = from_chain(chain, config=depth, operator=operator, save_directory=tmp_path / "model")
    limit = describe(model.config).engine_limit()
    assert (limit is None) == on_pattern(model.config)
    assert model.config.cbd_trl.get("engine_limit") == limit
    assert describe_targets(chain, config=depth, operator=operator)[0].engine_limit == limit
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("outside of transformers" in card) == (limit is not None)
    # The paper's average and the exact growth may give a layer of no kind of its own the kind that is assumed.
    assert limit is not None or operator in ("linear", "expand")


def test_expand_is_exact_where_layers_are_put_by_the_pattern(chain):
    from tests.surgery.helpers import TOLERANCE, difference

    lower = chain.anchors[1]
    for more in (2, 4, 6):
        depth = {"num_hidden_layers": lower.config().num_hidden_layers + more}
        model = from_chain(chain, config=depth, operator="expand", dtype=torch.float64)
        assert difference(model, lower.load_model(torch.float64)) <= TOLERANCE
