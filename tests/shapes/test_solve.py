"""From a size to a shape: nearest, on the line, in range, loadable; or an error that says what is possible."""

import itertools
import time
from typing import Any

import pytest
from transformers import Lfm2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

from cbd_trl.architectures import describe
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.depths import blocks_for_depth
from cbd_trl.shapes.solve import list_sizes, solve_anchor, solve_target
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from tests.tiny import FAMILIES, ROWS, WIDTH_OF_HEADS, own_names

SIZES = {
    "vocab_size": 5000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# Where the width goes in whole heads, smaller ones let more sizes be met.
SMALL_HEADS = {**SIZES, "num_attention_heads": 12, "num_key_value_heads": 6}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
# What a family has beside the shape.
_FIELDS: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 16},
    "gpt2": {"n_head": 6, "n_inner": None, "n_positions": 64},
    # Off the pattern that engines have built in, so that all depths are on offer: see test_patterns.py for the others.
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"head_dim": 32, "layer_types": ["full_attention"] * 12},
    "gemma3_text": {"head_dim": 32, "sliding_window_pattern": 3},
    "olmo3": {"layer_types": ["full_attention"] * 12},
    "cohere2": {"sliding_window_pattern": 3},
    "exaone4": {"sliding_window_pattern": 2},
    "gpt_oss": {"num_local_experts": 8, "layer_types": ["full_attention"] * 12},
    "qwen3_5_text": {**ROWS["qwen3_5_text"].fields, "head_dim": 32},
}


def _config(family: str, **fields: Any) -> PretrainedConfig:
    head_size = {"head_dim": 32} if "head_dim" in ROWS[family].fields else {}
    shape = own_names(family, **(SMALL_HEADS if family in WIDTH_OF_HEADS else SIZES))
    untied = {} if ROWS[family].ties else {"tie_word_embeddings": False}
    return ROWS[family].config(**{**shape, "pad_token_id": 0, **head_size, **fields, **untied})


CONFIGS = {family: _config(family, **_FIELDS.get(family, {})) for family in FAMILIES}
CONFIGS["phi3_longrope"] = Phi3Config(**SMALL_HEADS, pad_token_id=0, rope_parameters=LONGROPE)
BLOCKS = blocks_of(spaced_layers(12, 7))
SAME_DEPTH = [[layer] for layer in range(12)]


def anchors(family, what):
    """Upper and lower architecture and block map of a pair that differs in depth, width or both."""
    upper = describe(CONFIGS[family])
    depth = {"num_hidden_layers": 7} if what != "width" else {}
    width = {}
    if what != "depth":
        groups = 2 * upper.sizes["group"] // 3
        heads = {"num_attention_heads": groups * upper.sizes["query"], "num_key_value_heads": groups}
        width = {"hidden_size": 128, "intermediate_size": 344, **heads}
    lower = cut_architecture(upper, own_names(upper.config.model_type, **depth, **width))
    return upper, lower, SAME_DEPTH if what == "width" else BLOCKS


def target_of(upper, fields, blocks, depth_rule="blocks"):
    """The target of a shape: of whole blocks, each lower layer of the type of the last layer of its block."""
    target = cut_architecture(upper, fields)
    if depth_rule != "blocks":
        return target
    swapped = blocks_for_depth(blocks, target.depth)
    stack = [n for i, block in enumerate(blocks) for n in (block if i in swapped else block[-1:])]
    return upper.with_layers(stack).resized(**target.sizes)


def sizes_between(upper, lower, count=13):
    step = (upper.num_parameters - lower.num_parameters) / (count - 1)
    return [lower.num_parameters + i * step for i in range(count)]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("what", ["width", "both"])
def test_every_size_between_is_met_within_range_and_loadable(family, what, tmp_path):
    upper, lower, blocks = anchors(family, what)
    for wanted in sizes_between(upper, lower):
        fields = solve_target(upper, lower, blocks, wanted)
        target = target_of(upper, fields, blocks)
        assert abs(target.num_parameters - wanted) <= 0.03 * wanted
        assert all(lower.shape[name] <= value <= upper.shape[name] for name, value in fields.items())
        target.config.validate()
        target.config.save_pretrained(tmp_path)
        assert describe(type(target.config).from_pretrained(tmp_path)).shape == fields


