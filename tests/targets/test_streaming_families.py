"""Targets made tensor by tensor from files are those made of whole models in memory, in every family."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Phi3Config

from cbd_trl import Chain, from_chain
from cbd_trl.architectures import describe
from cbd_trl.chain.folders import write_anchor
from cbd_trl.chain.manifest import STATISTICS_FILE
from cbd_trl.chain.model import StoredWeights, build_model
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery import blocks, grow, norms, weights
from cbd_trl.surgery import least_squares as cut
from cbd_trl.surgery.statistics_file import StoredStatistics, save_statistics
from cbd_trl.surgery.weights import to_weights, weights_of
from cbd_trl.targets import operators
from cbd_trl.targets.operators import OPERATORS, Pair, Plan
from tests.chain.helpers import between, random_pair, same_weights
from tests.chain.test_model import resident
from tests.surgery.helpers import build, moments
from tests.tiny import by_head_in

_LAZY = (blocks, cut, grow, norms, weights, operators)


def stored(pair: Pair, folder, dtype: torch.dtype) -> Chain:
    """A random pair on disk, the upper anchor in several files."""
    name, block_map = None, None
    for kind, shard in (("upper", "20KB"), ("lower", "5GB")):
        architecture = getattr(pair, f"{kind}_architecture")
        model = build(getattr(pair, kind), architecture)

        def fill(path, model=model, architecture=architecture, shard=shard):
            save_statistics([moments(model, architecture)], architecture, path / STATISTICS_FILE)
            model.to(dtype).save_pretrained(path, max_shard_size=shard)

        write_anchor(folder, {"name": kind, "parent": name, "blocks": block_map}, fill)
        name, block_map = kind, [list(block) for block in pair.blocks]
    return Chain.from_pretrained(folder)


def whole(chain: Chain, dtype: torch.dtype) -> Pair:
    """The same pair as transformers loads it, every tensor in memory as it is used."""
    upper, lower = chain.anchors
    above, below = (
        weights_of(AutoModelForCausalLM.from_pretrained(anchor.path, dtype=dtype), anchor.architecture())
        for anchor in chain.anchors
    )
    statistics = StoredStatistics(upper.statistics_file)
    return Pair(
        above, upper.architecture(), below, lower.architecture(), statistics, lower.block_map, lower.kept_layers
    )


# Depth and width, in one dtype and in both.
_WAYS = [("depth", torch.float32), ("width", torch.float32), ("both", torch.bfloat16), ("both", torch.float32)]


@pytest.mark.parametrize(("family", "tied", "what", "dtype"), by_head_in(*_WAYS))
def test_streamed_targets_are_those_of_whole_models(family, tied, what, dtype, tmp_path, monkeypatch):
    """Every operator; what is made at once, every mapping worked out before it is used, is equal bit by bit."""
    pair = random_pair(family, tied, what)
    chain = stored(pair, tmp_path, dtype)
    shape = between(pair).shape
    names = [name for name in OPERATORS if name != "patch" or what == "depth"]
    streamed = {name: from_chain(chain, config=shape, operator=name).state_dict() for name in names}
    cut_to = cut_architecture(pair.upper_architecture, shape)
    plans = {name: Plan(OPERATORS[name].architecture(pair, cut_to)) for name in names}
    for module in _LAZY:
        monkeypatch.setattr(module, "LazyWeights", lambda keys, tensor: {key: tensor(key) for key in keys})
    in_memory = whole(chain, dtype)
    for name in names:
        made, architecture = OPERATORS[name].make(in_memory, plans[name])
        assert isinstance(made, dict)
        expected = build_model(architecture, made, dtype).state_dict()
        assert {tensor.dtype for tensor in expected.values()} == {dtype}
        assert same_weights(streamed[name], expected), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_a_fused_tensor_only_the_part_is_read(tmp_path):
    config = Phi3Config(
        vocab_size=64, hidden_size=256, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=4
    )
    architecture, file = describe(config), tmp_path / "model.safetensors"
    save_file({name: torch.ones(shape) for name, shape in architecture.state_shapes.items()}, file)
    fused = StoredWeights([file], architecture.state_shapes)["model.layers.0.mlp.gate_up_proj.weight"]
    size = fused.nbytes
    del fused
    read = to_weights(StoredWeights([file], architecture.state_shapes), architecture)
    part = read["model.layers.0.mlp.up_proj.weight"]
    assert part.shape == (4096, 256) and resident(file) < 0.1 * size
    part.sum()
    assert 0.4 * size < resident(file) < 0.6 * size
