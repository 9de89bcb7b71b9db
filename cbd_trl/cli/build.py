"""What `cbd-trl build` does: a recipe, or the same in flags."""

import argparse
import dataclasses
from typing import Any, NoReturn

from trl import ScriptArguments

from cbd_trl.cli.arguments import BuildArguments
from cbd_trl.cli.parsing import UsageError, evaluation_rows, parse_anchors, parse_bridge, parse_flags, require
from cbd_trl.utils.datasets import load_rows

_RECIPE_FLAGS = ("--dry-run", "--set", "--list-recipes")


def build(flags: list[str]) -> None:
    """cbd-trl build.

    Args:
        flags: as typed.
    """
    if not flags or "--recipe" in {flag.partition("=")[0] for flag in flags}:
        raise UsageError(
            "Name a recipe without a flag: cbd-trl build recipe.yaml --dry-run, or one that --list-recipes names: "
            "cbd-trl build smollm2-135m --dry-run. Or say it all in flags, from --source on."
        )
    if not flags[0].startswith("-") or flags[0].partition("=")[0] in _RECIPE_FLAGS:
        _build_recipe(flags)
    else:
        _build_from_flags(flags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.rstrip(".") + ". Beside a recipe there are --dry-run, --set and --list-recipes.")


def _build_recipe(flags: list[str]) -> None:
    parser = _Parser(prog="cbd-trl build", description="Build the chain that a recipe says.", allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", help="A YAML file, or the name of a recipe that comes with cbd-trl.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Check everything, print what it would take, and build nothing."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Another value for a key of the recipe: --set source=DIR, --set args.max_steps=20.",
    )
    parser.add_argument("--list-recipes", action="store_true", help="List the recipes that come with cbd-trl.")
    arguments = parser.parse_args(flags)
    from cbd_trl.recipe.schema import shipped_recipes

    if arguments.list_recipes:
        print("\n".join(f"{name:<14}{what}" for name, what in shipped_recipes().items()))
        return
    if arguments.recipe is None:
        raise UsageError(f"A recipe is missing: name a YAML file, or one of {', '.join(shipped_recipes())}.")
    _run(arguments.recipe, arguments.set, arguments.dry_run)


def _run(name: str, changes: list[str], dry_run: bool) -> None:
    from accelerate import PartialState

    from cbd_trl.recipe.check import check_recipe, how_estimated, recipe_table
    from cbd_trl.recipe.run import build_checked
    from cbd_trl.recipe.schema import RecipeError, read_recipe
    from cbd_trl.utils.progress import make_console

    recipe = read_recipe(name, changes)
    check = check_recipe(recipe)
    if check.costs and PartialState().is_main_process:
        console = make_console()
        console.print(recipe_table(check))
        print(how_estimated(check))
    if dry_run and PartialState().is_main_process:
        print("Nothing was built or written: this is a dry run.")
    if check.problems:
        raise RecipeError(recipe.name, check.problems, recipe.lines)
    if not dry_run:
        _tell(build_checked(check), recipe.output_dir)


def _tell(chain: Any, folder: str) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    for anchor in chain.anchors:
        print(f"{anchor.name}: {anchor.num_parameters:,} parameters, {anchor.shape}")
    print(f"The chain is in {folder}. A size from it: cbd-trl init {folder} --num-parameters N --output DIR")


def _with_own_run(anchor: dict[str, Any] | float, args: Any) -> dict[str, Any] | float:
    """An anchor whose own `args` (training arguments that differ) and `dataset` (a file or Hub id) are made real."""
    if not isinstance(anchor, dict):
        return anchor
    own = dict(anchor)
    if isinstance(changes := own.get("args"), dict):
        unknown = changes.keys() - {field.name for field in dataclasses.fields(args)}
        if unknown:
            raise ValueError(f"--anchors: args of {anchor}: {sorted(unknown)} are no fields of DistillConfig.")
        own["args"] = dataclasses.replace(args, **changes)
    if isinstance(own.get("dataset"), str):
        own["dataset"] = load_rows(own["dataset"])
    return own


def _bridge_step(value: str | dict[str, Any] | None, args: Any) -> Any:
    """The bridge of `--bridge`, which is trained as the anchors are but for its own `args`."""
    own = parse_bridge(value)
    if own is None:
        return None
    from trl import SFTConfig

    from cbd_trl.build.bridge_step import BridgeStep
    from cbd_trl.trainers.bridge_config import BridgeDistillConfig

    changes = own.get("args") or {}
    if unknown := changes.keys() - {field.name for field in dataclasses.fields(BridgeDistillConfig)}:
        raise ValueError(f"--bridge: {sorted(unknown)} in args are no fields of BridgeDistillConfig.")
    # The source's way of being loaded is not the student's, nor is what compares models of one tokenizer.
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init} - {"model_init_kwargs"}
    config = BridgeDistillConfig(**{**{name: getattr(args, name) for name in names}, **changes})
    dataset = None if own.get("dataset") is None else load_rows(own["dataset"])
    return BridgeStep(own["model"], args=config, dataset=dataset)


def _build_from_flags(flags: list[str]) -> None:
    from cbd_trl.trainers.distill_config import DistillConfig

    description = (
        "Distil a chain of anchors from a source model: `cbd-trl build RECIPE.yaml [--dry-run] [--set KEY=VALUE]`, "
        "with a recipe of your own or one of those that --list-recipes names; or in flags, as below. --output_dir is "
        "the chain's folder; run again with the same flags, the command goes on where it was interrupted."
    )
    arguments, script, args = parse_flags(
        "build", description, [BuildArguments, ScriptArguments, DistillConfig], flags, defaults={"output_dir": "chain"}
    )
    require(source=arguments.source, dataset_name=script.dataset_name)
    anchors = [_with_own_run(anchor, args) for anchor in parse_anchors(arguments.anchors)]
    bridge_step = _bridge_step(arguments.bridge, args)
    from cbd_trl.build.build import build_chain

    chain = build_chain(
        arguments.source,
        anchors,
        dataset=load_rows(
            script.dataset_name, script.dataset_config, script.dataset_train_split, script.dataset_streaming
        ),
        eval_dataset=evaluation_rows(script, args),
        output_dir=args.output_dir,
        args=args,
        bridge=bridge_step,
        calibration_tokens=arguments.calibration_tokens,
        revision=arguments.source_revision,
    )
    _tell(chain, str(args.output_dir))
