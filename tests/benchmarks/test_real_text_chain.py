"""The chains that are measured on real text fit their sources."""

import itertools
from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from benchmarks.real_text_chain import PLANS, targets
from cbd_trl.architectures import describe
from cbd_trl.shapes.cut import cut_architecture

# Of the published checkpoints.
SOURCES: dict[str, Any] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "gemma-270m": Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256,
    ),
    "qwen2.5-coder-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_targets_lie_between_the_anchors_largest_first(name: str) -> None:
    plan = PLANS[name]
    anchors = [describe(SOURCES[name])]
    for fields in plan.anchors:
        anchors.append(cut_architecture(anchors[-1], fields))
    sizes = [anchor.num_parameters for anchor in anchors]
    made = [cut_architecture(anchors[0], fields).num_parameters for fields in targets(plan, one_step=False)]
    between = [[size for size in made if lower < size < upper] for upper, lower in itertools.pairwise(sizes)]
    assert [*itertools.chain.from_iterable(between)] == made == sorted(made, reverse=True)
    assert all(len(of_pair) >= 4 for of_pair in between)
    for fields in plan.targets.get("both", []):
        assert sizes[-1] < cut_architecture(anchors[0], fields).num_parameters < sizes[0]
