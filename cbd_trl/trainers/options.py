"""The arguments that `DistillConfig` and `BridgeDistillConfig` add to `trl.SFTConfig`.

They are apart from the configs so that `cbd-trl distill --help` lists them without importing torch or TRL, which takes
seconds. What each means is in the docstrings of the configs.
"""

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from cbd_trl.losses.divergence_table import DIVERGENCES, OPTIONS, divergences_with
from cbd_trl.utils.lazy import NamesOf

HIDDEN_LOSSES = NamesOf("cbd_trl.losses.hidden", "HIDDEN_LOSSES")
SCHEDULES = NamesOf("cbd_trl.losses.objective", "SCHEDULES")
# The default objective. An untrained GPT-2 of 30M with 8k tokens, taught by SmolLM2-135M beside the cross-entropy on
# 102k of its tokens, is at 2.369 and 2.375 bits per byte (two seeds) by it alone, at 2.345 and 2.355 with the layers
# beside it, at 2.444 and 2.455 by the cross-entropy alone.
OBJECTIVE = "prefix"


def _help_of(option: str) -> str:
    return f"Of the divergence {' and '.join(divergences_with(option))}. {OPTIONS[option].help}"


# The option of each divergence is a field: a row of the table of divergences is all that a new one takes.
_DivergenceOptions: Any = make_dataclass(
    "_DivergenceOptions",
    [
        (name, float, field(default=option.default, metadata={"help": _help_of(name)}))
        for name, option in OPTIONS.items()
    ],
)


@dataclass
class DistillOptions(_DivergenceOptions):
    """The fields of `DistillConfig` that `SFTConfig` has not."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the teacher, used when the trainer is given none."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `AutoModelForCausalLM.from_pretrained` for a teacher given as a path or Hub "
            "id. Unless named here, dtype and attention implementation are the student's."
        },
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of a teacher (and its tokenizer) given as a Hub id."},
    )
    teacher_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of several teachers, whose distributions are averaged; scaled to sum to 1. Not set: "
            "equal. Python only: several teachers are passed as a list."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that `cbd-trl cache` wrote: no teacher is loaded."},
    )
    teacher_offload: bool = field(
        default=False,
        metadata={"help": "Keep the teacher in the CPU's memory and bring each layer to the device when it runs."},
    )
    self_distillation: bool = field(
        default=False,
        metadata={"help": "The teacher is the student's own base, its adapter switched off. Needs a PEFT student."},
    )
    kd_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the divergence between teacher and student."},
    )
    kd_schedule: str = field(
        default="constant",
        metadata={"help": "How kd_weight changes over the run.", "choices": SCHEDULES},
    )
    kd_weight_end: float | None = field(
        default=None,
        metadata={"help": "kd_weight at the end of the run, where it has a schedule. Not set: 0."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence between the next-token distributions of teacher and student.",
            "choices": list(DIVERGENCES),
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of both models in the divergence, which is multiplied by its square so that "
            "its weight keeps its meaning."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Compare the teacher's k most likely tokens and one bucket for all others. Not set: every token."
        },
    )
    ce_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the cross-entropy on the tokens of the dataset."},
    )
    ce_schedule: str = field(
        default="constant",
        metadata={"help": "How ce_weight changes over the run.", "choices": SCHEDULES},
    )
    ce_weight_end: float | None = field(
        default=None,
        metadata={"help": "ce_weight at the end of the run, where it has a schedule. Not set: 0."},
    )
    hidden_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean distance between each student layer's output and that of the last layer of "
            "its block in the teacher. Needs models of equal width or of one chain, or hidden_projector. Not set: 0, "
            "or what `build_chain` sets."
        },
    )
    hidden_schedule: str = field(
        default="constant",
        metadata={"help": "How hidden_weight changes over the run.", "choices": SCHEDULES},
    )
    hidden_weight_end: float | None = field(
        default=None,
        metadata={"help": "hidden_weight at the end of the run, where it has a schedule. Not set: 0."},
    )
    hidden_loss: str | None = field(
        default=None,
        metadata={
            "help": "Distance of hidden states: `cosine`, or `mse`, the squared distance over the square of the "
            "teacher's state. Not set: `cosine`, or what `build_chain` sets.",
            "choices": HIDDEN_LOSSES,
        },
    )
    hidden_projector: bool = field(
        default=False,
        metadata={
            "help": "Compare hidden states through a learned matrix per layer, for models that do not share channels. "
            "It is trained along, kept in checkpoints, and no part of the student."
        },
    )
    swap_probability: float | None = field(
        default=None,
        metadata={
            "help": "Share of the optimizer steps that train a hybrid beside the student, on the same tokens: the "
            "student with a random number of its blocks replaced by the teacher's frozen ones. Needs two models of "
            "one chain that differ in depth alone; `build_chain` has others for widths. Not set: 0, or what "
            "`build_chain` sets."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose logits are held at a time. Not set: what suits the vocabulary and the device."
        },
    )


@dataclass
class BridgeOptions(DistillOptions):
    """The fields of `BridgeDistillConfig` that `SFTConfig` has not, those of `DistillConfig` among them."""

    objective: dict[str, Any] | str | None = field(
        default=OBJECTIVE,
        metadata={
            "help": "What the two models are compared by, such as prefix, alm or uld; or several with their "
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
