"""The error of a recipe that cannot be built: everything that is wrong with it."""

from collections.abc import Mapping, Sequence

from cbd_trl.recipe.lines import with_line


class RecipeError(ValueError):
    """A recipe cannot be built.

    Args:
        name: of the recipe.
        problems: each with its place in the file.
        lines: of the places.
    """

    def __init__(self, name: str, problems: Sequence[str], lines: Mapping[str, int] | None = None) -> None:
        self.problems = tuple(problems)
        count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
        told = [f"  - {with_line(problem, lines or {})}" for problem in problems]
        way_out = "Change the file, or one key for this run: --set KEY=VALUE, such as --set source=DIR."
        super().__init__("\n".join([f"The recipe {name} cannot be built, {count} to be put right:", *told, way_out]))
