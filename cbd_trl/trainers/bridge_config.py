"""Arguments of `BridgeDistillTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from cbd_trl.bridge.objectives import OBJECTIVES, parse_objective
from cbd_trl.losses.divergences import DIVERGENCES
from cbd_trl.trainers.distill_config import DistillConfig

# What a DistillConfig has and this one refuses, and why.
_WITHOUT_MEANING = {
    "teacher_cache": "a cache holds what a teacher says of the student's tokens, and this one has tokens of its own",
    "self_distillation": "a student and its own base have one vocabulary, for which there is DistillTrainer",
    "teacher_weights": "teachers with tokens of their own have no common distribution to average",
    "swap_probability": "a hybrid is of two models of one chain, which have one vocabulary",
}


@dataclass
class BridgeDistillConfig(DistillConfig):
    """Arguments of `BridgeDistillTrainer`: those of `DistillConfig`, with these differences.

    Of `DistillConfig` it refuses `teacher_cache`, `self_distillation`, `teacher_weights` and `swap_probability`, which
    need one vocabulary. `hidden_weight` is of states behind the same text and always needs `hidden_projector`.

    Args:
        objective: what the two models are compared by: `alm`, `uld`, `shared` or `dskd-cma` (see
            `cbd_trl.bridge.objectives`), or several of the first three with their weights, "alm=1,uld=0.5" or a
            dict. `kd_weight` is of all of it.
        divergence: of the objectives that have one (`alm`, `shared`, `dskd-cma`). None: their own.
        temperature: of all objectives named. None: their own, which for `alm` is 100.
        top_k: of the objectives that rank tokens (`uld`, `shared`): how many ranks are compared. None: all.

    Raises:
        ValueError: for a value that has no meaning, or an option that this loss does not have.
    """

    trainer = "BridgeDistillTrainer"
    _VALID_DICT_FIELDS = [*DistillConfig._VALID_DICT_FIELDS, "objective"]

    objective: dict[str, Any] | str | None = field(
        default="alm",
        metadata={
            "help": f"What the two models are compared by: one of {', '.join(OBJECTIVES)}, or several with their "
            "weights, such as 'alm=1,uld=0.5' or a JSON object."
        },
    )
    # None is a value of these three only here: the default depends on the objective.
    divergence: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Divergence of the objectives that have one (alm, shared, dskd-cma). Not set: their own.",
            "choices": list(DIVERGENCES),
        },
    )
    temperature: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Temperature of all objectives named. Not set: their own, which for alm is 100."},
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Of the objectives that rank tokens (uld, shared): how many ranks. Not set: all."},
    )

    def __post_init__(self) -> None:
        """Check every value, so that a mistake is seen before a model is loaded."""
        super().__post_init__()
        for name, reason in _WITHOUT_MEANING.items():
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning across vocabularies: {reason}. Leave it out."
                )
        names = list(self.objectives)
        if "dskd-cma" in names and self.objectives != {"dskd-cma": 1.0}:
            raise ValueError(
                f"objective={self.objective!r}: dskd-cma carries states over by attention and the others compare "
                "groups of tokens, so it cannot be mixed or weighted here. Use it alone, and kd_weight for its weight."
            )
        for option in ("divergence", "temperature", "top_k"):
            having = [name for name, row in OBJECTIVES.items() if option in row.options]
            if getattr(self, option) is not None and not set(names) & set(having):
                raise ValueError(
                    f"{option}={getattr(self, option)!r} is an option of {' and '.join(having)}, and "
                    f"objective={self.objective!r}: it would be ignored. Leave one of the two out."
                )
        if self.uses_hidden and not self.hidden_projector:
            raise ValueError(
                f"hidden_weight={self.hidden_weight} compares hidden states, and models of two vocabularies share no "
                "channels. Learn a map between them with hidden_projector=True, or set hidden_weight=0."
            )

    @property
    def objectives(self) -> dict[str, float]:
        """The weight of each objective."""
        return parse_objective("alm" if self.objective is None else self.objective)

    @property
    def learns_projectors(self) -> str | None:
        """See `DistillConfig`."""
        return "objective='dskd-cma'" if "dskd-cma" in self.objectives else super().learns_projectors

    @property
    def kd_text(self) -> str:
        """See `DistillConfig`."""
        weights = self.objectives
        text = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
        named = {name: getattr(self, name) for name in ("divergence", "temperature", "top_k")}
        options = [f"{name} {value}" for name, value in named.items() if value is not None]
        return f"{text} across vocabularies" + (f" ({', '.join(options)})" if options else "")
