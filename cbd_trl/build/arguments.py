"""Training arguments of a chain: which are refused, and how the others are recorded and compared."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cbd_trl.chain.cards import NON_DEFAULT, VALUES, VERSIONS
from cbd_trl.chain.manifest import library_versions
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig

logger = logging.get_logger(__name__)

TEACHER_ARGUMENTS = (
    "teacher_model_name_or_path",
    "teacher_model_init_kwargs",
    "teacher_model_revision",
    "teacher_weights",
    "teacher_cache",
    "self_distillation",
)
# What works for one training and not for a build, which is several that go on by themselves: why, and a way out.
REFUSED = {
    "push_to_hub": "the checkpoints of every anchor would be pushed to the root of one repository, one over the "
    "other, and the chain itself never. Leave it out, and push the chain once it is built: "
    "`cbd-trl push FOLDER me/my-chain`, or chain.push_to_hub('me/my-chain')",
    "save_only_model": "a build that is interrupted goes on from its last checkpoint, and one without optimizer and "
    "scheduler would go on as another training. Leave it out; checkpoints are removed once an anchor is finished, and "
    "save_total_limit=1 keeps one at a time",
    "ignore_data_skip": "a build that is interrupted goes on from its last checkpoint, and would train on the rows "
    "before it once more. Leave it out",
    "resume_from_checkpoint": "a build looks for the last checkpoint of each anchor by itself. Leave it out",
}
# Arguments that do not decide what an anchor becomes, by the reason. Any other is recorded, those too that a later
# transformers adds.
NOT_RECORDED = {
    "a chain's arguments cannot set it": (*TEACHER_ARGUMENTS, *REFUSED),
    "names of folders and runs": (
        *("output_dir", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    "what is logged and shown": (
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
        *("log_level", "log_level_replica", "disable_tqdm", "report_to", "debug", "skip_memory_metrics"),
        "include_num_input_tokens_seen",
    ),
    "when a checkpoint is written, and what is restored of callbacks": (
        *("save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
        "restore_callback_states_from_checkpoint",
    ),
    "how an evaluation is run": (
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
        *("eval_accumulation_steps", "batch_eval_metrics", "include_for_metrics", "bf16_full_eval", "fp16_full_eval"),
        "eval_packing",
    ),
    "where a model would be pushed to": (
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    ),
    "hardware, and how its memory is used": (
        *("use_cpu", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
        *("liger_kernel_config", "torch_empty_cache_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading", "loss_chunk_size"),
        *("teacher_offload", "pad_to_multiple_of", "use_cache"),
    ),
    "how the work is shared between devices": (
        *("local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    ),
    "who reads the rows, which are the same": (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    ),
    "what scripts read, and no trainer": ("do_train", "do_eval", "do_predict"),
}
# They decide what is trained only where a measured loss does: it chooses among the checkpoints, or the learning rate.
MEASURED = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"),
    *("metric_for_best_model", "greater_is_better"),
)
_FOLLOWS_A_MEASURE = ("reduce_lr_on_plateau", "greedy")
# Of a value in an error; a chat template is known by its beginning.
_SHOWN = 60
_EXCLUDED = frozenset(name for names in NOT_RECORDED.values() for name in names)
# What a tokenizer's chat template and tokens are in.
_TOKENIZER_FILES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
# Of options that a model is loaded with: secrets, and where it is kept.
_NOT_OF_THE_MODEL = (
    "token",
    "use_auth_token",
    "cache_dir",
    "proxies",
    "local_files_only",
    "force_download",
    "device_map",
)


def check_chain_arguments(args: DistillConfig, step: str, teacher: str) -> None:
    """Refuse arguments that a build has no use for, or that would go wrong in one.

    Args:
        args: of a step.
        step: what the step is called.
        teacher: what its teacher is.

    Raises:
        ValueError: naming those that name a teacher (a chain has its own), push checkpoints, or leave a training that
            cannot be gone on from.
    """
    if named := [name for name in TEACHER_ARGUMENTS if getattr(args, name)]:
        raise ValueError(
            f"The args of {step} set {' and '.join(named)}, but {teacher}: there can be one. Leave them out, and give "
            "the first teacher as `source`."
        )
    for name, reason in REFUSED.items():
        if value := getattr(args, name):
            raise ValueError(f"The args of {step} set {name}={value!r}: {reason}.")


def training_record(args: DistillConfig) -> dict[str, Any]:
    """The arguments that decide what is trained, as JSON values.

    Under "values" is every field of the config but those of `NOT_RECORDED`, under "non_default" the names of those
    that are not at their default, and under "versions" the libraries whose defaults the others are.
    """
    values, non_default = {}, []
    follows = args.load_best_model_at_end or _json_value(args.lr_scheduler_type) in _FOLLOWS_A_MEASURE
    for field in dataclasses.fields(args):
        if field.name in _EXCLUDED or (field.name in MEASURED and not follows):
            continue
        values[field.name] = _recorded(args, field.name)
        if _json_value(getattr(args, field.name)) != _json_value(_default(field)):
            non_default.append(field.name)
    return {VALUES: values, NON_DEFAULT: non_default, VERSIONS: library_versions()}


def changed_arguments(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of arguments that differ between two records.

    One that was left at its default both times is the same, whatever the default is by now: a build goes on under
    another transformers. One that the earlier record lacks was not an argument then, or an earlier cbd-trl did not
    record it: it is not compared, and named in a warning where it is given now.

    Args:
        recorded: an earlier `training_record`.
        now: that of now.
    """
    there, here = recorded.get(VALUES, {}), now[VALUES]
    given_then, given_now = recorded.get(NON_DEFAULT, there), now[NON_DEFAULT]
    if unknown := [name for name in given_now if name not in there]:
        logger.warning_once(
            f"What was built before does not record {', '.join(unknown)}: whether that was the same is not known. "
            "What is finished stays as it is."
        )
    return [
        name
        for name, value in here.items()
        if there.get(name, value) != value and (name in given_then or name in given_now)
    ]


