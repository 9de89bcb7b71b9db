"""Arguments of `DistillTrainer`."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from cbd_trl.losses.divergences import DIVERGENCES, get_divergence


@dataclass
class DistillConfig(SFTConfig):
    """Arguments of `DistillTrainer`: those of `trl.SFTConfig`, and these.

    As in `SFTConfig`, gradient checkpointing is on by default and so is bf16 mixed precision: pass `bf16=False` to
    train in the model's own dtype.

    Args:
        teacher_model_name_or_path: path or Hub id of the teacher, used when the trainer is given none.
        teacher_model_init_kwargs: keyword arguments of `AutoModelForCausalLM.from_pretrained` for a teacher given as a
            path or Hub id; a dict, or a JSON string on the command line. Unless named here, dtype and attention
            implementation are the student's.
        teacher_model_revision: revision of a teacher (and its tokenizer) given as a Hub id.
        kd_weight: weight of the divergence between teacher and student.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        beta: of `jsd`: 0 is forward KL, 1 reverse KL, as in TRL.
        temperature: divides the logits of both models in the divergence, which is multiplied by its square (Hinton et
            al. 2015) so that its weight keeps its meaning.
        ce_weight: weight of the cross-entropy on the tokens of the dataset.
        hidden_weight: weight of the mean cosine distance between each student layer's output and that of the last
            layer of its block in the teacher. Needs models of equal width or of one chain. None: 0, or what
            `build_chain` sets.
        swap_probability: share of the optimiser steps on which a random number of the last student blocks is replaced
            by the teacher's frozen blocks. Needs two models of one chain that differ in depth alone. None: 0, or what
            `build_chain` sets.

    Raises:
        ValueError: for a value that has no meaning, or an SFT option that this loss does not have.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

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
    kd_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the divergence between teacher and student."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence between the next-token distributions of teacher and student.",
            "choices": list(DIVERGENCES),
        },
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Of the divergence `jsd`: 0 is forward KL, 1 reverse KL."},
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of both models in the divergence, which is multiplied by its square so that "
            "its weight keeps its meaning."
        },
    )
    ce_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the cross-entropy on the tokens of the dataset."},
    )
    hidden_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean cosine distance between each student layer's output and that of the last "
            "layer of its block in the teacher. Needs models of equal width or of one chain. Not set: 0, or what "
            "`build_chain` sets."
        },
    )
    swap_probability: float | None = field(
        default=None,
        metadata={
            "help": "Share of the optimiser steps on which a random number of the last student blocks is replaced by "
            "the teacher's frozen blocks. Needs two models of one chain that differ in depth alone. Not set: 0, or "
            "what `build_chain` sets."
        },
    )

    def __post_init__(self) -> None:
        """Check every value, so that a mistake is seen before a model is loaded."""
        super().__post_init__()
        self._check_weights()
        get_divergence(self.divergence)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature}: it divides the logits, so it must be above 0 and finite."
            )
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta={self.beta}: it is the teacher's share of the jsd mixture, so it must lie between 0 (forward "
                "KL) and 1 (reverse KL)."
            )
        if self.swap_probability is not None and not 0 <= self.swap_probability <= 1:
            raise ValueError(
                f"swap_probability={self.swap_probability}: it is the share of steps taken on hybrids, so it must lie "
                "between 0 and 1."
            )
        for name, value, neutral in (
            ("loss_type", self.loss_type, "nll"),
            ("label_smoothing_factor", self.label_smoothing_factor, 0),
        ):
            if value != neutral:
                raise ValueError(
                    f"{name}={value!r} changes the loss of SFT, which distillation does not use: it would be ignored. "
                    f"Leave it at {neutral!r}; the divergence, temperature and weights shape this loss."
                )

    def _check_weights(self) -> None:
        weights = {name: getattr(self, name) for name in ("kd_weight", "ce_weight", "hidden_weight")}
        for name, value in weights.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name}={value}: a weight of the loss must be finite and at least 0 (0 switches the term off)."
                )
        if not any(weights.values()):
            raise ValueError(
                f"kd_weight, ce_weight and hidden_weight are {list(weights.values())}: nothing is left to minimise. "
                "Set at least one of them above 0."
            )
