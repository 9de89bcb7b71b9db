"""Checks of the arguments of `DistillTrainer`, before a token is trained on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.utils import logging

from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.formatting import did_you_mean

logger = logging.get_logger(__name__)

# What each place of a trainer takes, of what could stand in a wrong one.
_PLACES: dict[str, tuple[str, Any]] = {
    "model": ("a model", nn.Module),
    "args": ("a config", TrainingArguments),
    "train_dataset": ("a dataset", (Dataset, IterableDataset, DatasetDict, IterableDatasetDict)),
    "processing_class": ("a tokenizer", (PreTrainedTokenizerBase, ProcessorMixin)),
}
_KIND_OF = {
    "teacher_model": "model",
    "eval_dataset": "train_dataset",
    "teacher_processing_class": "processing_class",
}


def check_argument_types(trainer: str, **given: Any) -> None:
    """Check that no argument stands in another's place: behind the student comes its teacher, not `args` as in TRL.

    Args:
        trainer: its name.
        given: its arguments.

    Raises:
        TypeError: naming the place, what it got, and where that belongs.
    """
    for name, value in given.items():
        rows = isinstance(value, list | tuple) and any(isinstance(row, Mapping) for row in value)
        for right, (kind, types) in _PLACES.items():
            if (isinstance(value, types) or (rows and right == "train_dataset")) and right != _KIND_OF.get(name, name):
                second = ": the second place is the teacher's" if name == "teacher_model" else ""
                raise TypeError(
                    f"{name} of {trainer} is a {type(value).__name__}, {kind}{second}. Pass it as `{right}`, such as "
                    f"{trainer}(model, teacher_model=teacher, args=args, train_dataset=dataset, "
                    "processing_class=tokenizer)."
                )
    if not isinstance(given["model"], str | nn.Module):
        raise TypeError(
            f"model of {trainer} is a {type(given['model']).__name__}: it must be a causal language model, or the "
            "path or Hub id of one, as a string."
        )


# What the Trainer itself reports of every evaluation.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


def check_best_metric(args: DistillConfig, eval_dataset: Any, compute_metrics: Any) -> None:
    """Check that evaluations report `metric_for_best_model`, before the first one looks for it in vain.

    Args:
        args: of the run.
        eval_dataset: a dataset, or a dict of them.
        compute_metrics: of the caller; what it reports is not known.

    Raises:
        ValueError: naming those that there are.
    """
    metric = args.metric_for_best_model
    if metric is None or compute_metrics is not None or args.eval_strategy == "no":
        return
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    sets = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    reported = [f"{prefix}{name}" for prefix in sets for name in args.evaluated]
    speeds = [f"{prefix}{name}" for prefix in sets for name in _SPEEDS]
    if metric not in (*reported, *speeds):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} must be reported by the evaluations, which "
            f"report {', '.join(reported)}.{did_you_mean(metric, reported)} Name one of them, or leave "
            "metric_for_best_model out."
        )


def check_arguments(args: Any, config: type[DistillConfig], others: dict[str, Any]) -> None:
    """Check for arguments that would be ignored or cannot work.

    Args:
        args: of the run.
        config: the trainer's kind of it.
        others: further arguments for `trl.SFTTrainer`.

    Raises:
        TypeError: for the wrong kind of args.
        ValueError: for options that contradict each other.
    """
    trainer = config.trainer
    # The config of another trainer may be derived from this one's.
    if not isinstance(args, config) or args.trainer != trainer:
        raise TypeError(
            f"args is a {type(args).__name__}: {trainer} needs a {config.__name__}, which adds the teacher, the "
            "divergence and the weights to SFTConfig."
        )
    if others.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func would replace the distillation loss. Leave it out; the weights of the DistillConfig "
            "shape the loss."
        )
    optimizer = (others.get("optimizers") or (None,))[0]
    if args.learns_projectors and optimizer is not None:
        raise ValueError(
            f"{args.learns_projectors} with optimizers=({type(optimizer).__name__}, ...): an optimizer made before "
            "the projectors would never train them. Pass `optimizer_cls_and_kwargs=(class, options)` instead, or "
            "leave the projectors out."
        )
    for name, neutral in (("hidden_schedule", "constant"), ("hidden_loss", None)):
        value = getattr(args, name)
        if value != neutral and not args.uses_hidden:
            raise ValueError(
                f"{name}={value!r} shapes the hidden-state term, which has no weight: it would be ignored. Set "
                f"hidden_weight above 0, or leave {name} out."
            )
    checkpointing = args.gradient_checkpointing_kwargs
    if args.swap_probability and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(
            "swap_probability with gradient_checkpointing_kwargs={'use_reentrant': True}: reentrant checkpointing "
            "fails where some layers get no gradient. Leave use_reentrant unset, or set swap_probability=0."
        )


def check_run(trainer: Any) -> None:
    """Check what only shows once the student and the accelerator are there.

    Args:
        trainer: a `DistillTrainer` after the initialization of `trl.SFTTrainer`.

    Raises:
        ValueError: for auxiliary losses, virtual tokens or kinds of parallelism that this loss does not have.
    """
    if trainer.aux_loss_enabled:
        raise ValueError(
            "The student is a mixture of experts with a load-balancing loss, which is not part of the distillation "
            "loss. Set router_aux_loss_coef=0.0 in the DistillConfig to distill without it."
        )
    peft_config = getattr(trainer.model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens in front of the student's inputs, where the teacher "
            "has none. Use an adapter that leaves the inputs alone, such as LoRA."
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
        raise ValueError(
            "Context and sequence parallelism split a row over processes, which this loss does not put together "
            "again. Set cp_size and sp_size to 1 and shard with FSDP or DeepSpeed instead."
        )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.teacher_offload and sharded:
        raise ValueError(
            "teacher_offload=True brings the teacher's layers to the device one by one, and FSDP and DeepSpeed shard "
            "them over the devices: there can be one of the two. Leave teacher_offload out, and let FSDP or DeepSpeed "
            "offload parameters if memory is short."
        )
    check_hybrids_unsharded(trainer.args, sharded)
    if not sharded and peft_config is None:
        # FSDP in mixed precision and DeepSpeed keep weights in float32 beside those that they compute with.
        warn_of_rounding({parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad})


def warn_of_rounding(dtypes: Iterable[Any]) -> None:
    """Warn, once, if weights in 16 bits are to be trained: the optimizer's updates are rounded into them.

    Args:
        dtypes: of the weights that are trained; torch.dtype, or their names.
    """
    named = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    for dtype in sorted(named & {"bfloat16", "float16"}):
        logger.warning_once(
            f"The weights to be trained are in {dtype}, and an update of less than about "
            f"{100 * torch.finfo(getattr(torch, dtype)).eps / 4:.2g} % of a weight changes nothing: at usual learning "
            "rates many are that small. Load the model in float32 (dtype='float32' among the model_init_kwargs, which "
            "is the default): with bf16=True it computes in bfloat16 all the same."
        )


def will_be_sharded(args: Any) -> bool:
    """Whether FSDP or DeepSpeed will shard the student, by the arguments and the launcher."""
    launcher = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(parse_flag_from_env(name) for name in launcher)


def check_hybrids_unsharded(args: Any, sharded: bool | None = None) -> None:
    """Check that hybrids are not of models that are sharded.

    Args:
        args: of the run.
        sharded: by FSDP or DeepSpeed; None before there is an accelerator: what the arguments and the launcher say.

    Raises:
        ValueError: if there are any.
    """
    if args.swap_probability and (will_be_sharded(args) if sharded is None else sharded):
        raise ValueError(
            f"swap_probability={args.swap_probability} runs the teacher's layers inside the student, or mixes the "
            "weights of the two, which FSDP and DeepSpeed shard each on their own. Set swap_probability=0, or train "
            "with DDP or one process."
        )


def check_hybrid(trainer: Any, hybrid: Any) -> None:
    """Check that a hybrid made by the caller would be trained.

    Args:
        trainer: a `DistillTrainer` after the initialization of `trl.SFTTrainer`.
        hybrid: the trainer's argument.

    Raises:
        ValueError: for no hybrid steps, no teacher whose layers can be compared, or a student with an adapter.
    """
    if hybrid is None:
        return
    if not trainer.args.swap_probability:
        raise ValueError(
            f"`hybrid` was given with swap_probability={trainer.args.swap_probability}: no step would train it. Set "
            "swap_probability above 0, or leave `hybrid` out."
        )
    if hasattr(trainer.model, "peft_config"):
        raise ValueError(
            f"`hybrid` was given, and the student is a {type(trainer.model).__name__}: hybrids that mix weights train "
            "the student's own, not those of an adapter. Leave out peft_config, or `hybrid` and swap_probability."
        )
