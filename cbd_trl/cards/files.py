"""Cards on disk: written whole, rewritten with what they describe, and left alone once somebody edited them."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers.utils import logging

from cbd_trl.cards.card import PICTURE, is_untouched
from cbd_trl.chain.cards import anchor_card
from cbd_trl.chain.chain_part import MEASURED, chain_card
from cbd_trl.chain.history import AnyChain
from cbd_trl.utils.results import write_text

logger = logging.get_logger(__name__)

README = "README.md"
# Beside a model, and none of it: what these say may change and the model stays what it was.
CARD_FILES = (README, PICTURE)


def current_card(folder: Path, made: str) -> str:
    """The card of a folder.

    Args:
        folder: whose README.md is kept if somebody wrote or edited it.
        made: the card otherwise.
    """
    there = _read(folder / README)
    return made if there is None or is_untouched(there) else there


def save_card(folder: Path, made: str) -> None:
    """Write a card into a folder, unless one that somebody edited is there or nothing has changed.

    Args:
        folder: gets README.md.
        made: the card.

    Raises:
        OSError: it cannot be written.
    """
    if _read(folder / README) != current_card(folder, made):
        write_text(folder / README, made)


def save_cards(chain: AnyChain, report: Mapping[str, Any] | None = None) -> None:
    """Write the cards of a chain in a folder and of its anchors there. A chain is whole without them: where they
    cannot be written there is a warning.

    Args:
        chain: the chain.
        report: what was measured of it (`cbd_trl.report.sweep.sweep`): kept beside the chain as a picture and as
            JSON; None leaves there what an earlier call left.
    """
    try:
        if report is not None:
            _save_measurements(chain.path, report)
        for anchor in (anchor for anchor in chain.anchors if anchor.repo is None):
            copy_picture(chain, anchor.path)
            save_card(anchor.path, anchor_card(chain, anchor))
        save_card(chain.path, chain_card(chain))
    except OSError as error:
        logger.warning(
            f"The cards of the chain in {chain.path} were not written ({error}); the chain itself is whole."
        )


def copy_picture(chain: AnyChain, folder: Path) -> None:
    """Put the picture of a chain, if there is one, beside a card of what was made from it."""
    picture = chain.path / PICTURE
    if chain.revision is not None and not picture.is_file():
        # Into the folder of this commit in the Hub's cache; a model is whole without it, whatever goes wrong.
        with suppress(Exception):
            hf_hub_download(chain.name_or_path, PICTURE, revision=chain.revision)
    if picture.is_file():
        shutil.copyfile(picture, folder / PICTURE)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _save_measurements(folder: Path, report: Mapping[str, Any]) -> None:
    # Drawing takes a library that nothing else here needs.
    from cbd_trl.report.plots import plot_sweep

    # It goes to the Hub with the chain, where nobody is to read what the folders here are called.
    kept = {key: value for key, value in report.items() if key != "path" or report.get("revision") is not None}
    if "name" in kept:
        kept["name"] = Path(kept["name"]).name
    write_text(folder / MEASURED, json.dumps(kept, indent=1) + "\n")
    plot_sweep(report, folder / PICTURE, formats=("png",))
