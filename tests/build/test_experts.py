"""The whole way of mixtures of experts: layers are dropped, then channels, neurons and experts."""

import functools

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from cbd_trl import build_chain, chain_from_anchors, from_chain
from cbd_trl.architectures import architecture_of, describe
from cbd_trl.report.sweep import SweepTarget, sweep
from cbd_trl.targets.many import describe_targets
from cbd_trl.targets.operators import OPERATORS
from cbd_trl.utils.formatting import format_count
from tests.chain.helpers import chain_config, chain_rows
from tests.surgery.helpers import TOLERANCE, difference, tokens
from tests.tiny import MIXTURES, own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

every_mixture = pytest.mark.parametrize("family", MIXTURES)


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory):
    """family -> its source and a chain of 4 layers and 6 experts, 3 layers, and narrower with 4 experts."""

    @functools.cache
    def make(family):
        source = tiny_model(family, tie_word_embeddings=True)
        narrow = own_names(family, hidden_size=24, intermediate_size=32)
        return source, build_chain(
            source,
            [own_names(family, num_hidden_layers=3), {**narrow, "num_experts": 4}],
            dataset=chain_rows(),
            output_dir=tmp_path_factory.mktemp(family) / "chain",
            args=chain_config(max_steps=2, save_strategy="no"),
            processing_class=tiny_tokenizer(),
            calibration_tokens=256,
        )

    return make


@every_mixture
def test_the_first_anchor_is_the_source(chain_of, family):
    source, chain = chain_of(family)
    assert difference(chain.anchors[0].load_model(), source) <= 10 * TOLERANCE
    assert [anchor.architecture().sizes["expert"] for anchor in chain.anchors] == [6, 6, 4]


@every_mixture
def test_files_are_those_that_transformers_writes(chain_of, family, tmp_path):
    _, chain = chain_of(family)
    anchor = chain.anchors[2]
    loaded = AutoModelForCausalLM.from_pretrained(anchor.path)
    assert difference(loaded, anchor.load_model()) == 0
    loaded.save_pretrained(tmp_path)
    names = []
    for folder in (anchor.path, tmp_path):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "request_",
    [{"num_experts": 5}, {"hidden_size": 28}, {"num_experts": 4, "hidden_size": 24}],
    ids=lambda fields: "-".join(fields),
)
@every_mixture
def test_targets_are_stock_models(chain_of, family, request_, tmp_path):
    _, chain = chain_of(family)
    model = from_chain(chain, config=request_, save_directory=tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {field: getattr(loaded.config, field) for field in request_} == request_
    assert difference(loaded, model) == 0 and describe(loaded.config).sizes == architecture_of(model).sizes
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = tokens(2, 5)
    written = [
        loaded.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cache, **options)
        for cache in (False, True)
    ]
    assert written[0].shape == (2, 11) and torch.equal(*written)


@pytest.mark.parametrize("operator", ["nested", "linear", "slice"])
@every_mixture
def test_sizes_are_of_all_parameters_and_some_are_active(chain_of, family, operator):
    _, chain = chain_of(family)
    upper, lower = (anchor.architecture() for anchor in chain.anchors[1:])
    size = (upper.num_parameters + lower.num_parameters) / 2
    (summary,) = describe_targets(chain, [size], operator=operator)
    model = from_chain(chain, size, operator=operator)
    assert model.num_parameters() == summary.num_parameters == pytest.approx(size, rel=0.03)
    assert 4 <= summary.shape["num_experts"] <= 6
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = experts * (1 - 2 / summary.shape["num_experts"])
    assert summary.active_parameters == pytest.approx(summary.num_parameters - unused, abs=1)


@every_mixture
def test_growth_is_exact_or_refused(chain_of, family):
    _, chain = chain_of(family)
    fields = own_names(family, hidden_size=28, intermediate_size=40)
    reference = chain.anchors[2].load_model()
    model = from_chain(chain, config={**fields, "num_experts": 4}, operator="expand")
    assert difference(model, reference) <= 10 * TOLERANCE
    if family == "qwen3_moe":
        with pytest.raises(ValueError, match=r"grow 4 experts to 5.*has no bias"):
            from_chain(chain, config={**fields, "num_experts": 5}, operator="expand")
    else:
        model = from_chain(chain, config={**fields, "num_experts": 5}, operator="expand")
        assert difference(model, reference) <= 10 * TOLERANCE


@every_mixture
def test_a_report_leaves_out_what_cannot_be_grown(chain_of, family):
    _, chain = chain_of(family)
    found = sweep(chain, [SweepTarget(config={"num_experts": 5})], evaluate=lambda model: 1.0)
    (row,) = found["targets"]
    assert row["shape"]["num_experts"] == 5
    assert set(OPERATORS) - row["loss"].keys() == ({"patch", "expand"} if family == "qwen3_moe" else {"patch"})


@every_mixture
def test_cards_count_what_is_active(chain_of, family, tmp_path):
    _, chain = chain_of(family)
    anchor = chain.anchors[2]
    unused = sum(p.numel() for name, p in anchor.load_model().named_parameters() if ".experts." in name) // 2
    count = f"{anchor.num_parameters:,} ({format_count(anchor.num_parameters - unused)} active)"
    assert count in (chain.path / "README.md").read_text() and count in (anchor.path / "README.md").read_text()
    from_chain(chain, config={"num_experts": 5}, save_directory=tmp_path / "model")
    assert " active) parameters that" in (tmp_path / "model" / "README.md").read_text()


def test_mixtures_are_not_matched(tmp_path):
    anchors = [tiny_model("qwen3_moe", num_experts=number) for number in (6, 4)]
    with pytest.raises(ValueError, match=r"qwen3_moe cannot be matched.*align=False"):
        chain_from_anchors(
            anchors, dataset=chain_rows(), output_dir=tmp_path / "chain", processing_class=tiny_tokenizer()
        )
