"""What a chain was built from, beside it: text and revision are no part of chain.json, and must not change midway."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cbd_trl.chain.manifest import MANIFEST
from cbd_trl.recipe.schema import DataPart, Recipe
from cbd_trl.utils.results import write_text

FILE = "recipe.json"


def remember(recipe: Recipe) -> None:
    """Write what the recipe says into the chain's folder.

    Args:
        recipe: about to be built.
    """
    folder = Path(recipe.output_dir)
    said = {**asdict(recipe), "compared": _compared(recipe)}
    for key in ("problems", "lines", "output_dir"):
        said.pop(key)
    text = json.dumps(said, indent=1, default=str) + "\n"
    if not (folder / FILE).exists() or (folder / FILE).read_text(encoding="utf-8") != text:
        write_text(folder / FILE, text)


def check_unchanged(recipe: Recipe) -> None:
    """Refuse another source or other text than the chain in the folder was begun with.

    `build_chain` compares shapes and arguments by itself.

    Args:
        recipe: about to be built.

    Raises:
        ValueError: naming what changed.
    """
    folder = Path(recipe.output_dir)
    if not (folder / FILE).exists():
        return
    try:
        there = json.loads((folder / FILE).read_text(encoding="utf-8"))["compared"]
        pairs = [(key, there[key], value) for key, value in _compared(recipe).items() if key in there]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / FILE} cannot be read ({error}), which says what the chain was begun with. If the recipe is "
            "still the same, delete that file."
        ) from error
    for key, was, now in pairs:
        if was != now:
            raise ValueError(
                f"{folder} was begun with another {key}: {was}, and {now} is asked for now. Choose another "
                f"output_dir, or delete that folder to build anew{_nothing_finished(folder)}."
            )


def _nothing_finished(folder: Path) -> str:
    return "" if (folder / MANIFEST).exists() else " (no anchor in it is finished)"


def _compared(recipe: Recipe) -> dict[str, Any]:
    """By what an error calls it; an anchor that is added at the end of a recipe changes nothing above it."""
    texts = {"data": recipe.data}
    if recipe.bridge is not None:
        texts["bridge.data"] = recipe.bridge.data or recipe.data
    for number, anchor in enumerate(recipe.anchors):
        texts[f"anchors[{number}].data"] = anchor.data or recipe.data
    return {
        "source": None if recipe.source is None else asdict(recipe.source),
        "calibration_tokens": recipe.calibration_tokens,
        **{key: [_told(part) for part in parts] for key, parts in texts.items()},
    }


def _told(part: DataPart) -> dict[str, Any]:
    return {key: value for key, value in asdict(part).items() if key != "where"}