def then_and_now(names: Sequence[str], there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The values of what changed, for the end of an error's list of names: " (there: 1, 0.1; now: 2, 0.2)".

    Args:
        names: of what changed; those that neither record has as such, or that look the same shortened, are left out.
        there: what was recorded earlier.
        now: the same, as it is now.
    """
    found = [
        (_shortened(there.get(name)), _shortened(now.get(name))) for name in names if name in there or name in now
    ]
    differing = [pair for pair in found if pair[0] != pair[1]]
    was, wanted = (", ".join(texts) for texts in zip(*differing, strict=True)) if differing else ("", "")
    return f" (there: {was}; now: {wanted})" if differing else ""


def _shortened(value: Any) -> str:
    return text if len(text := repr(value)) <= _SHOWN else f"{text[:_SHOWN]}..."


def loading_options(options: Mapping[str, Any] | str | None) -> str | None:
    """What a model is loaded with, as a record has it: without secrets, and without where it is kept."""
    found = json.loads(options) if isinstance(options, str) and options.startswith("{") else (options or {})
    if not isinstance(found, Mapping):
        return str(found)
    kept = {name: str(value).removeprefix("torch.") for name, value in found.items() if name not in _NOT_OF_THE_MODEL}
    return json.dumps(kept, sort_keys=True) if kept else None


def template_record(path: str | None) -> str | None:
    """A chat template as a record has it: what a file, or a tokenizer in a folder, says, and not where it lies."""
    if path is None or not Path(path).exists():
        return path
    files = [Path(path) / name for name in _TOKENIZER_FILES] if Path(path).is_dir() else [Path(path)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def _recorded(args: DistillConfig, name: str) -> int | float | str | None:
    value = getattr(args, name)
    if name == "objective" and isinstance(args, BridgeDistillConfig):
        # There are several ways to write one.
        value = args.objectives
    elif name == "model_init_kwargs":
        value = loading_options(value)
    elif name == "chat_template_path":
        value = template_record(value)
    return _json_value(value)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _json_value(value: Any) -> int | float | str | None:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float | str | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Options that are not at their default, which transformers fills in by itself.
        value = {
            field.name: entry
            for field in dataclasses.fields(value)
            if (entry := getattr(value, field.name)) != _default(field)
        }
    return json.dumps(value, sort_keys=True, default=str) if value else None
