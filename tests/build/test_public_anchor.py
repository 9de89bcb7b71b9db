"""A model that exists already as an anchor: what is refused, what it is used for, and that it stays what it is."""

import copy
import json
import re
import shutil

import pytest
from transformers import BloomConfig, BloomForCausalLM

import cbd_trl.build.build as build_module
import cbd_trl.build.public_anchor as public_module
import cbd_trl.build.student as student_module
from cbd_trl import build_chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.build.plan import Given, plan_chain
from cbd_trl.build.width_hybrid import WidthHybrid
from cbd_trl.chain.source import Source
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import mixer
from tests.chain.helpers import chain_config, chain_rows, same_weights
from tests.public_configs import CONFIGS, save_config
from tests.surgery.helpers import TOLERANCE, logits
from tests.tiny import own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}


def upper(family="llama", **fields):
    return tiny_model(family, seed=1, **fields)


def public(family="llama", **fields):
    """A smaller model, trained apart as it were."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3} if family in ("gpt2", "gpt_neox") else {}
    return tiny_model(family, seed=2, **{**own_names(family, **SMALL, **heads), **fields})


def build(folder, anchors, source=None, **options):
    options = {"dataset": chain_rows(), "args": chain_config(), "calibration_tokens": 256, **options}
    options = {"processing_class": tiny_tokenizer(), **options}
    return build_chain(upper() if source is None else source, anchors, output_dir=folder, **options)


def saved(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is sorted, matched or trained."""

    def fail(*args, **kwargs):
        raise AssertionError("begun")

    monkeypatch.setattr(build_module, "_make_source_anchor", fail)
    monkeypatch.setattr(build_module, "_train_anchor", fail)


def _other_words(folder):
    return saved(public(), folder / "other", tiny_tokenizer([f"v{i}" for i in range(54)]))


def _more_words(folder):
    return saved(public(vocab_size=80), folder / "other", tiny_tokenizer([f"v{i}" for i in range(60)]))


def _few_rows(folder):
    return public(vocab_size=50)


def _adapter(folder):
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    return str(folder / "lora")


def _quantized(folder):
    place = saved(public(), folder / "small-4bit")
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (place / "config.json").write_text(json.dumps(config))
    return place


def _no_config(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def _chain_like(folder):
    saved(public(), folder / "a-chain" / "24K")
    return folder / "a-chain"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _other_words,
            r"anchors\[0\] \(.*other\) reads other tokens than the chain's tokenizer: 54 of the chain's 60",
        ),
        (_more_words, r"reads other tokens .*54 of the chain's 60 tokens have another id in its vocabulary of 66"),
        (_few_rows, r"anchors\[0\] .*has 50 vocabulary rows, and the chain's tokenizer 60 tokens"),
        (
            lambda folder: upper(num_hidden_layers=5),
            r"anchors\[0\] \(a model made in memory\) has .* no fewer than the .* of the source",
        ),
        (_adapter, r"The model of anchors\[0\] 'lora' is a PEFT adapter, not a plain model. Merge it first"),
        (_quantized, r"small-4bit\) is quantized, and an anchor is trained .* Give the model that was not quantized"),
        (_no_config, r"The model of anchors\[0\] '.*empty' is not a model folder"),
        (_chain_like, r"anchors\[0\] '.*a-chain' is not a model folder: .* these folders in it do: 24K"),
        (lambda folder: "org/not-fetched", r"anchors\[0\] 'org/not-fetched' is not a model folder and could not be"),
        (lambda folder: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2)), r"'bloom' has no descr"),
        (lambda folder: "44M", r"anchors\[0\] is the text '44M', .* A size is a number: 44e6\."),
        (lambda folder: "1.5 b", r"A size is a number: 1.5e9\."),
        (lambda folder: "0.6", r"A size is a number: 0.6\."),
        (
            lambda folder: {"model": "org/small", "num_hidden_layers": 3},
            r"anchors\[0\] has a model and num_hidden_layers: the shape is the model's. Leave it out",
        ),
    ],
)
def test_what_cannot_be_an_anchor_is_refused_before_any_work(tmp_path, no_work, make, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "chain", [make(tmp_path)])
    assert not (tmp_path / "chain").exists()


