"""What a `DistillConfig` refuses: values without a meaning, and options that contradict each other."""

import math
from typing import Any

from cbd_trl.losses.divergences import DIVERGENCES, divergence_option, get_divergence
from cbd_trl.losses.hidden import HIDDEN_LOSS, get_hidden_loss

_WEIGHTED_TERMS = ("kd", "ce", "hidden")


def check_config(config: Any) -> None:
    """Check every value of a config by itself and beside the others.

    Args:
        config: a `DistillConfig`.

    Raises:
        ValueError: naming the field, what it got and what it wanted.
    """
    _check_weights(config)
    _check_divergence(config)
    _check_hidden(config)
    _check_teacher(config)
    for name, value, neutral in (
        ("loss_type", config.loss_type, "nll"),
        ("label_smoothing_factor", config.label_smoothing_factor, 0),
    ):
        if value != neutral:
            raise ValueError(
                f"{name}={value!r} changes the loss of SFT, which distillation does not use: it would be ignored. "
                f"Leave it at {neutral!r}; the divergence, temperature and weights shape this loss."
            )


def _check_weights(config: Any) -> None:
    for name in (f"{term}_weight{end}" for term in _WEIGHTED_TERMS for end in ("", "_end")):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name}={value}: a weight of the loss must be finite and at least 0 (0 switches the term off)."
            )
    schedules = config.schedules()
    for term, schedule in schedules.items():
        end = getattr(config, f"{term}_weight_end")
        if end is not None and schedule.shape == "constant":
            raise ValueError(
                f"{term}_weight_end={end} with {term}_schedule='constant', which keeps {term}_weight: it would be "
                f"ignored. Set {term}_schedule to 'linear' or 'cosine', or leave {term}_weight_end out."
            )
        # None: `build_chain` may set it yet.
        if schedule.shape != "constant" and not schedule.highest and getattr(config, f"{term}_weight") is not None:
            raise ValueError(
                f"{term}_schedule={schedule.shape!r} goes from {term}_weight=0 to {term}_weight_end=0: it would be "
                f"ignored. Set one of the two weights above 0, or leave {term}_schedule out."
            )
    if not any(schedule.highest for schedule in schedules.values()):
        raise ValueError(
            f"kd_weight, ce_weight and hidden_weight are {[schedule.start for schedule in schedules.values()]}: "
            "nothing is left to minimise. Set at least one of them above 0."
        )
    scheduled = [f"{term}_schedule" for term, schedule in schedules.items() if schedule.shape != "constant"]
    best = config.metric_for_best_model
    if scheduled and best is not None and best.endswith("loss"):
        raise ValueError(
            f"metric_for_best_model={best!r} with {' and '.join(scheduled)}: the loss is weighted differently at each "
            "step, so the best one says nothing of the model. Set metric_for_best_model to a term, such as 'eval_kd' "
            "or 'eval_ce' (with greater_is_better=False), or leave the schedule out."
        )


def _check_divergence(config: Any) -> None:
    if not _left_open(config, "divergence"):
        get_divergence(config.divergence)
    if not _left_open(config, "temperature") and not (math.isfinite(config.temperature) and config.temperature > 0):
        raise ValueError(f"temperature={config.temperature}: it divides the logits, so it must be above 0 and finite.")
    if not 0 <= config.beta <= 1:
        raise ValueError(
            f"beta={config.beta}: it is the teacher's share of the jsd mixture, so it must lie between 0 (forward KL) "
            "and 1 (reverse KL)."
        )
    if not 0 <= config.skew < 1:
        raise ValueError(
            f"skew={config.skew}: it is the share of one distribution that is mixed into the other, so it must be at "
            "least 0 (none, plain KL) and below 1 (where nothing is left to tell them apart)."
        )
    if not 0 < config.head_share < 1:
        raise ValueError(f"head_share={config.head_share}: it is a share of the teacher's mass, between 0 and 1.")
    own = None if config.divergence is None else divergence_option(config.divergence)
    for name in ("beta", "skew", "head_share"):
        value = getattr(config, name)
        if name != own and value != config.__dataclass_fields__[name].default:
            having = [other for other in DIVERGENCES if divergence_option(other) == name]
            raise ValueError(
                f"{name}={value} is an option of {' and '.join(having)}, which divergence={config.divergence!r} does "
                f"not have: it would be ignored. Set divergence={having[0]!r}, or leave {name} out."
            )
    for name, absent in (("top_k", "to compare every token"), ("loss_chunk_size", "to have it chosen")):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{name}={value}: it is a number of tokens, so it must be a whole number of at least 1. Leave it out "
                f"{absent}."
            )


def _left_open(config: Any, name: str) -> bool:
    return getattr(config, name) is None and config.__dataclass_fields__[name].default is None


def _check_hidden(config: Any) -> None:
    get_hidden_loss(config.hidden_loss or HIDDEN_LOSS)
    swap = config.swap_probability
    if swap is not None and not 0 <= swap <= 1:
        raise ValueError(
            f"swap_probability={swap}: it is the share of steps with a hybrid, so it must lie between 0 and 1."
        )
    if config.hidden_projector and not config.uses_hidden:
        raise ValueError(
            "hidden_projector=True, but the hidden-state term has no weight: there is nothing to project for. Set "
            "hidden_weight above 0, or leave hidden_projector out."
        )
    if config.hidden_projector and swap:
        raise ValueError(
            f"hidden_projector=True with swap_probability={swap}: hybrid steps need two models of one chain, whose "
            "hidden states are compared as they are. Leave one of the two out."
        )


def _check_teacher(config: Any) -> None:
    named = [name for name in config.ways_to_a_teacher if getattr(config, name)]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} each name a teacher: there can be one. Give one of them.")
    absent = config.instead_of_a_teacher
    if absent:
        loads = ("teacher_model_init_kwargs", "teacher_model_revision", "teacher_offload", "teacher_weights")
        for name in loads:
            if getattr(config, name):
                raise ValueError(
                    f"{name} is about a teacher that is loaded, but with {absent} none is: it would be ignored. Leave "
                    "one of the two out."
                )
    if config.swap_probability and absent:
        raise ValueError(
            f"swap_probability={config.swap_probability} runs the layers of a teacher, and with {absent} there are "
            "none to run. Set swap_probability=0, or give the teacher itself."
        )
    if config.teacher_cache and config.uses_hidden:
        raise ValueError(
            "hidden_weight compares the layers of a teacher, which a teacher_cache does not hold. Set "
            "hidden_weight=0, or give the teacher itself."
        )
    weights = config.teacher_weights
    if weights is not None and not (weights and all(math.isfinite(w) and w > 0 for w in weights)):
        raise ValueError(
            f"teacher_weights={weights}: each teacher needs a finite weight above 0. Leave out a teacher that is not "
            "to count."
        )
