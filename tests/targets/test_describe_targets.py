"""A dry run tells what from_chain would make, and what that costs, without reading a weight."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicLayer

from cbd_trl import Chain, describe_targets, from_chain
from cbd_trl.architectures import describe
from cbd_trl.chain.folders import write_anchor
from cbd_trl.report.tables import target_table
from cbd_trl.targets.many import TargetSummary, _embedding_parameters
from tests.chain.helpers import DEEP, SHAPES, WIDE
from tests.chain.hub_repositories import Hub
from tests.chain.hub_server import serving
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize(("operator", "shape"), SHAPES)
def test_a_summary_is_what_is_made(chain, operator, shape):
    (summary,) = describe_targets(chain, config=shape, operator=operator, dtype="bfloat16")
    model = from_chain(chain, config=shape, operator=operator, dtype="bfloat16")
    provenance = model.config.cbd_trl
    assert (summary.requested, summary.num_parameters, summary.shape) == (
        None,
        model.num_parameters(),
        provenance["shape"],
    )
    assert (summary.operator, summary.alpha) == (provenance["operator"], provenance["alpha"])
    assert list(summary.anchors) == provenance["anchors"]
    assert summary.dtype == "bfloat16"
    assert summary.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert summary.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert summary.other_parameters == summary.num_parameters - summary.embedding_parameters


def test_sizes_in_their_order_with_anchors_as_such(chain):
    large, middle, small = chain.anchors
    sizes = [small.num_parameters, large.num_parameters, (small.num_parameters + middle.num_parameters) / 2]
    summaries = describe_targets(chain, sizes, tolerance=0.2)
    assert [summary.requested for summary in summaries] == sizes
    assert [summary.operator for summary in summaries] == ["anchor", "anchor", "nested"]
    assert [summary.anchors for summary in summaries] == [(small.name,), (large.name,), (middle.name, small.name)]
    assert summaries[1].num_parameters == large.num_parameters and summaries[1].dtype == "float32"
    assert 0 < summaries[2].alpha < 1
    assert describe_targets(chain, sizes[2:], tolerance=0.2, alpha=0.25)[0].alpha == 0.25


LEARNED_POSITIONS = {"gpt2": "transformer.wpe", "opt": "model.decoder.embed_positions"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_and_parameters_of_every_family(family, tied, tmp_path):
    """Against a count of what PyTorch multiplies; eager attention computes every pair of tokens.

    Where some layers have no attention only products with weights are counted: linear layers compute in blocks of 64
    tokens.
    """
    model = tiny_model(family, tie_word_embeddings=tied, attn_implementation="eager")
    architecture = describe(model.config)
    length, counter = 11, FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        cache = model(torch.arange(3, 3 + length)[None], use_cache=True).past_key_values
    summary = _summary_of(model, tmp_path)
    attending = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if len(attending) == architecture.depth:
        assert counter.get_total_flops() == length * (summary.flops + length * summary.attention_flops)
    else:
        products = counter.get_flop_counts()["Global"]
        assert products[torch.ops.aten.mm] + products.get(torch.ops.aten.addmm, 0) == length * summary.flops
    # A tied head may have a bias.
    outside = list({*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()})
    if family in LEARNED_POSITIONS:
        outside.append(model.get_submodule(LEARNED_POSITIONS[family]).weight)
    assert summary.embedding_parameters == sum(tensor.numel() for tensor in outside)
    assert summary.embedding_parameters == _embedding_parameters(architecture)
    # A sliding window keeps no more tokens than it needs.
    tokens = [layer.keys.shape[2] for layer in attending]
    kept = [layer.keys.nbytes + layer.values.nbytes for layer in attending]
    assert kept == [n * summary.cache_bytes // len(attending) for n in tokens]
    window = getattr(model.config, "sliding_window", None)
    assert min(tokens) == (length if window is None else window - 1)


def _summary_of(model, folder) -> TargetSummary:
    """Of a chain whose only anchor this model is."""

    def fill(path):
        model.save_pretrained(path)

    write_anchor(folder / "chain", {"name": "only"}, fill)
    (summary,) = describe_targets(folder / "chain", [sum(parameter.numel() for parameter in model.parameters())])
    return summary


def test_no_weight_is_read(chain, tmp_path):
    chain.save_pretrained(tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.safetensors"):
        save_file({}, file)
    for operator in ("nested", "slice", "expand", "linear"):
        (summary,) = describe_targets(tmp_path / "copy", config=WIDE, operator=operator)
        assert summary == describe_targets(chain, config=WIDE, operator=operator)[0]


def test_from_the_hub_configs_are_enough(chain, chain_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with serving(Hub()) as hub:
        hub.commit("me/chain", chain_folder, "main")
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (("ENDPOINT", hub.address), ("HUGGINGFACE_CO_URL_TEMPLATE", url)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert describe_targets("me/chain", config=WIDE) == describe_targets(chain, config=WIDE)
        upper, lower = (anchor.name for anchor in chain.anchors[1:])
        assert hub.fetched() == ["chain.json", f"{upper}/config.json", f"{lower}/config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [1e9]}, "num_parameters=1,000,000,000 lies outside the chain"),
        ({"sizes": [-1]}, "num_parameters=-1 "),
        ({}, "No size or shape was requested"),
        ({"config": DEEP, "operator": "merge"}, "'merge'"),
        ({"config": WIDE, "operator": "patch"}, "operator='patch'.*'nested'"),
        ({"config": WIDE, "dtype": "int8"}, "dtype='int8' must be a floating-point type"),
    ],
)
def test_what_cannot_be_made_cannot_be_described(chain, arguments, message):
    with pytest.raises(ValueError, match=message):
        describe_targets(chain, **arguments)


def test_the_table_tells_everything():
    summary = TargetSummary(
        requested=100e6, num_parameters=99_106_112, active_parameters=99_106_112, embedding_parameters=28_311_552,
        operator="nested", alpha=0.25,
        shape={"num_hidden_layers": 20, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
        anchors=("135M", "85M"), dtype="bfloat16", weight_bytes=198_212_224, cache_bytes=15_360, flops=198_190_080,
        attention_flops=46_080,
    )  # fmt: skip
    cells = [next(iter(column.cells)) for column in target_table([summary]).columns]
    assert cells == [
        "100M", "99.11M", "28.31M + 70.79M", "20×576, 9/3 heads", "nested, alpha 0.25", "135M and 85M",
        "198 MB bfloat16", "15.4 kB", "198.2M + 46.08k × T",
    ]  # fmt: skip


def test_a_chain_of_one_anchor_has_that_one(tmp_path):
    summary = _summary_of(tiny_model("llama"), tmp_path)
    assert summary.anchors == ("only",) and Chain.from_pretrained(tmp_path / "chain").anchors[0].name == "only"
