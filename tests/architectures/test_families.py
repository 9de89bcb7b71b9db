"""The description of a family against the models that transformers builds from the same config."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    PretrainedConfig,
    SmolLM3Config,
    StableLmConfig,
)

from cbd_trl.architectures import describe, supported_model_types
from cbd_trl.architectures.axes import tensor_shape
from cbd_trl.surgery.weights import weights_of
from tests.tiny import FAMILIES, LONGROPE, ROWS, WIDTH_OF_HEADS, tiny_model


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    return tiny_model(family, **overrides).config


OPTIONS = [
    (family, options)
    for family, row in ROWS.items()
    for options in ({}, *([row.biases] if row.biases else []), *row.options)
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "options"), OPTIONS, ids=lambda value: str(value))
def test_description_has_every_tensor_of_the_model(family, options, tied):
    config = tiny_config(family, tie_word_embeddings=tied, **options)
    model = AutoModelForCausalLM.from_config(config)
    architecture = describe(config)

    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if architecture.tied:
        del shapes["lm_head.weight"]
    described: dict[str, tuple[int, ...]] = {}
    for key, (name, _) in architecture.stored.items():
        shape, fused = list(tensor_shape(architecture.tensors[key], architecture.sizes)), architecture.fused(name)
        if fused is not None and name in described:
            shape[fused.axis] += described[name][fused.axis]
        described[name] = tuple(shape)
    constants = {key: value.item() for key, value in model.state_dict().items() if value.dim() == 0}
    assert constants == pytest.approx(architecture.constants)
    assert described | dict.fromkeys(constants, ()) == shapes
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert set(weights_of(model, architecture)) == set(architecture.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_modules_and_their_readers_read_that_axis(family):
    model = tiny_model(family, tie_word_embeddings=False)
    architecture = describe(model.config)
    modules = dict(model.named_modules())
    read = set()
    for site in architecture.sites:
        assert site.name in modules
        for reader in site.readers:
            assert site.axis in architecture.tensors[f"{reader}.weight"]
            read.add(reader)
    tables = {architecture.family.embedding, "transformer.wpe", "model.decoder.embed_positions"}
    # A convolution has each channel by itself.
    matrices = {
        key.removesuffix(".weight")
        for key, axes in architecture.tensors.items()
        if len(axes) > 1 and ("one",) not in axes and key.endswith(".weight")
    }
    assert matrices - tables == read
    assert architecture.sites[-1] == architecture.family.final_site


def test_unsupported_model_type_lists_the_supported_ones():
    assert supported_model_types() == sorted(FAMILIES)
    with pytest.raises(ValueError, match=rf"'bloom'.*model types: {', '.join(sorted(FAMILIES))}\."):
        describe(BloomConfig())


@pytest.mark.parametrize("option", ["add_cross_attention", "scale_attn_by_inverse_layer_idx"])
def test_unsupported_gpt2_option_is_named(option):
    with pytest.raises(ValueError, match=rf"{option}=True is not supported.*Supported: {option}=False"):
        describe(tiny_config("gpt2", **{option: True}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_layer_norm_before": False}, r"do_layer_norm_before=False.*no layer can be added.*=True"),
        ({"word_embed_proj_dim": 16}, r"word_embed_proj_dim=16 and hidden_size=32.*projections.*equal values"),
        ({"layer_norm_elementwise_affine": False}, r"elementwise_affine=False.*these norms have none.*=True"),
        ({"_remove_final_layer_norm": True}, r"_remove_final_layer_norm=True.*no gain could take up.*=False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_opt_option_is_named_with_the_reason(options, reason):
    with pytest.raises(ValueError, match=reason):
        describe(tiny_config("opt", **options))


def test_a_tied_nanochat_is_refused():
    config = tiny_config("nanochat")
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True.*nanochat.*no gain.*=False"):
        describe(config)


def test_the_norm_epsilon_of_opt_is_torchs_and_cannot_be_set():
    model = tiny_model("opt")
    architecture = describe(model.config)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {architecture.eps}
    with pytest.raises(ValueError, match=r"opt always has a norm epsilon of 1e-05; got 0.5"):
        architecture.with_eps(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_model_is_refused(family):
    config = tiny_config(family)
    config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ValueError, match=r"quantized.*Load it dequantized"):
        describe(config)


def test_uneven_heads_are_refused():
    # Set afterwards: transformers refuses some of these itself when the config is made.
    config = tiny_config("llama")
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"):
        describe(config)
    config = tiny_config("gpt2")
    config.n_embd = 30
    with pytest.raises(ValueError, match=r"n_embd=30 is not a multiple of n_head=4"):
        describe(config)


def test_shape_speaks_the_familys_own_field_names():
    assert describe(tiny_config("qwen3")).shape == {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert describe(tiny_config("gpt2")).shape == {"n_layer": 4, "n_embd": 32, "n_inner": 128, "n_head": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_resolving_an_architectures_own_shape_changes_nothing(family):
    architecture = describe(tiny_config(family))
    assert architecture.resolve_sizes(architecture.shape) == (architecture.depth, architecture.sizes)
    assert architecture.resolve_sizes({}) == (architecture.depth, architecture.sizes)


@pytest.mark.parametrize(
    ("fields", "depth", "changed"),
    [
        ({"num_hidden_layers": 2}, 2, {}),
        ({"hidden_size": 24}, 4, {"width": 24}),
        ({"intermediate_size": 40, "hidden_size": 24}, 4, {"width": 24, "ffn": 40}),
        ({"num_attention_heads": 2}, 4, {"group": 1}),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, 4, {"query": 1}),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 4, {"group": 1, "query": 3}),
    ],
    ids=str,
)
def test_resolve_sizes_of_llama(fields, depth, changed):
    architecture = describe(tiny_config("llama"))
    assert architecture.resolve_sizes(fields) == (depth, {**architecture.sizes, **changed})


@pytest.mark.parametrize(
    ("config", "fields", "changed"),
    [
        ({}, {"n_embd": 24}, {"width": 24, "group": 3, "ffn": 96}),
        ({}, {"n_head": 2}, {"width": 16, "group": 2, "ffn": 64}),
        ({}, {"n_embd": 24, "n_inner": 50}, {"width": 24, "group": 3, "ffn": 50}),
        ({"n_inner": 40}, {"n_embd": 24}, {"width": 24, "group": 3}),
    ],
    ids=str,
)
def test_resolve_sizes_of_gpt2_keeps_heads_and_width_together(config, fields, changed):
    architecture = describe(tiny_config("gpt2", **config))
    assert architecture.resolve_sizes(fields) == (4, {**architecture.sizes, **changed})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "llama",
            {"head_dim": 4},
            r"'head_dim' is not a shape field of llama\. Shape fields: num_hidden_layers, hidden",
        ),
        ("gpt2", {"hidden_size": 16}, r"'hidden_size' is not a shape field of gpt2\. Shape fields: n_layer, n_embd"),
        ("llama", {"hidden_size": 0}, r"hidden_size must be a positive integer, got 0"),
        ("llama", {"hidden_size": 24.0}, r"hidden_size must be a positive integer, got 24\.0"),
        ("llama", {"num_hidden_layers": True}, r"num_hidden_layers must be a positive integer, got True"),
        (
            "llama",
            {"num_attention_heads": 3},
            r"num_attention_heads=3 is not a multiple of num_key_value_heads=2.*both",
        ),
        ("gpt2", {"n_embd": 30}, r"head size 8.*n_embd=30 with n_head=3.*Choose n_embd = 8 x n_head"),
        ("gpt2", {"n_embd": 24, "n_head": 4}, r"n_embd=24 with n_head=4"),
        ("gpt_neox", {"hidden_size": 30}, r"GPT-NeoX ties .*Choose hidden_size = 8 x num_attention_heads"),
        ("gpt_neox", {"num_key_value_heads": 2}, r"not a shape field of gpt_neox"),
        ("opt", {"hidden_size": 4}, r"OPT ties .*hidden_size=4 with num_attention_heads=1"),
        ("opt", {"intermediate_size": 4}, r"not a shape field of opt\. .*ffn_dim"),
    ],
    ids=str,
)
def test_resolve_sizes_refuses(family, fields, message):
    with pytest.raises(ValueError, match=message):
        describe(tiny_config(family)).resolve_sizes(fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_resized_architecture_is_the_real_model_of_that_config(family):
    architecture = describe(tiny_config(family))
    heads = {"width": 16, "group": 2} if family in WIDTH_OF_HEADS else {"width": 20, "group": 1, "query": 1}
    smaller = architecture.resized(**heads, ffn=20)
    assert architecture.sizes["width"] == 32
    model = AutoModelForCausalLM.from_config(smaller.config)
    assert smaller.num_parameters == model.num_parameters()
    # The head size must survive a config file, where transformers would derive another one from the new width.
    again = describe(type(smaller.config).from_dict(json.loads(smaller.config.to_json_string())))
    assert (again.sizes, again.depth) == (smaller.sizes, smaller.depth)


@pytest.mark.parametrize("family", [family for family in WIDTH_OF_HEADS if family != "gpt2"])
def test_width_of_heads_goes_with_them(family):
    architecture = describe(tiny_config(family))
    narrow = {**architecture.sizes, "width": 24, "group": 3}
    assert architecture.resolve_sizes({"hidden_size": 24}) == (4, narrow)
    assert architecture.resolve_sizes({"num_attention_heads": 3}) == (4, narrow)
    with pytest.raises(ValueError, match=r"hidden_size=24 needs hidden_size / 8 heads.*got num_attention_heads=4"):
        architecture.resized(width=24)


def test_phi3_has_a_width_of_its_own_save_with_longrope():
    plain, longrope = (describe(tiny_config("phi3", **o)) for o in ({}, {"rope_parameters": LONGROPE}))
    assert plain.resolve_sizes({"hidden_size": 30})[1] == {**plain.sizes, "width": 30}
    narrow = {**longrope.sizes, "width": 16, "group": 1}
    for fields in ({"hidden_size": 16}, {"num_attention_heads": 2}, {"hidden_size": 16, "num_key_value_heads": 1}):
        assert longrope.resolve_sizes(fields) == (4, narrow)
    with pytest.raises(ValueError, match=r"Phi-3 with longrope ties.*hidden_size=30 with num_attention_heads=3|both"):
        longrope.resolve_sizes({"hidden_size": 30})
    # This is why.
    config = copy.deepcopy(longrope.config)
    config.hidden_size = 48
    with pytest.raises(ValueError, match="short_factor"):
        config.validate_rope()


def test_gpt2_width_without_its_heads_is_refused():
    with pytest.raises(
        ValueError, match=r"ties its width to its heads: n_embd=24 needs n_embd / 8 heads.*got n_head=4"
    ):
        describe(tiny_config("gpt2")).resized(width=24)


def test_phi_with_norms_of_queries_and_keys_is_refused():
    with pytest.raises(ValueError, match=r"phi with qk_layernorm=True.*LayerNorms.*Supported: qk_layernorm=False"):
        describe(tiny_config("phi", qk_layernorm=True))


def test_stablelm_with_a_norm_for_every_head_is_refused():
    with pytest.raises(ValueError, match=r"stablelm with qk_layernorm=True.*LayerNorm of its own.*qk_layernorm=False"):
        describe(tiny_config("stablelm", qk_layernorm=True))


def test_width_of_grouped_heads():
    architecture = describe(tiny_config("phi", num_key_value_heads=2))
    narrow = {**architecture.sizes, "width": 16, "group": 1}
    for fields in ({"hidden_size": 16}, {"num_attention_heads": 2}, {"hidden_size": 16, "num_key_value_heads": 1}):
        assert architecture.resolve_sizes(fields) == (4, narrow)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_that_attends_to_later_tokens_is_refused(family):
    with pytest.raises(ValueError, match=rf"{family} with use_bidirectional_attention=True.*no language model"):
        describe(tiny_config(family, use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("family", "options", "lists"),
    [
        ("smollm3", {}, {"no_rope_layers": [1, 0, 0, 0, 1], "layer_types": ["full"] + 3 * ["sliding"] + ["full"]}),
        (
            "smollm3",
            {"no_rope_layers": [0, 1, 1, 1]},
            {"no_rope_layers": [0, 1, 1, 1, 1], "layer_types": ["sliding"] + 4 * ["full"]},
        ),
        ("gemma2", {}, {"layer_types": ["sliding", "full", "full", "full", "sliding"]}),
        ("gemma3_text", {}, {"layer_types": 4 * ["sliding"] + ["full"]}),
        ("cohere2", {}, {"layer_types": 4 * ["sliding"] + ["full"]}),
        (
            "mistral",
            {"layer_types": [f"{sort}_attention" for sort in ("sliding", "full", "full", "sliding")]},
            {"layer_types": ["sliding", "sliding", "sliding", "full", "full"]},
        ),
    ],
    ids=str,
)
def test_what_a_layer_is_travels_with_it(family, options, lists):
    """Through selection and a config file; 3 and 1 stand where 1, 2 and 3 were."""
    architecture = describe(tiny_config(family, **options))
    picked = architecture.with_layers([0, 3, 3, 1, 2])
    again = type(picked.config).from_dict(json.loads(picked.config.to_json_string()))
    for config in (picked.config, again):
        for name, values in lists.items():
            assert [str(value).removesuffix("_attention") for value in getattr(config, name)] == list(map(str, values))


def _sliding(family: str) -> PretrainedConfig:
    return tiny_config(family, use_sliding_window=True, sliding_window=8, max_window_layers=2)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_per_layer_lists_travel_with_their_layers(family):
    architecture = describe(_sliding(family))
    full, sliding = "full_attention", "sliding_attention"
    assert architecture.config.layer_types == [full, full, sliding, sliding]
    picked = architecture.with_layers([0, 3, 3, 1, 2])
    assert picked.depth == picked.config.num_hidden_layers == 5
    assert picked.config.layer_types == [full, sliding, sliding, full, sliding]
    assert architecture.config.layer_types == [full, full, sliding, sliding]
    again = type(picked.config).from_dict(json.loads(picked.config.to_json_string()))
    assert again.layer_types == picked.config.layer_types


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_layers(family):
    architecture = describe(tiny_config(family))
    for key in architecture.tensors:
        layer, name = architecture.split_name(key)
        assert (name if layer is None else architecture.layer_name(layer, name)) == key
    assert {architecture.split_name(key)[0] for key in architecture.tensors} == {None, 0, 1, 2, 3}


def test_description_never_changes_its_config():
    config = tiny_config("llama")
    before = config.to_dict()
    architecture = describe(config)
    architecture.resized(width=16).with_layers([0]).with_eps(0.5)
    assert config.to_dict() == before
    assert architecture.with_eps(0.5).eps == 0.5


def test_parts_of_a_fused_tensor_are_runs_of_its_rows():
    """Phi-3: 4 query heads, then 2 key heads, then 2 value heads of 8; gate, then up."""
    model = tiny_model("phi3")
    weights = weights_of(model, describe(model.config))
    layer = model.model.layers[3]
    parts = [weights[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert [len(part) for part in parts] == [32, 16, 16]
    assert torch.equal(torch.cat(parts), layer.self_attn.qkv_proj.weight)
    up = layer.mlp.gate_up_proj.weight[48:]
    assert torch.equal(weights["model.layers.3.mlp.up_proj.weight"], up)
    assert weights["model.layers.3.mlp.up_proj.weight"].data_ptr() == up.data_ptr()


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (Gemma2Config(), 2_614_341_888),
        (
            Gemma3TextConfig(
                vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
                num_key_value_heads=1,
            ),
            999_885_952,
        ),
        (
            Olmo2Config(
                vocab_size=100352, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=16,
            ),
            1_484_916_736,
        ),
        (SmolLM3Config(), 3_075_098_624),
        (
            Cohere2Config(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8,
            ),
            8_028_033_024,
        ),
        (
            StableLmConfig(
                vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, use_qkv_bias=True
            ),
            1_644_515_328,
        ),
        (
            Lfm2Config(
                hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16,
                num_key_value_heads=8, full_attn_idxs=[2, 5, 8, 10, 12, 14],
            ),
            354_483_968,
        ),
        (PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32), 2_779_683_840),
    ],
    ids=[
        "gemma-2-2b", "gemma-3-1b", "OLMo-2-1B", "SmolLM3-3B", "command-r7b", "stablelm-2-1_6b", "LFM2-350M", "phi-2",
    ],
)  # fmt: skip
def test_parameter_counts_of_published_models(config, published):
    assert describe(config).num_parameters == published


def test_parameter_count_of_a_known_model():
    # SmolLM2-135M: 134,515,008 parameters with its tied table counted once.
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    assert describe(config).num_parameters == 134_515_008
    untied = LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": False})
    assert describe(untied).num_parameters == 134_515_008 + math.prod((49152, 576))


def test_layers_have_the_tensors_of_their_type_alone():
    architecture = describe(tiny_config("qwen3_5_text"))
    kinds = [architecture.kind(layer) for layer in range(4)]
    assert kinds == ["linear_attention", "full_attention"] * 2
    for layer, kind in enumerate(kinds):
        modules = {key.split(".")[3] for key in architecture.tensors if architecture.split_name(key)[0] == layer}
        assert modules & {"self_attn", "linear_attn"} == {"self_attn" if kind == "full_attention" else "linear_attn"}
    assert describe(tiny_config("gemma3_text")).kind(0) is None


def test_layers_of_a_kind_are_the_nearest_and_a_missing_kind_is_named():
    architecture = describe(tiny_config("qwen3_5_text"))
    like = architecture.with_layers([1, 0, 2, 3])
    assert architecture.of_kinds([0, 1, 2, 3], like) == [1, 0, 2, 3]
    with pytest.raises(ValueError, match=r"Layer 0.*type full_attention.*2 layers"):
        architecture.with_layers([0, 2]).of_kinds([0, 1, 1, 1], like)


def test_heads_of_linear_layers_are_kept_for_a_reason():
    with pytest.raises(
        ValueError, match=r"'linear_num_value_heads'.*keeps the heads of the linear layers.*fields: num_"
    ):
        describe(tiny_config("qwen3_5_text")).resolve_sizes({"linear_num_value_heads": 2})


def test_the_ffn_width_of_lfm2_is_that_which_is_built():
    adjusted = {"block_auto_adjust_ff_dim": True, "block_multiple_of": 20, "block_ffn_dim_multiplier": 1.1}
    architecture = describe(tiny_config("lfm2", intermediate_size=48, **adjusted))
    assert architecture.sizes["ffn"] == 40
    narrow = architecture.resized(width=24)
    assert (narrow.config.block_auto_adjust_ff_dim, narrow.config.intermediate_size) == (True, 48)
    assert narrow.sizes["ffn"] == 40 and narrow.sizes["conv"] == 24
    cut = architecture.resized(ffn=32)
    assert (cut.config.block_auto_adjust_ff_dim, cut.config.intermediate_size) == (False, 32)
    for one in (narrow, cut):
        built = AutoModelForCausalLM.from_config(one.config)
        assert sum(parameter.numel() for parameter in built.parameters()) == one.num_parameters


def test_layers_that_move_leave_no_index_of_lfm2_behind():
    config = describe(tiny_config("lfm2")).with_layers([1, 2, 3]).config
    assert config.full_attn_idxs is None and config.layer_types == ["full_attention", "conv", "full_attention"]
