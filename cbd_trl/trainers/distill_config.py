"""Arguments of `DistillTrainer`: their meaning and their checks; the fields are in `options`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging
from trl import SFTConfig

from cbd_trl.losses.divergence_table import OPTIONS, check_divergence, divergence_option
from cbd_trl.losses.hidden import HIDDEN_LOSS, get_hidden_loss
from cbd_trl.losses.objective import METRICS, TermWeights, WeightSchedule
from cbd_trl.trainers.options import DistillOptions
from cbd_trl.utils.modeling import emulates_bf16

logger = logging.get_logger(__name__)

# Of the terms that are evaluated, by the last word of their names.
_LOWER_IS_BETTER = ("kd", "ce", "hidden", "unaligned")


@dataclass
class DistillConfig(DistillOptions, SFTConfig):
    """Arguments of `DistillTrainer`: those of `trl.SFTConfig`, and these.

    As in `SFTConfig`, gradient checkpointing is on by default and so is bf16 mixed precision: pass `bf16=False` to
    train in the model's own dtype.

    Args:
        teacher_model_name_or_path: path or Hub id of the teacher, used when the trainer is given none.
        teacher_model_init_kwargs: keyword arguments of `AutoModelForCausalLM.from_pretrained` for a teacher given as a
            path or Hub id, `quantization_config` among them; a dict, or a JSON string on the command line. Unless
            named here, dtype and attention implementation are the student's.
        teacher_model_revision: revision of a teacher (and its tokenizer) given as a Hub id.
        teacher_weights: weights of several teachers, whose distributions are averaged; scaled to sum to 1. None:
            equal. Python only: several teachers are passed as a list.
        teacher_cache: folder that `cbd-trl cache` wrote: no teacher is loaded.
        teacher_offload: keep the teacher in the CPU's memory and bring each layer to the device when it runs.
        self_distillation: the teacher is the student's own base, its adapter switched off. Needs a `peft_config`.
        kd_weight: weight of the divergence between teacher and student.
        kd_schedule: how that weight changes over the run: `constant`, `linear` or `cosine`.
        kd_weight_end: the weight at the end of the run. None: 0.
        divergence: a name of `cbd_trl.losses.divergence_table.DIVERGENCES`, such as `reverse_kl` or `jsd`. One with
            an option takes it as an argument of its name, such as `beta` of `jsd`: see `OPTIONS` there.
        temperature: divides the logits of both models in the divergence, which is multiplied by its square (Hinton et
            al. 2015; `total_variation`: by itself) so that its weight keeps its meaning.
        top_k: compare the teacher's k most likely tokens and one bucket for all others. None: every token.
        ce_weight: weight of the cross-entropy on the tokens of the dataset.
        ce_schedule: how that weight changes over the run, likewise.
        ce_weight_end: the weight at the end of the run. None: 0.
        hidden_weight: weight of the mean distance between each student layer's output and that of the last layer of
            its block in the teacher. Needs models of equal width or of one chain, or `hidden_projector`. None: 0, or
            what `build_chain` sets.
        hidden_schedule: how that weight changes over the run, likewise.
        hidden_weight_end: the weight at the end of the run. None: 0.
        hidden_loss: `cosine` distance, or `mse`: squared distance over the square of the teacher's state. None:
            `cosine`, or what `build_chain` sets.
        hidden_projector: compare through a learned matrix per layer, for models that do not share channels. It is
            trained along, kept in checkpoints, and no part of the student.
        swap_probability: share of the optimizer steps that train a hybrid beside the student, on the same tokens and
            by the same loss: the student with a random number of its blocks replaced by the teacher's frozen ones.
            Such a step takes about twice the time. Needs two models of one chain that differ in depth alone; in
            `build_chain` widths may differ too (see its docs). None: 0, or what `build_chain` sets.
        loss_chunk_size: tokens whose logits are held at a time. None: what suits the vocabulary and the device.

    Raises:
        ValueError: for a value that has no meaning, or an SFT option that this loss does not have.
    """

    # The trainer that these are the arguments of; without a type these are no arguments themselves.
    trainer = "DistillTrainer"
    # Its arguments that name a teacher; the trainer's `teacher_model` is one more way.
    teacher_arguments = ["teacher_model_name_or_path", "teacher_cache", "self_distillation"]
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        """Check every value, so that a mistake is seen before a model is loaded."""
        best = self.metric_for_best_model
        if self.greater_is_better is None and best is not None and best.rpartition("_")[2] in _LOWER_IS_BETTER:
            # By transformers' rule lower is better of what ends in "loss" alone.
            self.greater_is_better = False
        if not self.use_cpu and emulates_bf16():
            self._without_bf16()
        super().__post_init__()
        check_config(self)

    def _without_bf16(self) -> None:
        """Train in float32 where bf16 is only the default, and warn where it is requested."""
        gpu = f"{torch.cuda.get_device_name()} has no bf16 and would emulate it, slower than float32"
        if self.bf16:
            logger.warning_once(f"bf16=True, but {gpu}. Leave it out for float32.")
        elif self.bf16 is None and not self.fp16:
            logger.warning_once(f"{gpu}: training is in float32. fp16=True is faster, if its losses stay finite.")
            self.bf16 = False

    def schedules(self) -> dict[str, WeightSchedule]:
        """Make the schedule of each term's weight.

        Returns:
            kd, ce and hidden.
        """
        return {
            term: WeightSchedule(
                getattr(self, f"{term}_weight") or 0.0,
                getattr(self, f"{term}_weight_end") or 0.0,
                getattr(self, f"{term}_schedule"),
            )
            for term in ("kd", "ce", "hidden")
        }

    def weights(self, progress: float) -> TermWeights:
        """Compute the weights at a point of the run.

        Args:
            progress: share of the optimizer steps done, in [0, 1].
        """
        return TermWeights(**{term: schedule.at(progress) for term, schedule in self.schedules().items()})

    def scheduled_weights(self, progress: float) -> dict[str, float]:
        """Compute the weights that change over the run, by their names, at a point of it.

        Args:
            progress: share of the optimizer steps done, in [0, 1].
        """
        return {
            f"{term}_weight": how.at(progress) for term, how in self.schedules().items() if how.shape != "constant"
        }

    @property
    def evaluated(self) -> list[str]:
        """What an evaluation reports of the student, without the prefix."""
        hidden = ["hidden"] if self.uses_hidden else []
        return ["loss", "kd", "ce", *hidden, "teacher_ce", *METRICS, "num_tokens"]

    @property
    def divergence_options(self) -> dict[str, float]:
        """The options of all divergences, by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def kd_text(self) -> str:
        """What the two models are compared by, such as "forward_kl (temperature 2)"."""
        options = [f"temperature {self.temperature:g}"]
        if option := divergence_option(self.divergence):
            options.append(f"{option} {getattr(self, option):g}")
        if self.top_k:
            options.append(f"top {self.top_k} and tail")
        return f"{self.divergence} ({', '.join(options)})"

    @property
    def teacher_source(self) -> str | None:
        """The argument by which no teacher is loaded, None if one is."""
        return "teacher_cache" if self.teacher_cache else "self_distillation" if self.self_distillation else None

    @property
    def learns_projectors(self) -> str | None:
        """The argument that requests maps which are trained beside the student, None if there is none."""
        return "hidden_projector=True" if self.hidden_projector else None

    @property
    def uses_hidden(self) -> bool:
        """Whether the hidden-state term has a weight at any time of the run."""
        return self.schedules()["hidden"].highest > 0


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
            "nothing is left to minimize. Set at least one of them above 0."
        )
    scheduled = [f"{term}_schedule" for term, schedule in schedules.items() if schedule.shape != "constant"]
    best = config.metric_for_best_model
    if scheduled and best is not None and best.endswith("loss"):
        raise ValueError(
            f"metric_for_best_model={best!r} with {' and '.join(scheduled)}: the loss is weighted differently at each "
            "step, so the lowest is not the best model's. Set metric_for_best_model to a term, such as 'eval_kd' "
            "or 'eval_ce' (with greater_is_better=False), or leave the schedule out."
        )


def _check_divergence(config: Any) -> None:
    check_divergence(None if _left_open(config, "divergence") else config.divergence, config.divergence_options)
    if not _left_open(config, "temperature") and not (math.isfinite(config.temperature) and config.temperature > 0):
        raise ValueError(f"temperature={config.temperature}: it divides the logits, so it must be above 0 and finite.")
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
    named = [name for name in config.teacher_arguments if getattr(config, name)]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} each name a teacher: there can be one. Give one of them.")
    absent = config.teacher_source
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
