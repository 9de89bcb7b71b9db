"""Store an anchor: its statistics, its folder and its entry in chain.json; the end of every way to make one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.chain import STATISTICS_FILE, Anchor, Chain, write_anchor
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.statistics_file import save_statistics
from cbd_trl.utils.files import writing
from cbd_trl.utils.progress import Progress

# Blocks of calibration text in one forward pass.
CALIBRATION_BATCH = 4


def calibration_batches(
    blocks: torch.Tensor, description: str = "Collecting statistics"
) -> Iterable[dict[str, torch.Tensor]]:
    """Blocks of tokens (N, T) as model inputs, with a progress bar."""
    return Progress(description, [{"input_ids": batch} for batch in blocks.split(CALIBRATION_BATCH)])


def store_anchor(
    output_dir: Path,
    record: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    statistics: Statistics,
) -> Anchor:
    """Write an anchor's folder and its entry in chain.json, once among all processes; see `write_anchor`.

    Raises:
        ValueError: a weight is not finite.
        OSError: the disk is full, or the folder cannot be written to.
    """
    _check_finite(record["name"], model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_statistics(statistics, folder / STATISTICS_FILE)

    state = PartialState()
    if state.is_main_process:
        with writing(output_dir / record["name"], "The anchors above it are whole, and checkpoints stand."):
            write_anchor(output_dir, record, fill)
    state.wait_for_everyone()
    return next(
        anchor for anchor in Chain.from_pretrained(output_dir, verify=False).anchors if anchor.name == record["name"]
    )


def finished_chain(output_dir: Path) -> Chain:
    """Open a finished chain and write its cards."""
    chain, state = Chain.from_pretrained(output_dir), PartialState()
    if state.is_main_process:
        save_cards(chain)
    state.wait_for_everyone()
    return chain


def _check_finite(name: str, model: PreTrainedModel) -> None:
    """Check the weights once here, not in each target made from the anchor, which may not read them all."""
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(
                f"The anchor {name} has a weight that is not finite ({key}), and so would every model made from it. "
                "It was not written; the anchors above it are kept. If it was trained here, its loss became NaN: "
                "train it with a lower learning_rate or a lower max_grad_norm. Otherwise the model it was loaded from "
                "is damaged."
            )
