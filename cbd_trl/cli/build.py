"""`cbd-trl build`: a chain from a recipe."""

import argparse
from typing import Any, NoReturn

from cbd_trl.cli.parsing import UsageError

_SKETCH = "{source: DIR, data: rows.jsonl, anchors: [85M, 44M], output_dir: chain, args: {max_steps: 500}}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"{message.rstrip('.')}. Write what is built in a recipe, a YAML file such as {_SKETCH}: "
            "cbd-trl build recipe.yaml --dry-run. Beside it there are --set KEY=VALUE for another value of a key, "
            "as in --set args.max_steps=20, and --list-recipes."
        )


def build(flags: list[str]) -> None:
    """Run `cbd-trl build`.

    Args:
        flags: as typed.
    """
    parser = _Parser(
        prog="cbd-trl build",
        usage="cbd-trl build RECIPE [--dry-run] [--shape-search N] [--set KEY=VALUE ...]",
        description="Distill a chain of anchors from a source model, as a recipe describes it. Run again, the command "
        "goes on where it was interrupted.",
        epilog=f"A recipe is a YAML file such as {_SKETCH}; docs/guides/recipes.md lists its keys, and the training "
        "arguments in `args` are those that cbd-trl distill --help-all lists. On several devices: accelerate launch "
        "-m cbd_trl.cli build RECIPE.",
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", help="A YAML file, or the name of a recipe that comes with cbd-trl.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Check everything, print what it would take, and build nothing."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Another value for a key of the recipe: --set source=DIR, --set args.max_steps=20. Can be repeated.",
    )
    parser.add_argument(
        "--shape-search",
        metavar="N",
        help="Compare N shapes for each anchor given by its size, and build the one that loses least untrained; the "
        "same as --set shape_search=N. A dry run lists the shapes.",
    )
    parser.add_argument("--list-recipes", action="store_true", help="List the recipes that come with cbd-trl.")
    arguments, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.error(f"build has no {next((flag for flag in unknown if flag.startswith('-')), unknown[0])}")
    from cbd_trl.recipe.schema import shipped_recipes

    if arguments.list_recipes:
        recipes = shipped_recipes()
        print("\n".join(f"{name:<{max(map(len, recipes)) + 2}}{what}" for name, what in recipes.items()))
    elif arguments.recipe is None:
        parser.error(f"A recipe is missing: name a file, or one of {', '.join(shipped_recipes())}")
    else:
        searched = [] if arguments.shape_search is None else [f"shape_search={arguments.shape_search}"]
        _run(arguments.recipe, [*arguments.set, *searched], arguments.dry_run)


def _run(name: str, changes: list[str], dry_run: bool) -> None:
    from accelerate import PartialState

    from cbd_trl.recipe.check import (
        check_recipe,
        how_estimated,
        how_it_fits,
        how_models_are_used,
        memory_table,
        recipe_table,
        shapes_table,
    )
    from cbd_trl.recipe.run import build_checked
    from cbd_trl.recipe.schema import RecipeError, read_recipe
    from cbd_trl.utils.progress import make_console

    recipe = read_recipe(name, changes)
    check = check_recipe(recipe)
    is_main = PartialState().is_main_process
    if check.costs and is_main:
        console = make_console()
        console.print(recipe_table(check))
        if models := how_models_are_used(check):
            print(models)
        # It takes seconds: of a recipe that is to be corrected first it would be counted in vain.
        if dry_run and not check.problems:
            if (shapes := shapes_table(check)) is not None:
                console.print(shapes)
            console.print(memory_table(check))
            print(how_it_fits(check))
        print(how_estimated(check))
    if dry_run and is_main:
        print("Nothing was built or written: this is a dry run.")
    if check.problems:
        raise RecipeError(recipe.name, check.problems, recipe.lines)
    if dry_run:
        return
    chain = build_checked(check)
    if is_main:
        _print_chain(chain, recipe.output_dir)


def _print_chain(chain: Any, folder: str) -> None:
    for anchor in chain.anchors:
        print(f"{anchor.name}: {anchor.num_parameters:,} parameters, {anchor.shape}")
    print(f"The chain is in {folder}. A size from it: cbd-trl init {folder} --num-parameters N --output DIR")
