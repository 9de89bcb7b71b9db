"""Training arguments as chain.json records them."""

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig

_TEACHER_ARGUMENTS = (
    "teacher_model_name_or_path",
    "teacher_model_init_kwargs",
    "teacher_model_revision",
    "teacher_weights",
    "teacher_cache",
    "self_distillation",
)
_RECORDED = (
    "kd_weight",
    "kd_schedule",
    "kd_weight_end",
    "divergence",
    "beta",
    "skew",
    "head_share",
    "temperature",
    "top_k",
    "ce_weight",
    "ce_schedule",
    "ce_weight_end",
    "hidden_weight",
    "hidden_schedule",
    "hidden_weight_end",
    "hidden_loss",
    "hidden_projector",
    "swap_probability",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "optim",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "packing_strategy",
    "seed",
    "bf16",
    "fp16",
)


def check_no_teacher(args: DistillConfig, step: str, teacher: str) -> None:
    """Refuse arguments that name a teacher: a chain has its own.

    Args:
        args: of a step.
        step: what the step is called.
        teacher: what its teacher is.

    Raises:
        ValueError: naming those arguments.
    """
    if named := [name for name in _TEACHER_ARGUMENTS if getattr(args, name)]:
        raise ValueError(
            f"The args of {step} set {' and '.join(named)}, but {teacher}: there can be one. Leave them out, and give "
            "the first teacher as `source`."
        )


def training_record(args: DistillConfig) -> dict[str, Any]:
    """The arguments that decide what is trained, as JSON values, with a fingerprint of them."""
    record = {name: _json_value(getattr(args, name)) for name in _RECORDED}
    if isinstance(args, BridgeDistillConfig):
        # There are several ways to write one.
        record["objective"] = _json_value(args.objectives)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    return {**record, "fingerprint": digest}


def changed_arguments(recorded: Mapping[str, Any], args: DistillConfig) -> list[str]:
    """Recorded arguments that differ from those of now; one that an older version did not have was at its default."""
    defaults = {name: _json_value(field.default) for name, field in type(args).__dataclass_fields__.items()}
    wanted = training_record(args)
    return [name for name in wanted if name != "fingerprint" and recorded.get(name, defaults[name]) != wanted[name]]


def _json_value(value: Any) -> int | float | str | None:
    if isinstance(value, Enum):
        value = value.value
    return value if isinstance(value, int | float | str | None) else json.dumps(value, sort_keys=True, default=str)
