"""Store an anchor: its statistics, its folder and its entry in chain.json; the end of every way to make one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import architecture_of, describe
from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.chain import STATISTICS_FILE, Anchor, Chain, write_anchor
from cbd_trl.chain.model import save_stock_model
from cbd_trl.surgery.statistics import Change, collect_in_groups
from cbd_trl.surgery.statistics_file import save_statistics
from cbd_trl.surgery.weights import Weights, to_state, weights_of
from cbd_trl.utils.files import writing

# Blocks of calibration text in one forward pass.
CALIBRATION_BATCH = 4


@dataclass(frozen=True)
class Changed:
    """A model in other coordinates, of which no tensor is made before it is written.

    Args:
        weights: of it.
        change: of what its readers read; None for the coordinates of the model that it is made from.
        like: has its `config` and `generation_config`.
    """

    weights: Weights
    change: Change | None
    like: Any


def calibration_batches(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Split blocks of tokens (N, T) into model inputs."""
    return [{"input_ids": batch} for batch in blocks.split(CALIBRATION_BATCH)]


def store_anchor(
    output_dir: Path,
    record: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: torch.Tensor,
    changed: Changed | None = None,
) -> Anchor:
    """Collect an anchor's statistics where its model is, and write its folder and its entry in chain.json, once among
    all processes; see `write_anchor`. In memory are the model, and of its statistics what `collect_in_groups` says.

    Args:
        output_dir: the chain's folder.
        record: as `write_anchor` takes it.
        model: it is not changed.
        tokenizer: of the chain.
        blocks: (N, T) tokens of calibration text.
        changed: what to write instead of the model's own weights.

    Raises:
        ValueError: a weight is not finite.
        OSError: the disk is full, or the folder cannot be written to.
    """
    architecture = architecture_of(model)
    check_finite(record["name"], model)
    if changed is None:
        changed = Changed(weights_of(model, architecture), None, model)

    def fill(folder: Path) -> None:
        parts = collect_in_groups(model, architecture, calibration_batches(blocks), changed.change)
        save_statistics(parts, architecture, folder / STATISTICS_FILE)
        save_stock_model(
            folder,
            describe(changed.like.config),
            to_state(changed.weights, architecture),
            model.dtype,
            changed.like.generation_config,
        )
        tokenizer.save_pretrained(folder)

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


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Check the weights once, not in each target made from the anchor, which may not read them all.

    Args:
        name: of the anchor.
        model: that it is, or is made from.

    Raises:
        ValueError: a weight is not finite.
    """
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(
                f"The anchor {name} has a weight that is not finite ({key}), and so would every model made from it. "
                "It was not written; the anchors above it are kept. If it was trained here, its loss became NaN: "
                "train it with a lower learning_rate or a lower max_grad_norm. Otherwise the model it was loaded from "
                "is damaged."
            )
