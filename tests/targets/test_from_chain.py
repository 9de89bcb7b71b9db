"""Models of any size from a chain: the right size and shape, from the right anchors, and stock in every respect."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from cbd_trl import Chain, from_chain
from cbd_trl.targets.operators import NESTED_ALPHA_POWER
from tests.chain.helpers import DEEP, SHAPES, WIDE, chain_rows, same_weights
from tests.surgery.helpers import logits


def anchor_weights(model, anchor):
    return same_weights(
        {key: model.state_dict()[key] for key in anchor.architecture().tensors}, anchor.load_state_dict()
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_sizes_are_met(chain, share):
    middle, smallest = chain.anchors[1:]
    wanted = smallest.num_parameters + share * (middle.num_parameters - smallest.num_parameters)
    model = from_chain(chain, wanted, tolerance=0.03)
    assert type(model) is LlamaForCausalLM and not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == model.num_parameters()
    assert abs(model.num_parameters() - wanted) <= 0.03 * wanted
    assert model.config.cbd_trl["num_parameters"] == model.num_parameters()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("operator", "shape"), SHAPES)
def test_shapes_are_met(chain, operator, shape):
    model = from_chain(chain, config=shape, operator=operator)
    assert {field: getattr(model.config, field) for field in shape} == shape
    if shape is DEEP:
        assert model.config.hidden_size == 32 and len(model.model.layers) == 5
    else:
        assert model.config.num_hidden_layers == 4 and model.model.layers[0].mlp.up_proj.weight.shape == (32, 24)


@pytest.mark.parametrize(("operator", "shape"), SHAPES)
def test_provenance(chain, operator, shape):
    model = from_chain(chain, config=shape, operator=operator)
    names = [anchor.name for anchor in (chain.anchors[:2] if shape is DEEP else chain.anchors[1:])]
    provenance = model.config.cbd_trl
    assert (provenance["chain"], provenance["anchors"], provenance["operator"]) == (chain.path.name, names, operator)
    assert {**provenance["shape"], **shape} == provenance["shape"]
    upper, lower = (chain[name].num_parameters for name in names)
    fraction = (upper - model.num_parameters()) / (upper - lower)
    alpha = {"linear": fraction, "nested": fraction**NESTED_ALPHA_POWER if shape is WIDE else None}.get(operator)
    assert provenance["alpha"] == (None if alpha is None else pytest.approx(alpha))


def test_what_it_is_made_of(chain):
    """For depth the block that costs most is the upper anchor's, and nothing else is."""
    upper, lower, _ = chain.anchors
    costs = [cost if len(block) == 2 else -1.0 for cost, block in zip(lower.block_costs, lower.block_map, strict=True)]
    costliest = costs.index(max(costs))
    above, below = upper.load_state_dict(), lower.load_state_dict()
    weights = from_chain(chain, config=DEEP).state_dict()
    key = "model.layers.{}.mlp.up_proj.weight"
    sources = []
    for i, block in enumerate(lower.block_map):
        sources += [(above, layer) for layer in block] if i == costliest else [(below, i)]
    for layer, (source, origin) in enumerate(sources):
        assert torch.equal(weights[key.format(layer)], source[key.format(origin)])
    assert torch.equal(weights["model.embed_tokens.weight"], below["model.embed_tokens.weight"])