def test_the_same_model_twice_is_refused(tmp_path, no_work):
    first = saved(public(), tmp_path / "one")
    copied = shutil.copytree(first, tmp_path / "two")
    source = upper()
    for anchors in ([first, copied], [first, {"model": str(first)}], [copied, {"num_hidden_layers": 2}, first]):
        with pytest.raises(ValueError, match=r"is the same model as the model of anchors\[0\]\. Between two"):
            build(tmp_path / "chain", anchors)
    with pytest.raises(ValueError, match=r"anchors\[0\] \(a model made in memory\) is the same model as the source\."):
        build(tmp_path / "chain", [source], source)
    there = saved(source, tmp_path / "source")
    moved = shutil.copytree(there, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"anchors\[0\] \(.*moved\) is the same model as the source\."):
        build(tmp_path / "chain", [moved], there)
    assert not (tmp_path / "chain").exists()


def test_a_gated_model_is_refused(hub, tmp_path, no_work):
    hub.commit("you/gated", saved(public(), tmp_path / "gated"), "main")
    hub.repositories["you/gated"].private = True
    with pytest.raises(ValueError, match=r"anchors\[0\] 'you/gated' is not a model folder and could not be fetched"):
        build(tmp_path / "chain", ["you/gated"])
    # With a token of the owner's it can be planned: here the work begins.
    with pytest.raises(AssertionError, match="begun"):
        build(tmp_path / "chain", ["you/gated"], token="token-of-you")


def planned(source, *anchors, **options):
    """Plan a chain of configs alone."""
    origin = Source(source)
    given = Given(origin.tokenizer_or(None), None, [origin])
    return plan_chain(origin.architecture(), anchors, chain_config(**options), None, given)


@pytest.mark.parametrize(
    ("family", "above", "below", "reason"),
    [
        ("llama", {}, {"head_dim": 4}, r"differ in their head size: 8 and 4\. The meaning of a head's coordinates"),
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters"),
        ("llama", {}, {"num_hidden_layers": 5}, r"has more layers \(5\) than the source \(.*\) above it \(4\)"),
        ("llama", {"tie_word_embeddings": True}, {}, "has an output head of its own, and the source .* has none"),
        ("llama", {"vocab_size": 72}, {}, r"has 64 vocabulary rows, the source \(.*\) 72"),
        ("llama", {}, {"hidden_act": "gelu"}, r"they differ in \{'hidden_act': \('silu', 'gelu'\)"),
        ("llama", {}, {"attention_bias": True}, "attention_bias"),
        ("mistral", {}, {"sliding_window": 8}, "sliding_window"),
        # What no text of the check is long enough for.
        (
            "llama",
            {},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}},
            "rope_parameters",
        ),
        ("llama", {}, {"vocab_size": 72, "pad_token_id": 70}, "has a special token among the vocabulary rows"),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention"] * 4},
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            "layer types of .* do not occur in .* in that order",
        ),
    ],
)
def test_what_cannot_be_matched_teaches(tmp_path, family, above, below, reason):
    one, other = saved(upper(family, **above), tmp_path / "big"), saved(public(family, **below), tmp_path / "small")
    [step] = planned(one, other)
    assert step.public is not None and not step.public.matched
    assert step.public.summary.startswith("small teaches this anchor beside the one above, from which it is cut")
    assert step.public.record()["obstacle"] in step.public.summary
    assert re.search(reason, step.public.record()["obstacle"])
    # Cut from the one above, in its nearest shape, and taught by both.
    assert step.architecture.sizes["dim"] == 8 and len(step.args.teacher_weights) == 2


def test_another_model_type_teaches(tmp_path):
    one, other = saved(upper("mistral"), tmp_path / "big"), saved(public("llama"), tmp_path / "small")
    [step] = planned(one, other)
    assert "anchors[0] (small) is of the model type llama, the source (" in step.public.obstacle
    assert step.architecture.config.model_type == "mistral"