@pytest.mark.parametrize("what", ["depth", "width", "both"])
@pytest.mark.parametrize("family", CONFIGS)
def test_an_anchors_size_gives_its_shape(family, what):
    upper, lower, blocks = anchors(family, what)
    for anchor in (upper, lower):
        assert solve_target(upper, lower, blocks, anchor.num_parameters) == anchor.shape
        assert solve_target(upper, lower, blocks, config=anchor.shape) == anchor.shape


# The rule is one of depths.
@pytest.mark.parametrize(("what", "depth_rule"), [("width", "blocks"), ("both", "blocks"), ("both", "cut")])
@pytest.mark.parametrize("family", CONFIGS)
def test_depth_width_and_heads_never_shrink_as_the_size_grows(family, what, depth_rule):
    """The FFN width is the fine dial: it starts over where another dimension goes one step up."""
    upper, lower, blocks = anchors(family, what)
    found = [
        solve_target(upper, lower, blocks, wanted, depth_rule=depth_rule) for wanted in sizes_between(upper, lower, 48)
    ]
    sizes = [target_of(upper, fields, blocks, depth_rule).num_parameters for fields in found]
    # Of experts the dial turns all at once, and so much the sizes may differ from those of another width.
    turn = 3 * 8 * upper.sizes["width"] * upper.depth * upper.sizes["expert"] if "expert" in upper.sizes else 0
    assert all(later >= size - turn / 2 for size, later in itertools.pairwise(sizes)) and len(set(sizes)) > 24
    for field, dim in upper.family.shape_fields.items():
        values = [fields[field] for fields in found]
        if dim != "ffn":
            assert values == sorted(values)
            if what == "both":
                assert {lower.shape[field], upper.shape[field]} <= set(values)


def test_depth_pairs_give_the_nearest_depth():
    upper, lower, blocks = anchors("llama", "depth")
    per_layer = (upper.num_parameters - lower.num_parameters) // 5
    found = [
        solve_target(upper, lower, blocks, upper.num_parameters - (i + 0.3) * per_layer, tolerance=0.1)
        for i in range(5)
    ]
    assert [fields["num_hidden_layers"] for fields in found] == [12, 11, 10, 9, 8]


def test_width_follows_the_line():
    upper, lower, blocks = anchors("mistral", "width")
    fields = solve_target(upper, lower, blocks, (upper.num_parameters + lower.num_parameters) / 2)
    along = (fields["hidden_size"] - 128) / 64, (fields["intermediate_size"] - 344) / 168
    assert abs(along[0] - along[1]) < 0.15
    assert fields["hidden_size"] % 8 == fields["intermediate_size"] % 8 == 0
    # A width above the lower anchor's already gets the next whole group.
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (6, 3)


def test_real_llama_follows_the_line_in_a_fifth_of_a_second():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    upper = describe(config)
    middle = cut_architecture(upper, {"num_hidden_layers": 16})
    lower = cut_architecture(middle, {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6})
    assert (upper.num_parameters, middle.num_parameters, lower.num_parameters) == (134515008, 84953664, 44052864)
    same = [[layer] for layer in range(16)]
    # 432 = 6 x lcm(8, 9) is taken as it is; near 65M no such width lies near the line, and 477 = 53 x 9 does.
    assert solve_target(middle, lower, same, 55.7e6)["hidden_size"] == 432
    assert solve_target(middle, lower, same, 64.9e6)["hidden_size"] == 477
    start = time.perf_counter()
    fields = solve_target(upper, lower, blocks_of(spaced_layers(30, 16)), 80e6)
    assert time.perf_counter() - start < 0.2
    assert fields["num_hidden_layers"] == 23 and 460 <= fields["hidden_size"] <= 500


def test_config_fixes_a_field_and_the_size_decides_the_rest():
    upper, lower, blocks = anchors("qwen3", "both")
    wanted = (upper.num_parameters + lower.num_parameters) / 2
    fields = solve_target(upper, lower, blocks, wanted, config={"num_hidden_layers": 11})
    assert fields["num_hidden_layers"] == 11
    free = solve_target(upper, lower, blocks, wanted)
    assert fields["hidden_size"] <= free["hidden_size"]
    assert abs(cut_architecture(upper, fields).num_parameters - wanted) <= 0.03 * wanted


