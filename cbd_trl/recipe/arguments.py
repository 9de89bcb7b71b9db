"""Training arguments in a recipe: names and types checked, configs made of them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
from trl import SFTConfig

from cbd_trl.recipe.argument_checks import check_argument
from cbd_trl.recipe.schema import Recipe
from cbd_trl.recipe.values import Values, inside, shown
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig

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
