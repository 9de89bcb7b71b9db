"""The recipes that the package ships, by name."""

from importlib.resources import files
from pathlib import Path

from cbd_trl.utils.formatting import did_you_mean


def shipped_recipes() -> dict[str, str]:
    """The recipes that the package ships.

    Returns:
        name -> the first line of the file, which says what it builds.
    """
    found = sorted(_folder().glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for file in found}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe.

    Args:
        recipe: a file, or the name of a recipe that the package ships.

    Raises:
        ValueError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    names = shipped_recipes()
    if str(recipe) in names:
        return _folder() / f"{recipe}.yaml"
    raise ValueError(
        f"There is no recipe {str(recipe)!r}: no such file, and none of the recipes that come with cbd-trl "
        f"({', '.join(names)}).{did_you_mean(recipe, names)}"
    )


def _folder() -> Path:
    return Path(str(files("cbd_trl").joinpath("recipe", "shipped")))
