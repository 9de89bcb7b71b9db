"""Config fields to architectures: what is cut, what travels, what is refused."""

import pytest

from cbd_trl.architectures import describe
from cbd_trl.shapes.budget import ParameterCount
from cbd_trl.shapes.cut import cut_architecture, needs_width_multiple_of_heads, width_follows_heads
from cbd_trl.surgery.blocks import spaced_layers
from tests.tiny import FAMILIES, LONGROPE, ROWS, WIDTH_OF_HEADS, own_names, tiny_model

OPTIONS = [
    *[(family, {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (False, True)],
    *[(family, row.biases) for family, row in ROWS.items() if row.biases],
    ("gpt2", {"n_inner": 40}),
]
NARROW = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}


def smaller(family):
    """Fields of a shape smaller than the tiny model in everything."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3} if family in WIDTH_OF_HEADS else {}
    return own_names(family, num_hidden_layers=3, **{**NARROW, **heads})


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_parameter_count_is_that_of_the_built_model(family, options):
    upper = describe(tiny_model(family, **options).config)
    target = cut_architecture(upper, smaller(family))
    built = type(tiny_model(family, **options))(target.config)
    kept = spaced_layers(upper.depth, target.depth, upper.fits)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert target.num_parameters == ParameterCount(upper)(kept, target.sizes) == count
    assert {key: value for key, value in target.shape.items() if key in smaller(family)} == smaller(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_disk(family, tmp_path):
    target = cut_architecture(describe(tiny_model(family).config), smaller(family))
    target.config.save_pretrained(tmp_path)
    loaded = type(target.config).from_pretrained(tmp_path)
    assert describe(loaded).shape == target.shape
    assert describe(loaded).sizes == target.sizes


def test_what_is_left_out_stays():
    upper = describe(tiny_model("llama").config)
    target = cut_architecture(upper, {"num_hidden_layers": 2})
    assert target.shape == {**upper.shape, "num_hidden_layers": 2}


def test_per_layer_lists_travel_with_the_kept_layers():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    target = cut_architecture(describe(model.config), {"num_hidden_layers": 3})
    assert target.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_unknown_field_lists_the_shape_fields():
    with pytest.raises(ValueError, match=r"'n_layer'.*llama.*num_hidden_layers"):
        cut_architecture(describe(tiny_model("llama").config), {"n_layer": 2})


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size"])
def test_larger_than_the_upper_anchor_is_refused(field):
    upper = describe(tiny_model("qwen3").config)
    most = upper.shape[field]
    with pytest.raises(ValueError, match=rf"{field}={most + 8} .* {most}\b"):
        cut_architecture(upper, {field: most + 8})


def test_more_query_heads_per_group_are_refused():
    upper = describe(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"4 query heads per key/value head.* 2 "):
        cut_architecture(upper, {"num_attention_heads": 4, "num_key_value_heads": 1})


def test_llama_width_off_the_heads_names_the_nearest():
    upper = describe(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"width 30 with 4 heads.* 28 and 32"):
        cut_architecture(upper, {"hidden_size": 30})


@pytest.mark.parametrize("family", [family for family in FAMILIES if not ROWS[family].whole_heads])
def test_other_families_take_that_width(family):
    assert cut_architecture(describe(tiny_model(family).config), {"hidden_size": 30}).sizes["width"] == 30


def test_phi3_with_longrope_takes_whole_heads_and_can_be_saved(tmp_path):
    upper = describe(tiny_model("phi3", rope_parameters=LONGROPE).config)
    with pytest.raises(ValueError, match=r"Phi-3 with longrope ties its width to its heads \(head size 8\)"):
        cut_architecture(upper, {"hidden_size": 24, "num_attention_heads": 4})
    target = cut_architecture(upper, {"hidden_size": 16})
    target.config.save_pretrained(tmp_path)
    loaded = describe(type(target.config).from_pretrained(tmp_path))
    assert loaded.shape == target.shape
    assert loaded.config.rope_parameters == target.config.rope_parameters


def test_which_families_tie_width_to_heads():
    needs = {family: needs_width_multiple_of_heads(describe(tiny_model(family).config)) for family in FAMILIES}
    assert needs == {family: ROWS[family].whole_heads for family in FAMILIES}
    follows = {family for family in FAMILIES if width_follows_heads(describe(tiny_model(family).config))}
    assert follows == set(WIDTH_OF_HEADS)


def test_a_depth_without_attention_is_refused():
    upper = describe(tiny_model("lfm2", layer_types=["conv", "full_attention", "full_attention", "conv"]).config)
    assert cut_architecture(upper, {"num_hidden_layers": 3}).depth == 3
    with pytest.raises(ValueError, match=r"None of the 2 layers of this lfm2 would have attention.*Keep more layers"):
        cut_architecture(upper, {"num_hidden_layers": 2})
