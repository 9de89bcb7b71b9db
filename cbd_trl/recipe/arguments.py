"""Training arguments in a recipe: names and types checked, configs made of them."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from cbd_trl.build.arguments import REFUSED
from cbd_trl.recipe.schema import Recipe
from cbd_trl.recipe.values import Values, inside, shown
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.formatting import did_you_mean

# The chain's folder is that of the recipe, and each training's is inside it.
_NOT_HERE = ("output_dir",)
_Config = TypeVar("_Config", bound=DistillConfig)


def read_arguments(values: Values, value: Any, place: str, config: type[DistillConfig]) -> dict[str, Any]:
    """Fields of a config, those that are unknown, of the wrong type or without a meaning refused and left out.

    Args:
        values: takes the problems.
        value: as read; None for none.
        place: in the file.
        config: the dataclass.
    """
    if value is None:
        return {}
    known = [field.name for field in dataclasses.fields(config) if field.init and field.name not in _NOT_HERE]
    hints = typing.get_type_hints(config)
    arguments = {}
    for key, entry in values.mapping(value, place, known).items():
        try:
            read = _as_annotated(entry, hints[key])
            check_argument(key, read)
            arguments[key] = read
        except ValueError as error:
            values.refuse(inside(place, key), str(error))
    return arguments


def _as_annotated(value: Any, hint: Any) -> Any:
    """A value of a field's type. YAML reads 4e-4 as text: a number wants a dot for it (4.0e-4)."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    if value is False and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        # YAML reads a bare `no` so.
        return "no"
    if any(kind not in (int, float, bool, str, type(None)) for kind in kinds):
        return value
    if value is None and type(None) not in kinds:
        raise ValueError("it has no value. Give it one, or leave it out for the default.")
    if value is None or type(value) in kinds or (float in kinds and type(value) is int):
        return value
    if float in kinds and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
    raise ValueError(f"{shown(value)} is a {type(value).__name__}, wanted {names}.")


def anchor_args(recipe: Recipe, own: Mapping[str, Any]) -> DistillConfig:
    """The arguments of one anchor's training.

    Args:
        recipe: what holds for all.
        own: what is the anchor's own.

    Raises:
        ValueError: a value that has no meaning.
    """
    return _without_evaluation(DistillConfig(recipe.output_dir, **{**_of_the_machine(), **recipe.args, **own}))


def bridge_args(recipe: Recipe) -> BridgeDistillConfig:
    """The arguments of the bridge: what trains the anchors trains it, but for its own.

    Args:
        recipe: with a bridge.

    Raises:
        ValueError: a value that has no meaning.
    """
    assert recipe.bridge is not None
    # The source's way of being loaded is not the student's, nor is what compares models of one tokenizer.
    shared = {field.name for field in dataclasses.fields(SFTConfig) if field.init} - {"model_init_kwargs"}
    common = {key: value for key, value in recipe.args.items() if key in shared}
    args = BridgeDistillConfig(recipe.output_dir, **{**_of_the_machine(), **common, **recipe.bridge.args})
    return _without_evaluation(args)


def default_args(recipe: Recipe) -> DistillConfig:
    """Arguments to look at the rest of a recipe with, whose own are wrong."""
    return DistillConfig(recipe.output_dir, **_of_the_machine())


def _without_evaluation(args: _Config) -> _Config:
    if str(args.eval_strategy).rpartition(".")[2].lower() != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy!s}: in a recipe the trainings have no text to evaluate on. Leave it "
            "out; `evaluation` measures the finished chain."
        )
    return args


