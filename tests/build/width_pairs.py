"""A student and a teacher whose widths differ, and the trainer of the student with hybrids beside it."""

import dataclasses
from typing import Any

import torch

from cbd_trl import DistillTrainer
from cbd_trl.architectures import describe
from cbd_trl.build.width_hybrid import WidthHybrid, weights_of_teacher
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.targets.operators import Pair
from tests.chain.helpers import BLOCKS, LOWER_DEPTH, UPPER_DEPTH, depth_of, random_pair, widths_of
from tests.surgery.helpers import build
from tests.tiny import tiny_model
from tests.training import make_trainer

_WIDE = {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 24, "num_key_value_heads": 12}
_NARROW = {"hidden_size": 112, "intermediate_size": 320, "num_attention_heads": 14, "num_key_value_heads": 7}


def single(pair: Pair) -> Pair:
    """A pair in float32, as it is trained."""
    upper, lower = ({k: t.float() for k, t in weights.items()} for weights in (pair.upper, pair.lower))
    return dataclasses.replace(pair, upper=upper, lower=lower)


def width_pair(family: str = "llama", tied: bool = True, what: str = "width") -> tuple[Any, Any, Pair]:
    """A student of 4 layers (6 where only "width" differs), a teacher of 6, and the pair that they are."""
    pair = single(random_pair(family, tied, what))
    return build(pair.lower, pair.lower_architecture), build(pair.upper, pair.upper_architecture), pair


def width_trainer(
    family: str = "llama", tied: bool = True, what: str = "width", swap_probability: float = 1.0, **overrides: Any
) -> DistillTrainer:
    """A trainer of that student; without hybrids at `swap_probability` 0."""
    student, teacher, pair = width_pair(family, tied, what)
    options = {"swap_probability": swap_probability, "block_map": pair.blocks, "learning_rate": 1e-3, **overrides}
    if swap_probability:
        options["hybrid"] = WidthHybrid(pair, swap_probability, options.get("seed", 42))
    return make_trainer(student=student, teacher=teacher, **options)


def heavy_pair(family: str, tied: bool, what: str, dtype: torch.dtype) -> tuple[Any, Any, Pair]:
    """The same of models whose weights take more memory than anything else, the upper ones those of the teacher."""
    depth = depth_of(family, UPPER_DEPTH)
    teacher = tiny_model(family, seed=1, tie_word_embeddings=tied, **depth, **widths_of(family, _WIDE))
    upper = describe(teacher.config)
    batch = {"input_ids": torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))}
    statistics = collect_statistics(teacher, upper, [batch])
    blocks = [[layer] for layer in range(UPPER_DEPTH)] if what == "width" else BLOCKS
    kept = [block[-1] for block in blocks]
    fields = widths_of(family, _NARROW) | (depth_of(family, LOWER_DEPTH) if what == "both" else {})
    lower = upper.with_layers(kept).resized(**cut_architecture(upper, fields).sizes)
    student = type(teacher)(lower.config)
    weights = weights_of_teacher(teacher.to(dtype), upper, stored={})
    return student.to(dtype), teacher, Pair(weights, upper, {}, lower, statistics, blocks, kept)
