"""Arguments of `BridgeDistillTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from cbd_trl.bridge.objectives.registry import OBJECTIVES, SEQKD, parse_objective
from cbd_trl.losses.divergences import DIVERGENCES
from cbd_trl.losses.objective import METRICS, WeightSchedule
from cbd_trl.trainers.distill_config import DistillConfig

# An untrained GPT-2 of 30M with 8k tokens, taught by SmolLM2-135M beside the cross-entropy on 102k of its tokens, is
# at 2.369 and 2.375 bits per byte (two seeds) by it alone, at 2.345 and 2.355 with the layers beside it, at 2.444 and
# 2.455 by the cross-entropy alone (docs/guides/bridge.md).
_DEFAULT = "prefix"
# Of the mean cosine distance of the layers: the best of 0, 1 and 4 there, and ahead of 12 as far as that was run.
HIDDEN_WEIGHT = 4.0
# What a DistillConfig has and this one refuses, and why.
_WITHOUT_MEANING = {
    "teacher_cache": "a cache holds what a teacher says of the student's tokens, and this one has tokens of its own",
    "self_distillation": "a student and its own base have one vocabulary, for which there is DistillTrainer",
    "teacher_weights": "teachers with tokens of their own have no common distribution to average",
    "swap_probability": "a hybrid is of two models of one chain, which have one vocabulary",
}
# Objectives that are not mixed, and why.
_ALONE = {
    "prefix": "prefix compares every position and the others compare groups of tokens, so it cannot be mixed or "
    "weighted here. Use it alone, and kd_weight for its weight.",
    "dskd-cma": "dskd-cma carries states over by attention and the others compare groups of tokens, so it cannot be "
    "mixed or weighted here. Use it alone, and kd_weight for its weight.",
    SEQKD: "seqkd is the cross-entropy of text that the teacher wrote, and the others ask the teacher itself, so it "
    "cannot be mixed or weighted. Use it alone; or name the others, whose ce_weight is its weight on such text.",
}
# Weights of a loss of several terms, which seqkd is not.
_WEIGHTS = (
    *(f"{term}_{what}" for term in ("kd", "ce") for what in ("weight", "weight_end", "schedule")),
    *("hidden_weight", "hidden_weight_end", "hidden_schedule"),
)


@dataclass
class BridgeDistillConfig(DistillConfig):
    """Arguments of `BridgeDistillTrainer`: those of `DistillConfig`, with these differences.

    Of `DistillConfig` it refuses `teacher_cache`, `self_distillation`, `teacher_weights` and `swap_probability`, which
    need one vocabulary. `hidden_weight` is of states behind the same text and always needs `hidden_projector`. None:
    both are on (4.0) where the student's layers can be paired with the teacher's, which is as deep or deeper, and the
    optimizer is the Trainer's; else there is no such term.

    Args:
        objective: what the two models are compared by: `prefix` (the default), `alm`, `uld`, `shared` or `dskd-cma`
            (see `cbd_trl.bridge.objectives.registry`), or several of `alm`, `uld` and `shared` with their weights,
            "alm=1,uld=0.5" or a dict. `kd_weight` is of all of it. Or `seqkd`: no teacher, the cross-entropy of text
            that it wrote, which is the whole loss.
        divergence: of the objectives that have one (`alm`, `shared`, `dskd-cma`, `prefix`). None: their own.
        temperature: of all objectives named. None: their own, which for `alm` is 100.
        top_k: of the objectives that rank tokens (`uld`, `shared`): how many ranks are compared. None: all.

    Raises:
        ValueError: for a value that has no meaning, or an option that this loss does not have.
    """

    trainer = "BridgeDistillTrainer"
    ways_to_a_teacher = ["teacher_model_name_or_path"]
    _VALID_DICT_FIELDS = [*DistillConfig._VALID_DICT_FIELDS, "objective"]

    objective: dict[str, Any] | str | None = field(
        default=_DEFAULT,
        metadata={
            "help": f"What the two models are compared by: one of {', '.join(OBJECTIVES)}, or several with their "
            "weights, such as 'alm=1,uld=0.5' or a JSON object. Or seqkd: the data is text that the teacher wrote, "
            "and no teacher is loaded."
        },
    )
    # None is a value of these three only here: the default depends on the objective.
    divergence: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Divergence of the objectives that have one (alm, shared, dskd-cma, prefix). Not set: their own.",
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
        for name, reason in _ALONE.items():
            if name in names and self.objectives != {name: 1.0}:
                raise ValueError(f"objective={self.objective!r}: {reason}")
        self._check_black_box()
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

    def _check_black_box(self) -> None:
        if not self.black_box:
            return
        if self.teacher_model_name_or_path is not None:
            raise ValueError(
                f"teacher_model_name_or_path={self.teacher_model_name_or_path!r} with objective='seqkd', which learns "
                "text that the teacher wrote and asks it nothing: it would not be used. Leave it out, or name another "
                "objective."
            )
        for name in _WEIGHTS:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if (value or 0) != (default or 0):
                raise ValueError(
                    f"{name}={value!r} with objective='seqkd', whose loss is the cross-entropy alone: it would be "
                    f"ignored. Leave {name} out."
                )

    def schedules(self) -> dict[str, WeightSchedule]:
        """See `DistillConfig`."""
        if not self.black_box:
            return super().schedules()
        return {term: WeightSchedule(float(term == "ce"), 0.0, "constant") for term in ("kd", "ce", "hidden")}

    @property
    def evaluated(self) -> list[str]:
        """See `DistillConfig`; where it is not known yet whether there is a hidden-state term, it is named."""
        if self.black_box:
            return ["loss", "ce", *METRICS, "num_tokens"]
        hidden = ["hidden"] if self.hidden_weight is None else []
        return [*super().evaluated, *hidden, "unaligned"]

    @property
    def black_box(self) -> bool:
        """Whether the teacher is there by what it wrote alone."""
        return SEQKD in self.objectives

    @property
    def instead_of_a_teacher(self) -> str | None:
        """See `DistillConfig`."""
        return "objective='seqkd'" if self.black_box else None

    @property
    def objectives(self) -> dict[str, float]:
        """The weight of each objective."""
        return parse_objective(_DEFAULT if self.objective is None else self.objective)

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
