"""Training arguments in a recipe: names, types and values checked.

What transformers and TRL find when a config is made is theirs to find. Checked here is what they would find midway: a
build makes the trainer of its last anchor after it has trained all others.
"""

import contextlib
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator, create_model
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from cbd_trl.build.arguments import REFUSED
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.formatting import did_you_mean
from cbd_trl.utils.untrusted import shown

# The chain's folder is that of the recipe, and each training's is inside it.
_NOT_HERE = ("output_dir",)
_CONFIGS = {config.__name__: config for config in (DistillConfig, BridgeDistillConfig)}
_PLAIN = (int, float, bool, str)


@cache
def arguments_model(config: str) -> type[BaseModel]:
    """Make the pydantic model of the arguments of a config: its fields, all optional.

    Args:
        config: "DistillConfig" or "BridgeDistillConfig".
    """
    hints = typing.get_type_hints(_CONFIGS[config])
    fields: dict[str, Any] = {
        field.name: (
            Annotated[_kind(hints[field.name], field.name), AfterValidator(partial(_checked, field.name))],
            None,
        )
        for field in dataclasses.fields(_CONFIGS[config])
        if field.init and field.name not in _NOT_HERE
    }
    return create_model(config, __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **fields)


def _kind(hint: Any, name: str) -> Any:
    """Choose the type and range that pydantic checks: those of the field where it is of a plain type, or none."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    plain = [kind for kind in kinds if kind is not type(None)]
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        # YAML reads a bare `no` as false.
        return Annotated[Any, BeforeValidator(lambda value: "no" if value is False else value)]
    if len(plain) != 1 or plain[0] not in _PLAIN:
        return Any
    kind = Annotated[hint, _RANGES[name]] if name in _RANGES else hint
    return Annotated[kind, WrapValidator(_as_number)] if plain[0] is float else kind


def _as_number(value: Any, check: Callable[[Any], Any]) -> Any:
    """Read 4e-4, which YAML takes for text, as a number; leave a whole number as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    checked = check(value)
    return value if type(value) is int else checked


def _checked(name: str, value: Any) -> Any:
    check_argument(name, value)
    return value


# What these need is not all that makes transformers list them as available (an API key, the absence of MLflow).
_PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet_ml", "flyte": "flytekit"}
_COUNT = Field(ge=1)
_SHARE = Field(ge=0, lt=1)
_NOT_NEGATIVE = Field(ge=0, allow_inf_nan=False)
_POSITIVE = Field(gt=0, allow_inf_nan=False)
# Seeds go to NumPy, too.
_SEED = Field(ge=0, lt=2**32)
# What a config does not check of its numbers.
_RANGES: dict[str, Any] = {
    "learning_rate": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    # A token, and one to predict from it.
    "max_length": Field(ge=2),
    "num_train_epochs": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "save_steps": _POSITIVE,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": Field(ge=0),
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
}


def check_argument(name: str, value: Any) -> None:
    """Check a value that a config takes and a training would fail on.

    Args:
        name: of a field of `DistillConfig`.
        value: of the field's type; None where it may be left open.

    Raises:
        ValueError: what it got, what it wanted and why.
    """
    if value is None:
        return
    if name in REFUSED and value:
        raise ValueError(f"{value!r} cannot be used: {REFUSED[name]}.")
    if name in _CHECKS:
        _CHECKS[name](value)


def _check_max_steps(value: int) -> None:
    if value != -1 and value < 1:
        raise ValueError(f"{value!r} must be at least 1, or -1 to count in epochs.")


def _check_report_to(value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = list(INTEGRATION_TO_CALLBACK)
            raise ValueError(
                f"transformers has no integration {shown(name)}.{did_you_mean(str(name), known)} There "
                f"are: {', '.join(known)}; or all, or none."
            )
        package = _PACKAGES.get(name)
        if name not in get_available_reporting_integrations() and (package is None or find_spec(package) is None):
            raise ValueError(
                f"what {name} needs is not installed here, so the training would end before its first step. Install "
                f"it ({package or name}), or write none."
            )


def _check_optim(value: Any) -> None:
    if value not in [str(name.value) for name in OptimizerNames]:
        # The config refuses it, and lists them.
        return
    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    reason = _missing_optimizer(SimpleNamespace(**{**defaults, "optim": OptimizerNames(value)}))
    if reason is not None:
        raise ValueError(f"the optimizer {value} cannot be made here: {reason} Or use adamw_torch.")


def _missing_optimizer(args: Any) -> str | None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        # Others want the model, or options of their own: that says nothing of whether they are installed.
        missing = re.search("install|import|unsupported", str(error))
        return f"{str(error).rstrip('.')}." if missing else None
    except Exception as error:  # whatever an import of a package that is not whole raises
        return f"{' '.join(str(error).split()).rstrip('.')}."
    return None


def _check_text_field(value: str) -> None:
    if value != "text":
        raise ValueError(
            f"{value!r} cannot be used: a recipe brings all data into the formats of SFTTrainer, whose column of text "
            f"is `text`. Leave it out, and name the column beside the data: column: {value}."
        )


def _check_init_kwargs(value: Any) -> None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            # The config refuses it.
            return
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{shown(value)} must be a mapping of options that the source is loaded with. Write one: {{dtype: "
            "bfloat16}."
        )
    for key in ("dtype", "torch_dtype"):
        given = value.get(key)
        # A mapping has one for each part of a model.
        if given is None or given == "auto" or isinstance(given, Mapping):
            continue
        kind = getattr(torch, given, None) if isinstance(given, str) else given
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(
                f"{key}: {shown(given)} must be a dtype that weights can be trained in. Write float32, bfloat16, "
                "float16 or auto."
            )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "max_steps": _check_max_steps,
    "report_to": _check_report_to,
    "optim": _check_optim,
    "dataset_text_field": _check_text_field,
    "model_init_kwargs": _check_init_kwargs,
}