def _of_the_machine() -> dict[str, Any]:
    """Without an accelerator transformers wants to be told so."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True, "dataloader_pin_memory": False}


# What these need is not all that makes transformers list them as available (an API key, the absence of MLflow).
_PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet_ml", "flyte": "flytekit"}
# Seeds go to NumPy, too.
_SEEDS = 2**32


def _from(lowest: float) -> Callable[[float], bool]:
    return lambda number: number >= lowest and math.isfinite(number)


def _above_0(number: float) -> bool:
    return number > 0 and math.isfinite(number)


_COUNT = (_from(1), "it counts, so it must be at least 1")
_SHARE = (lambda number: 0 <= number < 1, "it is a share of a running mean, so it must be at least 0 and below 1")
_NOT_NEGATIVE = (_from(0), "it must be finite and at least 0")
_INTERVAL = (_above_0, "it is a number of steps, or a share of them, so it must be finite and above 0")
_SEED = (lambda number: 0 <= number < _SEEDS, f"a seed must be at least 0 and below {_SEEDS}")
# Field -> whether a number has a meaning in it, and what is wanted instead.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (_from(0), "a step of the optimiser must be finite and at least 0"),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": (_from(2), "a row needs a token and one to predict from it, so it must be at least 2"),
    "max_steps": (lambda number: number == -1 or number >= 1, "it must be at least 1, or -1 to count in epochs"),
    "num_train_epochs": (_above_0, "it must be finite and above 0"),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "logging_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
}


def check_argument(name: str, value: Any) -> None:
    """Refuse a value that no training could be done with.

    Args:
        name: of a field of `DistillConfig`.
        value: of the field's type; None where it may be left open.

    Raises:
        ValueError: what it got, what it wanted and why.
    """
    if value is None:
        return
    if name in REFUSED and value:
        raise ValueError(f"{value!r} cannot be: {REFUSED[name]}.")
    if name in _RANGES:
        allowed, wanted = _RANGES[name]
        if not allowed(value):
            raise ValueError(f"{value!r} cannot be: {wanted}. Leave it out for the default.")
    elif name in _CHECKS:
        _CHECKS[name](value)


def _check_report_to(value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = list(INTEGRATION_TO_CALLBACK)
            raise ValueError(
                f"transformers reports to nothing of the name {shown(name)}.{did_you_mean(str(name), known)} There "
                f"are: {', '.join(known)}; or all, or none."
            )
        package = _PACKAGES.get(name)
        if name not in get_available_reporting_integrations() and (package is None or find_spec(package) is None):
            raise ValueError(
                f"what {name} needs is not installed here, so the training would end before its first step. Install "
                f"it ({package or name}), or write none."
            )


def _check_optim(value: Any) -> None:
    known = [str(name.value) for name in OptimizerNames]
    if value not in known:
        raise ValueError(
            f"there is no optimiser {shown(value)}.{did_you_mean(str(value), known)} There are: {', '.join(known)}."
        )
    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    reason = _no_optimiser(SimpleNamespace(**{**defaults, "optim": OptimizerNames(value)}))
    if reason is not None:
        raise ValueError(f"the optimiser {value} cannot be made here: {reason} Or take adamw_torch.")


def _no_optimiser(args: Any) -> str | None:
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
            f"{value!r} is no column of what is trained on: a recipe brings all data into the formats of SFTTrainer, "
            f"whose column of text is `text`. Leave it out, and name the column beside the data: column: {value}."
        )


def _check_init_kwargs(value: Any) -> None:
    options = value
    if isinstance(value, str) and value.startswith("{"):
        try:
            options = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"{shown(value)} is no JSON ({error}). Write it as a mapping: {{dtype: float32}}."
            ) from error
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{shown(value)} is no mapping of options that the source is loaded with. Write one: {{dtype: bfloat16}}."
        )
    for key in ("dtype", "torch_dtype"):
        given = options.get(key)
        # A mapping has one for each part of a model.
        if given is None or given == "auto" or isinstance(given, Mapping):
            continue
        kind = getattr(torch, given, None) if isinstance(given, str) else given
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(
                f"{key}: {shown(given)} is no dtype that weights can be trained in. Write float32, bfloat16, float16 "
                "or auto."
            )


def _check_deepspeed(value: Any) -> None:
    if isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
        raise ValueError(
            f"there is no file {value}, which would hold the settings of DeepSpeed as JSON. Name one that exists, or "
            "write the settings as a mapping."
        )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "report_to": _check_report_to,
    "optim": _check_optim,
    "dataset_text_field": _check_text_field,
    "model_init_kwargs": _check_init_kwargs,
    "deepspeed": _check_deepspeed,
}