def test_config_alone_puts_the_rest_on_the_line():
    upper, lower, blocks = anchors("qwen3", "both")
    fields = solve_target(upper, lower, blocks, config={"hidden_size": 160})
    assert (fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]) == (160, 6, 3)
    assert fields["num_hidden_layers"] in (9, 10)
    assert abs((fields["intermediate_size"] - 344) / 168 - 0.5) < 0.15


def test_config_of_a_depth_pair_is_exact():
    upper, lower, blocks = anchors("gpt2", "depth")
    assert solve_target(upper, lower, blocks, config={"n_layer": 9}) == {**upper.shape, "n_layer": 9}


def test_heads_can_be_fixed():
    upper, lower, blocks = anchors("qwen2", "width")
    wanted = (upper.num_parameters + lower.num_parameters) / 2
    for config in ({"num_attention_heads": 4}, {"num_key_value_heads": 2}):
        fields = solve_target(upper, lower, blocks, wanted, config=config)
        assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (4, 2)


def test_anchors_that_differ_in_heads_or_queries_alone():
    upper = describe(Qwen3Config(**{**SIZES, "num_attention_heads": 12}, head_dim=32))
    lower = cut_architecture(upper, {"num_attention_heads": 6, "num_key_value_heads": 3})
    fields = solve_target(upper, lower, SAME_DEPTH, (upper.num_parameters + lower.num_parameters) / 2, tolerance=0.1)
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (9, 3)


@pytest.mark.parametrize("depth_rule", ["cut", "grown", "any"])
def test_without_blocks_every_depth_can_be_reached(depth_rule):
    upper = describe(CONFIGS["llama"])
    lower, blocks = cut_architecture(upper, {"num_hidden_layers": 4}), blocks_of([2, 5, 8, 11])
    fields = solve_target(upper, lower, blocks, config={"num_hidden_layers": 7}, depth_rule=depth_rule)
    assert fields["num_hidden_layers"] == 7
    with pytest.raises(ValueError, match=r"num_hidden_layers=7 .*4, 6, 8, 10, 12.*'slice'"):
        solve_target(upper, lower, blocks, config={"num_hidden_layers": 7})


def test_beyond_tolerance_names_the_two_nearest():
    upper = describe(CONFIGS["llama"])
    lower, blocks = cut_architecture(upper, {"num_hidden_layers": 4}), blocks_of([2, 5, 8, 11])
    sizes = [cut_architecture(upper, {"num_hidden_layers": depth}).num_parameters for depth in (6, 7, 8)]
    nearest = (
        f"Nearest: {sizes[0]:,} .*'num_hidden_layers': 6.* and {sizes[2]:,} .*'num_hidden_layers': 8.*raise tolerance"
    )
    with pytest.raises(ValueError, match=rf"tolerance=0.03 .*num_parameters={sizes[1]:,}.*{nearest}"):
        solve_target(upper, lower, blocks, sizes[1])
    assert solve_target(upper, lower, blocks, sizes[1], tolerance=0.2)["num_hidden_layers"] in (6, 8)


