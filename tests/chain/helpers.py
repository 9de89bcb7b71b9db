"""Pairs of anchors with random weights, and the arguments of a chain that is built in a second."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cbd_trl import Chain, DistillConfig, build_chain
from cbd_trl.architectures import Architecture, describe
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.folders import write_anchor
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.blocks import blocks_of, spaced_layers
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.statistics_file import StoredStatistics, save_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.targets.operators import OPERATORS, Pair
from tests.surgery.helpers import described, full_model, moments
from tests.tiny import WIDTH_OF_HEADS, own_names, randomize, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_config, text_rows

UPPER_DEPTH, LOWER_DEPTH = 6, 4
BLOCKS = blocks_of(spaced_layers(UPPER_DEPTH, LOWER_DEPTH))
_NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
_BETWEEN = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
# The two anchors of the tiny chain below its source: depth alone, then width alone.
CHAIN_ANCHORS: list[dict[str, Any]] = [
    {"num_hidden_layers": LOWER_DEPTH},
    {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
]

# Targets of the tiny chain: between its first two anchors, and between the last two.
DEEP = {"num_hidden_layers": 5}
WIDE = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = [pytest.param("patch", DEEP, id="patch-depth")] + [
    pytest.param(operator, shape, id=f"{operator}-{kind}")
    for operator in OPERATORS
    if operator != "patch"
    for kind, shape in (("depth", DEEP), ("width", WIDE))
]


def depth_of(family: str, layers: int) -> dict[str, int]:
    return own_names(family, num_hidden_layers=layers)


def widths_of(family: str, fields: dict[str, int]) -> dict[str, int]:
    heads = fields["hidden_size"] // 8
    tied_to_it = {"num_attention_heads": heads, "num_key_value_heads": heads} if family in WIDTH_OF_HEADS else {}
    return own_names(family, **{**fields, **tied_to_it})


@functools.cache
def random_pair(family: str, tied: bool, what: str, **options: Any) -> Pair:
    """Two anchors that differ in "depth", "width" or "both", each with random weights of its own, in float64."""
    upper = full_model(family, tied, seed=1, **depth_of(family, UPPER_DEPTH), **options)
    upper_weights, upper_architecture = described(upper)
    fields = depth_of(family, LOWER_DEPTH) if what != "width" else {}
    fields |= widths_of(family, _NARROW) if what != "depth" else {}
    blocks = [[layer] for layer in range(UPPER_DEPTH)] if what == "width" else BLOCKS
    kept = [block[-1] for block in blocks]
    sizes = cut_architecture(upper_architecture, fields).sizes
    lower_architecture = upper_architecture.with_layers(kept).resized(**sizes)
    lower = type(upper)(lower_architecture.config).double()
    randomize(lower, seed=2)
    statistics = None if what == "depth" else moments(upper, upper_architecture)
    lower_weights = weights_of(lower, lower_architecture)
    return Pair(upper_weights, upper_architecture, lower_weights, lower_architecture, statistics, blocks, kept)


def random_chain(folder: Path) -> Chain:
    """Two Llama anchors that differ in depth and in width, with random weights of their own, in an empty folder."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
    large = {"num_hidden_layers": UPPER_DEPTH, "hidden_size": 64, "intermediate_size": 160}
    small = {"num_hidden_layers": LOWER_DEPTH, "hidden_size": 32, "intermediate_size": 64}
    for seed, (name, parent, shape) in enumerate([("large", None, large), ("small", "large", small)]):
        model = tiny_model("llama", seed=seed, **shape, **heads)
        randomize(model, seed=seed)

        def fill(place: Path, model: PreTrainedModel = model) -> None:
            architecture = describe(model.config)
            model.save_pretrained(place)
            tiny_tokenizer().save_pretrained(place)
            save_statistics([moments(model, architecture)], architecture, place / "statistics.safetensors")

        write_anchor(folder, {"name": name, "parent": parent, "blocks": BLOCKS if parent else None}, fill)
    return Chain.from_pretrained(folder)


def between(pair: Pair, depth: int | None = None) -> Architecture:
    """A target of a random pair: 5 of 4 to 6 layers, and widths between."""
    family = pair.upper_architecture.config.model_type
    fields = widths_of(family, _BETWEEN) if not pair.equal_widths else {}
    if pair.upper_architecture.depth != pair.lower_architecture.depth:
        fields = {**fields, **depth_of(family, 5 if depth is None else depth)}
    return cut_architecture(pair.upper_architecture, fields)


def chain_rows(rows: int = 24, seed: int = 0) -> Dataset:
    """Text of random words, 6 to 14 a row."""
    return text_rows([6 + (5 * i) % 9 for i in range(rows)], seed=seed)


def chain_config(**overrides: Any) -> DistillConfig:
    """Three steps an anchor, a checkpoint after each."""
    return make_config(**{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "seed": 3, **overrides})


def same_weights(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def chain_source() -> PreTrainedModel:
    """A random Llama of 6 layers with a tied table and a generation config of its own."""
    source = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=UPPER_DEPTH)
    source.generation_config.update(do_sample=True, temperature=0.7)
    return source


def build_tiny_chain(folder: Path) -> Chain:
    """A Llama chain of 6 layers, 4 layers, and 4 layers half as wide."""
    return build_chain(
        chain_source(),
        CHAIN_ANCHORS,
        dataset=chain_rows(),
        output_dir=folder,
        args=chain_config(),
        processing_class=tiny_tokenizer(),
        eval_dataset=chain_rows(4, seed=9),
        calibration_tokens=256,
    )


def assert_statistics_of(anchor: Anchor, blocks: torch.Tensor) -> None:
    """The statistics stored beside an anchor are its own on this text (N, T), up to what a few bits an entry leave."""
    stored = StoredStatistics(anchor.statistics_file)
    anew = collect_statistics(anchor.load_model(), anchor.architecture(), [{"input_ids": blocks}])
    assert stored.tokens == anew.tokens == blocks.numel()
    assert stored.sites == anew.means.keys() == {site.name for site in anchor.architecture().sites}
    for site in anew.means:
        torch.testing.assert_close(stored.mean(site).double(), anew.mean(site), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored.variances(site).double(), anew.variances(site), rtol=1e-3, atol=1e-4)
        scale = anew.variances(site).sqrt()
        gap = (stored.second(site).double() - anew.second(site)) / scale / scale[:, None]
        assert gap.abs().max() < 0.1