def test_expand_is_the_lower_anchor(chain):
    for shape, anchor in ((DEEP, chain.anchors[1]), (WIDE, chain.anchors[2])):
        expected = logits(anchor.load_model())
        found = logits(from_chain(chain, config=shape, operator="expand"))
        assert (found - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_anchors_own_shape_is_that_anchor(chain, number):
    """Asked for by its size, by its whole shape, or by a size near it."""
    anchor = chain.anchors[number]
    for model in (
        from_chain(chain, anchor.num_parameters),
        from_chain(chain, float(anchor.num_parameters)),
        from_chain(chain, config=anchor.shape),
        from_chain(chain, anchor.num_parameters, config={"num_hidden_layers": anchor.shape["num_hidden_layers"]}),
        from_chain(chain, anchor.num_parameters * 1.001),
    ):
        assert anchor_weights(model, anchor)
        assert model.config.cbd_trl["anchors"] == [anchor.name] and model.config.cbd_trl["operator"] == "anchor"
        assert model.name_or_path == str(anchor.path)


def test_part_of_an_anchors_shape_is_that_anchor(chain):
    assert anchor_weights(from_chain(chain, config={"hidden_size": 16}), chain.anchors[2])
    assert anchor_weights(from_chain(chain, config={"num_hidden_layers": 4}), chain.anchors[1])


def test_an_operator_or_alpha_at_an_anchors_shape_is_obeyed(chain):
    middle, smallest = chain.anchors[1:]
    for options in ({"operator": "slice"}, {"alpha": 0.5}, {"operator": "linear", "alpha": 0.5}):
        model = from_chain(chain, config=smallest.shape, **options)
        assert model.config.cbd_trl["anchors"] == [middle.name, smallest.name]
        assert not anchor_weights(model, smallest)


def test_alpha_mixes(chain):
    weights = [from_chain(chain, config=WIDE, alpha=alpha).state_dict() for alpha in (0.0, 0.5, 1.0)]
    for name, share in (("mlp.down_proj", 1 / 2), ("self_attn.o_proj", 1 / 8)):
        upper, mixed, lower = (of[f"model.layers.1.{name}.weight"] for of in weights)
        torch.testing.assert_close(mixed, (1 - share) * upper + share * lower)
        assert not torch.equal(upper, lower)
    assert from_chain(chain, config=WIDE, alpha=0.25).config.cbd_trl["alpha"] == 0.25
    # Between anchors of equal widths nothing is mixed.
    assert from_chain(chain, config=DEEP, alpha=0.25).config.cbd_trl["alpha"] is None


def test_config_fixes_fields_and_the_size_decides_the_rest(chain):
    largest, smallest = chain.anchors[0], chain.anchors[2]
    wanted = (chain.anchors[1].num_parameters + smallest.num_parameters) / 2
    model = from_chain(chain, wanted, config={"intermediate_size": 40}, tolerance=0.1)
    assert model.config.intermediate_size == 40 and abs(model.num_parameters() - wanted) <= 0.1 * wanted
    assert from_chain(chain, largest.num_parameters, config={"num_hidden_layers": 6}).num_parameters() == (
        largest.num_parameters
    )


def test_the_chain_is_given_by_its_folder(chain, chain_folder):
    expected = from_chain(chain, config=WIDE).state_dict()
    for place in (chain_folder, str(chain_folder)):
        assert same_weights(from_chain(place, config=WIDE).state_dict(), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
        ("float64", torch.float64),
    ],
)
def test_dtype(chain, dtype, expected):
    for options in ({"config": WIDE}, {"num_parameters": chain.anchors[1].num_parameters}):
        model = from_chain(chain, dtype=dtype, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {model.config.dtype} == {expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"num_parameters=138e6"),
        ({"config": {}}, r"num_parameters=138e6"),
        ({"config": DEEP, "operator": "merge"}, r"'merge'.*nested, patch"),
        (
            {"config": WIDE, "operator": "slice", "alpha": 0.5},
            r"alpha=0.5 .*'slice'.*'nested'",
        ),
        ({"config": WIDE, "operator": "expand", "alpha": 0.5}, r"alpha=0.5 .*'expand'"),
        ({"config": DEEP, "operator": "patch", "alpha": 0.5}, r"alpha=0.5 .*'patch'"),
        ({"config": WIDE, "alpha": 1.5}, r"alpha=1.5 .*0 .* 1"),
        ({"config": WIDE, "alpha": -0.1}, r"alpha=-0.1 "),
        ({"config": WIDE, "alpha": float("nan")}, r"alpha=nan "),
        (
            {"config": WIDE, "operator": "patch"},
            r"operator='patch'.*'nested'",
        ),
        ({"config": WIDE, "dtype": "int8"}, r"dtype='int8'"),
        ({"config": WIDE, "dtype": "save"}, r"dtype='save'"),
        (
            {"config": {"num_layers": 5}},
            r"'num_layers'.*llama.*num_hidden_layers",
        ),
        ({"config": {"num_hidden_layers": 7}}, r"num_hidden_layers=7"),
        ({"config": {**DEEP, "hidden_size": 24}}, r"num_hidden_layers 4 to 6.*16 to 32"),
        ({"config": {**WIDE, "hidden_size": 26}}, r"width 26 .*4 heads: 24 and 28"),
        ({"num_parameters": 1e9}, r"num_parameters=1,000,000,000"),
        ({"num_parameters": 100}, r"num_parameters=100\b"),
        ({"num_parameters": 0.5}, r"num_parameters="),
        ({"num_parameters": float("nan")}, r"num_parameters=nan"),
        ({"num_parameters": float("inf")}, r"num_parameters=inf"),
        ({"num_parameters": "20K"}, r"num_parameters='20K'"),
        ({"config": {"hidden_size": "24"}}, r"hidden_size .*'24'"),
    ],
)
def test_what_cannot_be_made(chain, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_chain(chain, **arguments)


def test_beyond_the_tolerance_names_the_two_nearest(chain):
    lower = chain.anchors[1]
    five = from_chain(chain, config=DEEP).num_parameters()
    wanted = (five + lower.num_parameters) // 2
    with pytest.raises(ValueError, match=rf"tolerance=0.03 .* {lower.num_parameters:,} .* {five:,} "):
        from_chain(chain, wanted)
    assert from_chain(chain, wanted, tolerance=0.2).num_parameters() in (five, lower.num_parameters)


def test_damaged_weights_are_named(chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    weights = copy.anchors[1].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"model.safetensors"):
        from_chain(tmp_path / "copy", config=DEEP)


@pytest.mark.parametrize(("operator", "shape"), SHAPES)
def test_no_operator_runs_a_model_or_reads_text(chain, monkeypatch, operator, shape):
    def fail(*args, **kwargs):
        raise AssertionError("a forward pass or a tokenizer was used")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    monkeypatch.setattr("transformers.LlamaModel.forward", fail)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(AssertionError, match="a forward pass"):
        from_chain(chain, config=shape, operator=operator)(torch.ones(1, 2, dtype=torch.long))


# What peft says of an adapter whose base is not saved.
@pytest.mark.filterwarnings("ignore:Could not find a config file in .* made in memory and saved nowhere:UserWarning")
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_sft_trainer_trains_it(chain, tmp_path, peft_config):
    model = from_chain(chain, config=WIDE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    args = SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        max_length=32, learning_rate=1e-2, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    # No processing_class: the tokenizer is found by the model's name.
    trainer = SFTTrainer(model, args, train_dataset=chain_rows(4), peft_config=peft_config)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    if peft_config is None:
        assert not same_weights(dict(trainer.model.state_dict()), before)
    else:
        assert any(
            parameter.abs().max() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name
        )
    trainer.save_model(str(tmp_path / "trained"))
    assert (tmp_path / "trained" / "tokenizer.json").exists()
