"""The error of a recipe that cannot be built: everything that is wrong with it."""

from collections.abc import Sequence


class RecipeError(ValueError):
    """A recipe cannot be built.

    Args:
        name: of the recipe.
        problems: each with its place in the file.
    """

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
        lines = [f"  - {problem}" for problem in problems]
        super().__init__("\n".join([f"The recipe {name} cannot be built, {count} to be put right:", *lines]))
