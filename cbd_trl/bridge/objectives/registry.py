"""The objectives of distillation across vocabularies, by name."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cbd_trl.bridge.objectives.chunk_likelihood import ChunkLikelihood
from cbd_trl.bridge.objectives.cross_attention import CrossAttention
from cbd_trl.bridge.objectives.groups import GroupObjective, Mixture
from cbd_trl.bridge.objectives.inputs import AlignedStates
from cbd_trl.bridge.objectives.prefix import PrefixObjective
from cbd_trl.bridge.objectives.shared_tokens import SharedHybrid
from cbd_trl.bridge.objectives.sorted_distance import SortedDistance
from cbd_trl.losses.objective import TermWeights
from cbd_trl.utils.formatting import did_you_mean


class BridgeObjective(Protocol):
    """Compares a student with a teacher of another vocabulary on a micro-batch."""

    def __call__(
        self, student: AlignedStates, teacher: AlignedStates, weights: TermWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of "kd" and "ce" over positions, with gradient, and each term, (N,), without.

        Sums over positions add up over micro-batches. Divide by the scored tokens of the step, as everywhere; for a
        mean over groups multiply `weights.kd` by scored tokens over groups of the step.
        """


@dataclass(frozen=True)
class ObjectiveRow:
    """One objective.

    Attributes:
        make: called with its options.
        options: the names of the options that it has.
        needed: those of them without a default.
    """

    make: Callable[..., BridgeObjective]
    options: tuple[str, ...]
    needed: tuple[str, ...] = ()


# Not a row: plain cross-entropy on text that the teacher wrote, without running the teacher.
SEQKD = "seqkd"
OBJECTIVES: dict[str, ObjectiveRow] = {
    "alm": ObjectiveRow(ChunkLikelihood, ("divergence", "temperature")),
    "uld": ObjectiveRow(SortedDistance, ("temperature", "top_k")),
    "shared": ObjectiveRow(SharedHybrid, ("tokens", "divergence", "temperature", "top_k"), ("tokens",)),
    "dskd-cma": ObjectiveRow(CrossAttention, ("attention", "divergence", "temperature"), ("attention",)),
    "prefix": ObjectiveRow(PrefixObjective, ("table", "divergence", "temperature"), ("table",)),
}
_HOW_TO_MAKE = {
    "table": "PrefixTable.of(student, teacher)",
    "tokens": "SharedTokens.of(student, teacher)",
    "attention": "CrossModelAttention(d, D)",
}


def get_objective(name: str, **options: Any) -> BridgeObjective:
    """Make an objective of `OBJECTIVES` with its options bound.

    Args:
        name: a key of the table.
        options: divergence, temperature, top_k, table, tokens, attention; those that the objective does not have are
            ignored, and None stands for its own default.

    Returns:
        a function of (student, teacher, weights, chunk).

    Raises:
        ValueError: for an unknown name (the message lists those that exist), or an option that is missing or out of
            range.
    """
    _check_name(name, OBJECTIVES)
    row = OBJECTIVES[name]
    own = {key: value for key, value in options.items() if key in row.options and value is not None}
    for key in row.needed:
        if key not in own:
            raise ValueError(
                f"The objective {name!r} needs `{key}`, which depends on the two models, and got none. Pass "
                f"{key}={_HOW_TO_MAKE[key]}."
            )
    _check(own.get("temperature", 1.0), own.get("top_k", 1))
    return row.make(**own)


def parse_objective(objective: str | Mapping[str, Any]) -> dict[str, float]:
    """Parse the name of an objective, or a mixture, to the weight of each objective.

    Args:
        objective: "alm", or several with their weights: "alm=1,uld=0.5", or {"alm": 1, "uld": 0.5}; of `OBJECTIVES`,
            or "seqkd".

    Raises:
        ValueError: for an unknown name, one named twice, or a weight that is not a finite number above 0.
    """
    if isinstance(objective, str):
        named = [part.partition("=")[::2] for part in objective.split(",")]
        pairs: list[tuple[str, Any]] = [(name.strip(), weight.strip() or 1.0) for name, weight in named]
    else:
        pairs = list(objective.items())
    weights: dict[str, float] = {}
    for name, weight in pairs:
        _check_name(name, [*OBJECTIVES, SEQKD])
        if name in weights:
            raise ValueError(
                f"objective={objective!r} names {name!r} twice. Give it once, with the sum of its weights."
            )
        try:
            weights[name] = float(weight)
        except (TypeError, ValueError):
            raise ValueError(
                f"objective={objective!r} weighs {name!r} by {weight!r}, which is not a number. Write a name, or "
                "names with weights such as 'alm=1,uld=0.5'."
            ) from None
        _check_weight(name, weights[name])
    if not weights:
        raise ValueError(f"The mixture is empty: name at least one of {', '.join(OBJECTIVES)}.")
    return weights


def get_mixture(weights: Mapping[str, float], **options: Any) -> BridgeObjective:
    """Make a weighted sum of objectives of `OBJECTIVES`, computed in one pass over the student's logits.

    Args:
        weights: of each objective by name, above 0.
        options: of all of them, see `get_objective`. For options that are not the same for all make a `Mixture`.

    Returns:
        a function of (student, teacher, weights, chunk).

    Raises:
        ValueError: as `get_objective`; for no objective, a weight that is not finite and above 0, or an objective that
            does not compare groups.
    """
    made = {name: get_objective(name, **options) for name in weights}
    parts = []
    for name, weight in weights.items():
        _check_weight(name, weight)
        objective = made[name]
        if not isinstance(objective, GroupObjective):
            raise ValueError(
                f"{name!r} cannot be mixed: it does not compare groups of tokens. Use it alone, by `get_objective`."
            )
        parts.append((float(weight), objective))
    if not parts:
        raise ValueError(f"The mixture is empty: name at least one of {', '.join(OBJECTIVES)}.")
    return Mixture(tuple(parts))


def _check_name(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"Unknown objective {name!r}: there are {', '.join(known)}.{did_you_mean(name, known)}")


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"{name!r} has weight {weight} in a mixture, which must be finite and above 0. Leave it out for 0."
        )


def _check(temperature: float, top_k: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: both models' scores are divided by it, so it must be above 0.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: it is how many tokens are kept, at least 1. Leave it out to keep all.")