def test_config_that_leaves_the_size_out_of_reach():
    upper, lower, blocks = anchors("llama", "depth")
    with pytest.raises(ValueError, match=r"{'num_hidden_layers': 8}.* config "):
        solve_target(upper, lower, blocks, upper.num_parameters, config={"num_hidden_layers": 8})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Nothing was requested: give num_parameters, or config with fields such as num_hidden_layers"),
        ({"config": {}}, "Nothing was requested"),
        ({"size": -1}, "num_parameters must be a positive number, got -1"),
        ({"size": "138M"}, "num_parameters must be a positive number, got '138M'"),
        ({"size": True}, "num_parameters must be a positive number, got True"),
        ({"size": 9e9}, r"num_parameters=9,000,000,000 "),
        ({"size": 0.5}, "138e6 is 138M"),
        ({"config": {"hidden_size": 200}}, "hidden_size=200 is outside .* 128 to 192. Choose a value in that range"),
        ({"config": {"num_hidden_layers": 6}}, "num_hidden_layers=6 is outside .* 7 to 12"),
        ({"config": {"hidden_size": "160"}}, "hidden_size must be a positive integer, got '160'"),
        ({"config": {"n_embd": 160}}, "'n_embd' is not a shape field of llama"),
        ({"config": {"hidden_size": 160}}, r"width 160 with 6 heads.* 156 and 162"),
        ({"config": {"num_attention_heads": 5}}, "num_attention_heads=5 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_target(*anchors("llama", "both"), **arguments)


@pytest.mark.parametrize("costly", [0, 1])
def test_a_size_counts_the_layers_that_costs_choose(costly):
    """Layers with a convolution and with attention have different numbers of parameters."""
    kinds = ["conv"] * 3 + ["full_attention"] * 3
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(
        vocab_size=64, num_hidden_layers=6, layer_types=kinds, head_dim=16, block_auto_adjust_ff_dim=False, **shape
    )
    upper = describe(config)
    lower, blocks = upper.with_layers([2, 5]).resized(ffn=64), [[0, 1, 2], [3, 4, 5]]
    wanted = (upper.num_parameters + lower.num_parameters) / 2
    costs = [float(block == costly) for block in range(2)]
    fields = solve_target(upper, lower, blocks, wanted, {"num_hidden_layers": 4}, costs=costs, tolerance=0.4)
    stack = [0, 1, 2, 5] if costly == 0 else [2, 3, 4, 5]
    sizes = {ffn: upper.with_layers(stack).resized(ffn=ffn).num_parameters for ffn in range(64, 136, 8)}
    assert fields["intermediate_size"] == min(sizes, key=lambda ffn: abs(sizes[ffn] - wanted))


def test_heads_that_no_anchor_pair_can_make():
    upper = describe(Qwen3Config(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}, head_dim=32))
    lower = cut_architecture(upper, {"hidden_size": 128, "num_attention_heads": 4})
    with pytest.raises(ValueError, match=r"groups of 2.*128, 136, 144"):
        solve_target(upper, lower, SAME_DEPTH, config={"num_attention_heads": 4, "num_key_value_heads": 4})


def test_anchors_of_different_chains_are_refused():
    upper, _, blocks = anchors("llama", "depth")
    for other in (anchors("mistral", "depth")[1], describe(LlamaConfig(**{**SIZES, "vocab_size": 99}, head_dim=32))):
        with pytest.raises(ValueError, match="The anchors do not belong to one chain"):
            solve_target(upper, other, blocks, 1e6)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.6, 0.45, 0.3, 0.2])
def test_anchor_of_a_ratio(family, ratio):
    upper = describe(CONFIGS[family])
    fields = solve_anchor(upper, ratio)
    assert fields == solve_anchor(upper, ratio * upper.num_parameters)
    target = cut_architecture(upper, fields)
    target.config.validate()
    depth, per_layer = target.depth, (upper.num_parameters - anchors(family, "depth")[1].num_parameters) / 5
    assert 6 <= depth < 12
    if depth > 6:
        assert target.sizes == upper.sizes
    reach = per_layer / 2 if target.sizes == upper.sizes else 0.03 * ratio * upper.num_parameters
    assert abs(target.num_parameters - ratio * upper.num_parameters) <= reach


def test_anchor_narrows_in_proportion():
    upper = describe(CONFIGS["mistral"])
    fields = solve_anchor(upper, 0.3)
    assert fields["num_hidden_layers"] == 6
    assert abs(fields["hidden_size"] / 192 - fields["intermediate_size"] / 512) < 0.1


@pytest.mark.parametrize("size", [0, -1, 1, True, 1e12, "85M", float("nan")])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"ratio between 0 and 1"):
        solve_anchor(describe(CONFIGS["llama"]), size)


def test_anchor_smaller_than_anything():
    with pytest.raises(ValueError, match=r"1,000 parameters .* smallest"):
        solve_anchor(describe(CONFIGS["llama"]), 1000)


@pytest.mark.parametrize("family", CONFIGS)
def test_listed_sizes_hold_every_solved_one(family):
    upper, lower, blocks = anchors(family, "both")
    offer = list_sizes(upper, lower, blocks)
    assert offer["num_parameters"] == [lower.num_parameters, upper.num_parameters]
    for wanted in sizes_between(upper, lower, 7):
        for name, value in solve_target(upper, lower, blocks, wanted).items():
            assert value in offer["shape"][name]
