"""FLOPs of making models, by one rule.

N is what a token is multiplied with: the parameters, the head's table included and a table that is only looked up left
out (a tied one counts once). A forward pass costs 2 N a token, a training step 6 N, and a teacher adds its own forward
pass. After Kaplan et al. 2020, arXiv 2001.08361, section 2.1, who leave the head out too; attention's products are
left out here as there. Statistics are a forward pass over the calibration text, a refit is one of each of the two
models. The pass through a hybrid beside a step is a training step of a model halfway between the two anchors (less, in
truth, where blocks of it are frozen). Neglected: choosing layers, building the moments, and the solves and matrix
products of refits, cuts and operators.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import tensor_shape

# What build_chain reads by default to sort, refit and store statistics.
CALIBRATION_TOKENS = 8192


def counted_parameters(architecture: Architecture) -> int:
    """N of a model."""
    table = architecture.tensors[f"{architecture.family.embedding}.weight"]
    looked_up = 0 if architecture.tied else math.prod(tensor_shape(table, architecture.sizes))
    return architecture.num_parameters - looked_up


def forward_flops(parameters: float, tokens: float) -> float:
    """A forward pass."""
    return 2 * parameters * tokens


def training_flops(parameters: float, tokens: float, teacher: float = 0) -> float:
    """Forward and backward pass.

    Args:
        parameters: N of what is trained.
        tokens: trained on.
        teacher: N of a model that reads every token; 0 for none.
    """
    return 6 * parameters * tokens + forward_flops(teacher, tokens)


def refit_flops(parameters: float, teacher: float, tokens: float) -> float:
    """Both models read the calibration text once."""
    return forward_flops(parameters, tokens) + forward_flops(teacher, tokens)


def chain_flops(
    parameters: Sequence[float], tokens: Sequence[float], calibration: float, hybrids: Sequence[float]
) -> float:
    """Building a chain.

    Args:
        parameters: N of each anchor, the source first.
        tokens: that each was distilled on from the one above; the source's is 0.
        calibration: tokens of calibration text.
        hybrids: share of each anchor's steps that trained a hybrid too; the source's is 0.
    """
    total = sum(forward_flops(count, calibration) for count in parameters)
    steps = zip(parameters[:-1], parameters[1:], tokens[1:], hybrids[1:], strict=True)
    for upper, lower, seen, share in steps:
        total += refit_flops(lower, upper, calibration) + training_flops(lower, seen, upper)
        total += share * training_flops((upper + lower) / 2, seen)
    return total


@dataclass(frozen=True)
class Way:
    """How a family of sizes is made, each then trained on the same number of tokens.

    Args:
        once: FLOPs whatever the number of sizes, such as the chain's.
        teacher: N of a teacher that reads every training token; 0 for none.
        refit_tokens: calibration tokens of the refit with which each size starts; 0 for none.
    """

    once: float = 0
    teacher: float = 0
    refit_tokens: float = 0

    def flops(self, sizes: Sequence[float], tokens: float) -> float:
        """Of the whole family.

        Args:
            sizes: N of each model.
            tokens: that each is trained on.
        """
        return self.once + sum(
            refit_flops(size, self.teacher, self.refit_tokens) + training_flops(size, tokens, self.teacher)
            for size in sizes
        )


def family_sizes(smallest: float, largest: float, count: int) -> list[float]:
    """N of `count` models, evenly spaced between two sizes that are not among them."""
    return [smallest + (largest - smallest) * (i + 1) / (count + 1) for i in range(count)]
