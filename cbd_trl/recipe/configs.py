"""Training configs made from a recipe: of the chain, of one anchor, of the bridge."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from trl import SFTConfig

from cbd_trl.recipe.schema import Recipe
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.distill_config import DistillConfig

_Config = TypeVar("_Config", bound=DistillConfig)


def chain_args(recipe: Recipe, args: Mapping[str, Any]) -> DistillConfig:
    """Make the config of a chain.

    Args:
        recipe: the recipe.
        args: `recipe.args`, or those of an anchor.

    Raises:
        ValueError: the config refuses a value.
    """
    return _without_evaluation(DistillConfig(recipe.output_dir, **{**_of_the_machine(), **args}))


def anchor_args(recipe: Recipe, own: Mapping[str, Any]) -> DistillConfig:
    """Make the config of one anchor's training.

    Args:
        recipe: with the arguments of all anchors.
        own: arguments of this anchor alone.

    Raises:
        ValueError: the config refuses a value.
    """
    return chain_args(recipe, {**recipe.args, **own})


def bridge_args(recipe: Recipe, own: Mapping[str, Any]) -> BridgeDistillConfig:
    """Make the config of the bridge: what trains the anchors trains it, but for its own arguments.

    Args:
        recipe: with the arguments of all anchors.
        own: arguments of the bridge alone.

    Raises:
        ValueError: the config refuses a value.
    """
    # The source's way of being loaded is not the student's, nor is what compares models of one tokenizer.
    shared = {field.name for field in dataclasses.fields(SFTConfig) if field.init} - {"model_init_kwargs"}
    common = {key: value for key, value in recipe.args.items() if key in shared}
    args = BridgeDistillConfig(recipe.output_dir, **{**_of_the_machine(), **common, **own})
    return _without_evaluation(args)


def default_args(recipe: Recipe) -> DistillConfig:
    """Make a config to check the rest of a recipe with, whose own is wrong."""
    return DistillConfig(recipe.output_dir, **_of_the_machine())


def refused_argument(make: Callable[[Mapping[str, Any]], Any], args: Mapping[str, Any]) -> str | None:
    """Find the argument without which a config can be made.

    Args:
        make: a config from arguments.
        args: from which it cannot be made.

    Returns:
        its name; None where there is not exactly one.
    """
    found = []
    for name in args:
        try:
            make({key: value for key, value in args.items() if key != name})
        except Exception:  # as in `Check.attempt`: this asks only whether it goes away
            continue
        found.append(name)
    return found[0] if len(found) == 1 else None


def _without_evaluation(args: _Config) -> _Config:
    if str(args.eval_strategy).rpartition(".")[2].lower() != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy!s}: the trainings of a recipe have no text to evaluate on. Leave it "
            "out; `evaluation` measures the finished chain."
        )
    return args


def _of_the_machine() -> dict[str, Any]:
    """Without an accelerator transformers must be given `use_cpu`."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True, "dataloader_pin_memory": False}