def test_a_model_of_the_coordinates_of_a_cut_anchor(tmp_path):
    """Below an anchor that was cut, as below the source; what is larger than that one is refused."""
    small = saved(public(num_hidden_layers=2), tmp_path / "small")
    steps = planned(saved(upper(), tmp_path / "big"), {"num_hidden_layers": 3}, {"model": str(small)})
    assert [step.public is None for step in steps] == [True, False] and steps[1].public.matched
    with pytest.raises(ValueError, match=r"anchors\[1\] .* no fewer than the .* above it\. .*large to small"):
        planned(tmp_path / "big", 0.3, small)


PAIRS = [
    ("openai-community/gpt2-xl", "openai-community/gpt2-large", None),
    ("openai-community/gpt2-large", "openai-community/gpt2", None),
    ("EleutherAI/pythia-410m", "EleutherAI/pythia-160m", None),
    ("EleutherAI/pythia-160m", "EleutherAI/pythia-70m", None),
    ("EleutherAI/pythia-1b", "EleutherAI/pythia-410m", r"differ in their head size: 256 and 64"),
    ("EleutherAI/pythia-1b", "EleutherAI/pythia-70m", r"differ in their head size: 256 and 64"),
    ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B", None),
    ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B", r"differ in their head size: 128 and 64"),
    ("google/gemma-3-1b-pt", "google/gemma-3-270m", None),
    ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-135M", None),
]


@pytest.mark.parametrize(("above", "below", "reason"), PAIRS)
def test_public_checkpoints(tmp_path, above, below, reason):
    [step] = planned(save_config(above, tmp_path), save_config(below, tmp_path))
    if reason is None:
        assert step.public.obstacle is None
        assert step.architecture.shape == describe(CONFIGS[below]).shape
    else:
        assert re.search(reason, step.public.obstacle)


UNCHANGED = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1}


