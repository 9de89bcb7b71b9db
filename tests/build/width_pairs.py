"""A student and a teacher whose widths differ, and the trainer of the student with hybrids beside it."""

import dataclasses
from typing import Any

from cbd_trl import DistillTrainer
from cbd_trl.build.width_hybrid import WidthHybrid
from cbd_trl.targets.operators import Pair
from tests.chain.helpers import random_pair
from tests.surgery.helpers import build
from tests.training import make_trainer


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
