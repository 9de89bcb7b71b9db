"""Building a chain: what is written, and that it equals what the parts would make."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Tokenizer

from cbd_trl import Chain, build_chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.chain.manifest import SCHEMA_VERSION
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.blocks import select_layers
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import balance_norms
from cbd_trl.surgery.refit import refit_layers
from cbd_trl.surgery.reorder import importance
from cbd_trl.surgery.statistics_file import StoredStatistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.utils.blocks import token_blocks
from tests.chain.helpers import (
    BLOCKS,
    CHAIN_ANCHORS,
    assert_statistics_of,
    chain_config,
    chain_rows,
    chain_source,
    depth_of,
    same_weights,
    widths_of,
)
from tests.surgery.helpers import TOLERANCE, full_model, logits
from tests.tiny import HEADS, KINDS, MIXTURES, own_names, published
from tests.tokenizer import tiny_tokenizer


def build(folder, source=None, anchors=CHAIN_ANCHORS, **options):
    """The chain of the `chain` fixture, unless told otherwise."""
    options = {"dataset": chain_rows(), "args": chain_config(), "calibration_tokens": 256, **options}
    options.setdefault("processing_class", tiny_tokenizer())
    return build_chain(chain_source() if source is None else source, anchors, output_dir=folder, **options)


def test_the_first_anchor_is_the_source_sorted(chain):
    anchor, source = chain.anchors[0], chain_source()
    expected = logits(source.double())
    assert (logits(anchor.load_model(dtype=torch.float64)) - expected).abs().max() <= TOLERANCE * expected.std()
    weights, architecture = anchor.load_state_dict(), anchor.architecture()
    assert not same_weights(weights, weights_of(source, architecture))
    scores = importance(weights, architecture, StoredStatistics(anchor.statistics_file))
    for score in (scores.width, scores.ffn, scores.group):
        assert (score[..., :-1] >= score[..., 1:] * (1 - 1e-5)).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_source_with_a_head_of_its_own_is_on_its_principal_axes(tied, tmp_path):
    source = full_model("llama", tied, **depth_of("llama", 6)).float()
    args = chain_config(max_steps=1, save_strategy="no")
    chain = build(tmp_path / "chain", source, [depth_of("llama", 4)], args=args)
    statistics = StoredStatistics(chain.source.statistics_file)
    streams = [site.name for site in chain.source.architecture().sites if site.axis == ("width",)]
    second = sum(statistics.second(site) for site in streams)
    shared = (second - second.diag().diag()).norm() / second.norm()
    # Stored in 6 bits an entry.
    assert shared > 0.1 if tied else shared < 0.02
    assert tied or (second.diag().diff() <= 0.02 * second[0, 0]).all()


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    source = chain_source()
    # A row that the calibration text does not read.
    source.get_input_embeddings().weight.data[60] = float("inf")
    with pytest.raises(ValueError, match=r"anchor 49K has a weight that is not finite.*not written.*learning_rate"):
        build(tmp_path / "chain", source)
    assert not (tmp_path / "chain" / "chain.json").exists()


def test_what_chain_json_tells(chain, chain_folder):
    body = json.loads((chain_folder / "chain.json").read_text())
    assert body["schema_version"] == SCHEMA_VERSION
    assert body["versions"].keys() == {"cbd-trl", "torch", "transformers", "trl"}
    source, deep, wide = body["anchors"]
    assert [entry["parent"] for entry in body["anchors"]] == [None, source["name"], deep["name"]]
    assert [entry["name"] for entry in body["anchors"]] == ["49K", "33K", "8.8K"]
    assert [entry["num_parameters"] for entry in body["anchors"]] == [
        AutoModelForCausalLM.from_pretrained(anchor.path).num_parameters() for anchor in chain.anchors
    ]
    assert [anchor.block_map for anchor in chain.anchors] == [None, BLOCKS, [[0], [1], [2], [3]]]
    assert source["shape"] == describe(chain_source().config).shape
    assert deep["shape"] == {**source["shape"], **CHAIN_ANCHORS[0]}
    assert wide["shape"] == {**deep["shape"], **CHAIN_ANCHORS[1]}
    assert source["tokens_seen"] == 0 and source["losses"] == {}
    for entry in (deep, wide):
        # Three steps of four rows of 6 to 14 words and an end.
        assert 3 * 4 * 7 <= entry["tokens_seen"] <= 3 * 4 * 15
        assert {"loss", "kd", "ce", "teacher_ce", "eval_loss", "eval_kd"} <= entry["losses"].keys()
        values = entry["training"]["arguments"]["values"]
        assert (values["learning_rate"], values["max_steps"]) == (1e-2, 3)
    # A narrower stream is not held to the wider one.
    assert "hidden" in deep["losses"] and "hidden" not in wide["losses"]
    for entry in body["anchors"]:
        assert entry["finished"] and entry["dtype"] == "float32"
        assert {"config.json", "model.safetensors", "statistics.safetensors", "tokenizer.json"} <= entry[
            "files"
        ].keys()


def test_each_anchor_is_a_model_folder(chain):
    for anchor in chain.anchors:
        assert logits(AutoModelForCausalLM.from_pretrained(anchor.path)).isfinite().all()
        assert AutoTokenizer.from_pretrained(anchor.path).chat_template == tiny_tokenizer().chat_template
        assert GenerationConfig.from_pretrained(anchor.path).temperature == 0.7


def test_the_evaluation_loss_is_that_of_the_stored_anchor(chain):
    rows = [tiny_tokenizer()(row["text"] + " </s>", return_tensors="pt")["input_ids"] for row in chain_rows(4, seed=9)]
    for anchor in chain.anchors[1:]:
        model = anchor.load_model()
        with torch.no_grad():
            losses = [(model(ids, labels=ids).loss, ids.shape[1] - 1) for ids in rows]
        mean = sum(float(loss) * count for loss, count in losses) / sum(count for _, count in losses)
        assert anchor.losses["eval_ce"] == pytest.approx(mean, rel=1e-4)


def test_the_statistics_are_those_of_the_stored_anchor(chain):
    blocks = token_blocks(chain_rows(), tiny_tokenizer(), 256, 64).input_ids
    for anchor in chain.anchors:
        assert_statistics_of(anchor, blocks)


def refitted(cut, architecture, upper, blocks):
    """A cut of an anchor after the refit, as build_chain calibrates it."""
    model = build_model(architecture, {key: tensor.clone() for key, tensor in cut.items()}, torch.float32)
    text = token_blocks(chain_rows(), tiny_tokenizer(), 256, 64).input_ids
    refit_layers(model, upper.load_model(), architecture, blocks, [{"input_ids": batch} for batch in text.split(4)])
    return weights_of(model, architecture)


def assert_close(weights, expected):
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


def test_an_anchor_starts_as_the_refitted_cut_of_the_one_above(tmp_path):
    """Nothing is learned at learning rate 0, so what is stored is what training starts from."""
    chain = build(tmp_path / "chain", args=chain_config(learning_rate=0.0))
    upper, deep, wide = chain.anchors
    cut, architecture = select_layers(upper.load_state_dict(), upper.architecture(), deep.kept_layers)
    assert_close(deep.load_state_dict(), refitted(cut, architecture, upper, deep.block_map))
    statistics = StoredStatistics(deep.statistics_file)
    narrow = least_squares_cut(deep.load_state_dict(), architecture, statistics, wide.architecture())
    cut = balance_norms(narrow, wide.architecture())
    assert_close(wide.load_state_dict(), refitted(cut, wide.architecture(), deep, [[0], [1], [2], [3]]))


def test_depth_and_width_at_once(tmp_path):
    anchors = [{**CHAIN_ANCHORS[0], **CHAIN_ANCHORS[1]}]
    upper, lower = build(tmp_path / "chain", anchors=anchors, args=chain_config(learning_rate=0.0)).anchors
    assert lower.arguments["swap_probability"] == 1.0
    narrow = upper.architecture().resized(**lower.architecture().sizes)
    statistics = StoredStatistics(upper.statistics_file)
    cut = least_squares_cut(upper.load_state_dict(), upper.architecture(), statistics, narrow)
    cut, architecture = select_layers(balance_norms(cut, narrow), narrow, lower.kept_layers)
    assert_close(lower.load_state_dict(), refitted(cut, architecture, upper, lower.block_map))


def test_anchors_learn(tmp_path):
    """More steps bring an anchor nearer to its teacher, on the text it learns from; all of them are counted."""
    options = {"anchors": CHAIN_ANCHORS[:1], "eval_dataset": chain_rows()}
    few, many = (
        build(
            tmp_path / str(steps),
            args=chain_config(max_steps=steps, ce_weight=0.0, save_strategy="no", logging_steps=7),
            **options,
        ).anchors[1]
        for steps in (1, 48)
    )
    assert many.losses["eval_kd"] < 0.9 * few.losses["eval_kd"]
    # Eight times over the rows, each of which has an end token; logged was the last of seven steps.
    assert many.tokens_seen == 8 * sum(len(row["text"].split()) + 1 for row in chain_rows()) > 20 * few.tokens_seen > 0


def test_an_anchor_is_trained_with_hybrids_beside_it(tmp_path):
    """In depth and in width, the step with a hybrid is another one."""
    stored = []
    for swap in (0.0, 1.0):
        args = chain_config(max_steps=1, swap_probability=swap, save_strategy="no")
        stored.append(build(tmp_path / str(swap), args=args).anchors)
    for plain, beside in zip(stored[0][1:], stored[1][1:], strict=True):
        assert beside.losses["loss"] > 1.5 * plain.losses["loss"]
        assert list(beside.load_state_dict()) == list(plain.load_state_dict())
        assert not same_weights(beside.load_state_dict(), plain.load_state_dict())


def test_chain_defaults_are_in_force_and_the_callers_arguments_untouched(chain, tmp_path):
    assert [anchor.arguments["hidden_weight"] for anchor in chain.anchors[1:]] == [2.0, 0.0]
    assert [anchor.arguments["swap_probability"] for anchor in chain.anchors[1:]] == [0.5, 1.0]
    args = chain_config(hidden_weight=0.0, swap_probability=0.0, max_steps=1)
    anchor = build(tmp_path / "chain", anchors=CHAIN_ANCHORS[:1], args=args).anchors[1]
    assert (anchor.arguments["hidden_weight"], anchor.arguments["swap_probability"]) == (0.0, 0.0)
    assert "hidden" not in anchor.losses and "hidden" in chain.anchors[1].losses
    args = chain_config(max_steps=1)
    before = args.to_dict()
    build(tmp_path / "other", anchors=CHAIN_ANCHORS[:1], args=args)
    assert args.to_dict() == before


def test_an_anchor_may_have_arguments_and_text_of_its_own(chain, tmp_path):
    short = chain_rows(8, seed=4)
    own = {**CHAIN_ANCHORS[1], "args": chain_config(max_steps=1, hidden_weight=0.5), "dataset": short}
    built = build(tmp_path / "chain", anchors=[CHAIN_ANCHORS[0], own])
    assert same_weights(built.anchors[1].load_state_dict(), chain.anchors[1].load_state_dict())
    record = built.anchors[2]
    assert (record.arguments["max_steps"], record.arguments["hidden_weight"]) == (1, 0.5)
    assert (
        StoredStatistics(record.statistics_file).tokens
        == token_blocks(short, tiny_tokenizer(), 256, 64).input_ids.numel()
    )
    assert record.tokens_seen < built.anchors[1].tokens_seen


def test_anchors_as_sizes(tmp_path):
    source = chain_source()
    total = source.num_parameters()
    chain = build(tmp_path / "chain", source, [0.7, total * 0.3], args=chain_config(max_steps=1, save_strategy="no"))
    assert chain.anchors[1].num_parameters == pytest.approx(0.7 * total, rel=0.15)
    assert chain.anchors[1].shape["num_hidden_layers"] == 4 and chain.anchors[1].shape["hidden_size"] == 32
    assert chain.anchors[2].num_parameters == pytest.approx(0.3 * total, rel=0.15)


@pytest.mark.parametrize("what", ["memory", "folder", "folder as bfloat16"])
def test_dtype(what, tmp_path):
    """A model in memory keeps its dtype; a folder is read in float32, as TRL does, unless told otherwise."""
    source = chain_source().bfloat16()
    args = chain_config(max_steps=1, model_init_kwargs={"dtype": "bfloat16"} if what == "folder as bfloat16" else None)
    if what != "memory":
        source.save_pretrained(tmp_path / "source")
        tiny_tokenizer().save_pretrained(tmp_path / "source")
    chain = build(
        tmp_path / "chain",
        source if what == "memory" else str(tmp_path / "source"),
        args=args,
        processing_class=tiny_tokenizer() if what == "memory" else None,
    )
    dtype = "float32" if what == "folder" else "bfloat16"
    assert [anchor.dtype for anchor in chain.anchors] == [dtype] * 3
    assert from_chain(chain, config={"num_hidden_layers": 5}).dtype == getattr(torch, dtype)
    if what != "memory":
        # The folder's name alone: a path would go where the chain goes.
        assert chain.anchors[0].training["source"].startswith("source@")


def test_a_source_in_memory_is_left_as_it_was(tmp_path):
    source = chain_source().train()
    build(tmp_path / "chain", source, CHAIN_ANCHORS[:1], args=chain_config(max_steps=1))
    assert same_weights(dict(source.state_dict()), dict(chain_source().state_dict()))
    assert source.training and source.config.to_dict() == chain_source().config.to_dict()
    assert all(parameter.requires_grad for parameter in source.parameters())


def qwen2_tokenizer():
    """AutoTokenizer reads whatever lies beside a Qwen2 model as one of these, so it must be one."""
    vocabulary = ["<|endoftext|>", *"w0123456789Ġ"]
    return Qwen2Tokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])


# Mixtures of experts have tests of their own: test_experts.py.
# A family of each kind, with the head that it is published with: a tied and an untied Llama are built above.
_OTHERS = [
    pytest.param(
        family,
        tied,
        id=f"{family}-{'tied' if tied else 'untied'}",
        marks=() if family in KINDS and published(family, tied) else pytest.mark.slow,
    )
    for family, tied in HEADS
    if family not in ("llama", *MIXTURES)
]


@pytest.mark.parametrize(("family", "tied"), _OTHERS)
def test_other_families(family, tied, tmp_path):
    source = full_model(family, tied, **depth_of(family, 6)).float()
    width = widths_of(family, CHAIN_ANCHORS[1])
    args = chain_config(max_steps=1, save_strategy="no")
    tokenizer = qwen2_tokenizer() if family == "qwen2" else tiny_tokenizer()
    anchors = [depth_of(family, 4), width]
    chain = build(tmp_path / "chain", source, anchors, args=args, processing_class=tokenizer)
    expected = logits(source.double())
    first = chain.anchors[0].load_model(dtype=torch.float64)
    assert (logits(first) - expected).abs().max() <= TOLERANCE * expected.std()
    between = own_names(family, hidden_size=24)
    for config in (depth_of(family, 5), between):
        model = from_chain(chain, config=config, save_directory=tmp_path / "made")
        assert type(model) is type(source) and logits(model).isfinite().all()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
        assert torch.equal(logits(loaded), logits(model))
        for field, value in config.items():
            assert getattr(loaded.config, field) == value
        for operator in ("slice", "expand", "linear"):
            other = from_chain(chain, config=config, operator=operator, dtype=torch.float64)
            assert logits(other).isfinite().all() and not torch.equal(logits(other), logits(model))
    # Grown, the smallest anchor stays what it was. from_chain grows in float32 (tests/surgery proves it in float64).
    grown = from_chain(chain, config=between, operator="expand", dtype=torch.float64)
    expected = logits(chain.anchors[2].load_model(dtype=torch.float64))
    assert (logits(grown) - expected).abs().max() <= 1e-4 * expected.std()


def test_what_comes_back_is_the_chain_on_disk(tmp_path):
    built = build(tmp_path / "chain", anchors=[{"num_hidden_layers": 4}], args=chain_config(max_steps=1))
    opened = Chain.from_pretrained(tmp_path / "chain")
    assert built.anchors == opened.anchors
    assert not list((tmp_path / "chain" / ".work").glob("*"))


def test_the_record_of_the_arguments_is_plain_json(chain):
    training = chain.anchors[1].arguments
    assert training["lr_scheduler_type"] == "linear" and training["adam_beta2"] == 0.999


def test_an_anchors_args_must_be_a_config(tmp_path):
    with pytest.raises(TypeError, match="args of an anchor are a dict, but must be a DistillConfig"):
        build(tmp_path / "chain", anchors=[{"num_hidden_layers": 4, "args": {"max_steps": 1}}])
    assert not (tmp_path / "chain").exists()