@pytest.mark.parametrize(
    ("family", "above", "below"),
    [
        ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("llama", {}, {"vocab_size": 70, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama", {}, {"tie_word_embeddings": True, "rms_norm_eps": 0.01}),
        ("gpt2", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("gpt_neox", {"attention_bias": True}, {"attention_bias": True}),
        ("gemma3_text", {"num_hidden_layers": 6, "tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        pytest.param("qwen3", {}, {}, marks=pytest.mark.slow),
        pytest.param(
            "olmo2",
            {"num_key_value_heads": 4},
            {"num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_matched_model_stays_what_it_is(tmp_path, family, above, below):
    """In the coordinates of the anchor above, before it is trained: every logit, in the rows that the chain has."""
    model = public(family, **below)
    chain = build(tmp_path / "chain", [model], upper(family, **above), args=chain_config(**UNCHANGED))
    expected = logits(model)[..., :64]
    found = logits(chain.anchors[1].load_model())
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()
    record = chain.anchors[1].training["public_model"]
    assert record["obstacle"] is None and record["weights_sha256"]


def test_a_second_teacher(tmp_path):
    """The anchor is cut and learns from both; the model that was given stays as it was."""
    teacher = public(head_dim=4, vocab_size=62)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    requires = {key: parameter.requires_grad for key, parameter in teacher.named_parameters()}
    chain = build(tmp_path / "chain", [teacher])
    assert same_weights(teacher.state_dict(), before)
    assert {key: parameter.requires_grad for key, parameter in teacher.named_parameters()} == requires
    anchor = chain.anchors[1]
    assert anchor.shape["num_hidden_layers"] == 3 and anchor.architecture().sizes["dim"] == 8
    record = anchor.training["public_model"]
    assert "anchors[0] (a model made in memory) has 62 vocabulary rows" in record["obstacle"]
    assert record["model"] == "" and record["weights_sha256"]
    # Without it the anchor would be another one.
    fields = {"num_hidden_layers": 3, **{key: anchor.shape[key] for key in anchor.shape}}
    alone = build(tmp_path / "alone", [fields])
    assert not same_weights(alone.anchors[1].load_state_dict(), anchor.load_state_dict())


CHANGED = [
    ("another", r"changed arguments: \['model'\] \(there: 'small@\w+'; now: 'small@\w+'\)"),
    ("cut", r"changed arguments: \['model', 'way'\] \(there: 'small@\w+', 'matched'; now: None, None\)"),
]


def test_a_finished_anchor_of_another_model_is_another_anchor(tmp_path):
    small = saved(public(), tmp_path / "small")
    chain = build(tmp_path / "chain", [small])
    built = (tmp_path / "chain" / "chain.json").read_bytes()
    other = saved(tiny_model("llama", seed=5, **SMALL), tmp_path / "other" / "small")
    requests = {"another": other, "cut": chain.anchors[1].shape}
    for name, message in CHANGED:
        with pytest.raises(ValueError, match=rf"already holds the anchor .*{message}\. Choose another output_dir"):
            build(tmp_path / "chain", [requests[name]])
    # It is known by what it is, and not by where it lies.
    build(tmp_path / "chain", [shutil.copytree(small, tmp_path / "moved" / "small")])
    assert (tmp_path / "chain" / "chain.json").read_bytes() == built


@pytest.mark.parametrize("fields", [{}, {"head_dim": 4}], ids=["matched", "second-teacher"])
def test_an_interrupted_build_goes_on_and_does_not_match_again(tmp_path, interrupted, monkeypatch, fields):
    small = saved(public(**fields), tmp_path / "small")
    whole = build(tmp_path / "whole", [small])
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "chain", [small])
    other = saved(tiny_model("llama", seed=5, **SMALL, **fields), tmp_path / "other" / "small")
    with pytest.raises(ValueError, match=r"unfinished training .*changed: \['public_model.model'\]"):
        build(tmp_path / "chain", [other])
    steps = interrupted(None)
    monkeypatch.delattr(public_module, "_find_placement")
    resumed = build(tmp_path / "chain", [small])
    assert steps == [2]
    # No path goes where the chain goes.
    assert str(tmp_path) not in (tmp_path / "chain" / "chain.json").read_text()
    for ours, theirs in zip(resumed.anchors, whole.anchors, strict=True):
        assert same_weights(ours.load_state_dict(), theirs.load_state_dict())
        assert (ours.losses, ours.training, ours.block_map) == (theirs.losses, theirs.training, theirs.block_map)


def test_a_branch_that_moves_is_not_followed(hub, tmp_path, interrupted):
    first = hub.commit("org/small", saved(public(), tmp_path / "one"), "main", "v1")
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "chain", ["org/small"])
    steps = interrupted(None)
    hub.commit("org/small", saved(tiny_model("llama", seed=5, **SMALL), tmp_path / "two"), "main")
    # Interrupted, and finished.
    for _ in range(2):
        chain = build(tmp_path / "chain", ["org/small"])
        record = chain.anchors[1].training["public_model"]
        assert (record["model"], record["revision"], record["requested_revision"]) == ("org/small", first, None)
    assert steps == [2] and chain.anchors[1].training["origins"][0]["revision"] == first
    # A request for another commit is another request.
    with pytest.raises(ValueError, match=r"changed arguments: \['revision'\]"):
        build(tmp_path / "chain", [{"model": "org/small", "revision": hub.head("org/small")}])
    build(tmp_path / "chain", [{"model": "org/small", "revision": "v1"}])


@pytest.mark.parametrize("power", [0.0, 0.35])
def test_the_weight_of_a_model_trained_apart_is_measured(tmp_path, monkeypatch, power):
    """Once, before the training: with it hybrids and targets are made."""
    narrow, between = {"hidden_size": 24, "intermediate_size": 32}, {"hidden_size": 28, "intermediate_size": 40}
    tried, hybrids = [], []

    def mixing(pair, plan):
        tried.append(pair.alpha_power)
        mix = mixer(pair, plan)
        # Sure of itself without reason.
        factor = 1 if pair.alpha_power == power else 1000
        return lambda cut, lower: {key: tensor * factor for key, tensor in mix(cut, lower).items()}

    monkeypatch.setattr(public_module, "mixer", mixing)
    monkeypatch.setattr(
        student_module, "WidthHybrid", lambda pair, *args: hybrids.append(pair) or WidthHybrid(pair, *args)
    )
    chain = build(tmp_path / "chain", [tiny_model("llama", seed=2, **narrow)])
    assert tried == list(public_module.ALPHA_POWERS) and [pair.alpha_power for pair in hybrids] == [power]
    lower = chain.anchors[1]
    assert lower.apart and lower.alpha_power == power
    target = from_chain(chain, config=between)
    fraction = load_pair(*chain.anchors).fraction(describe(target.config))
    assert target.config.cbd_trl["alpha"] == pytest.approx(fraction**power)
    other = from_chain(chain, config=between, alpha=0.3)
    assert float((logits(other) - logits(target)).abs().max()) > 0.01


def test_blocks_are_swapped_in_the_order_of_what_each_gains(tmp_path):
    chain = build(tmp_path / "chain", [tiny_model("llama", seed=2, num_hidden_layers=2)])
    costs = chain.anchors[1].block_costs
    assert costs is not None and all(cost != 0 for cost in costs)
    match = chain.anchors[1].training["match"]
    assert match.keys() == {"width", "ffn", "heads"} and all(0 < kind["matched"] <= 1 for kind in match.values())


def test_layers_are_paired_so_that_sizes_lie_between(tmp_path):
    """By what its layers write, this model would stand beside blocks between which nothing lies."""
    above = upper(num_hidden_layers=8, intermediate_size=48)
    model = tiny_model("llama", seed=7, num_hidden_layers=4, intermediate_size=47)
    chain = build(tmp_path / "chain", [model], source=above)
    [between] = chain.sizes()
    assert between["num_parameters"][0] < between["num_parameters"][1]
    target = from_chain(chain, config={"num_hidden_layers": 6, "intermediate_size": 48})
    assert target.config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        (
            {"model": 0.5},
            TypeError,
            r"The model of anchors\[0\] is 0\.5\. Give a model, the path of a folder, or a Hub id",
        ),
        ({"revision": "v2", "num_hidden_layers": 2}, ValueError, r"anchors\[0\] has a revision, and no model"),
    ],
)
def test_a_dict_that_names_no_model_is_refused(tmp_path, no_work, anchor, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path / "chain", [anchor])


def test_a_list_of_anchors_is_a_list(tmp_path, no_work):
    with pytest.raises(TypeError, match=r"anchors is a LlamaForCausalLM, but must be a list .* anchors=\[model\]\.$"):
        build(tmp_path / "chain", public())


def test_a_damaged_model_is_named(tmp_path):
    broken = public()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model made in memory has a weight that is not finite .*up_proj"):
        build(tmp_path / "chain", [broken])


def test_a_second_teacher_of_few_positions_is_refused_before_any_work(tmp_path, no_work):
    few = tiny_model("gpt2", seed=2, n_layer=1, n_positions=8)
    with pytest.raises(ValueError, match="8"):
        build(tmp_path / "chain", [few], args=chain_config(max_length=32))


def test_a_public_model_is_rounded_once(tmp_path):
    """In a chain of bfloat16 it is moved in float32 first."""
    model = public(intermediate_size=48, hidden_size=32, tie_word_embeddings=False)
    chain = build(tmp_path / "chain", [model], source=upper().bfloat16(), args=chain_config(learning_rate=0.0))
    assert chain.anchors[1].dtype == "bfloat16"
    rounded = copy.deepcopy(model).bfloat16().float()
    errors = [
        float((logits(one.float()) - logits(model)).square().mean())
        for one in (chain.anchors[1].load_model(), rounded)
    ]
    assert errors[0] < 1.3 * errors[1]
