"""What an anchor is before it is trained: layers chosen by measure, the least-squares cut, the refit; and what is
trained beside it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import describe
from cbd_trl.build.plan import Step
from cbd_trl.build.width_hybrid import WidthHybrid
from cbd_trl.chain.cards import save_cards
from cbd_trl.chain.chain import STATISTICS_FILE, Anchor, Chain, write_anchor
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.block_search import cheapest_blocks
from cbd_trl.surgery.blocks import Block, block_costs, select_layers
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import balance_norms
from cbd_trl.surgery.refit import refit_layers
from cbd_trl.surgery.statistics import Statistics
from cbd_trl.surgery.statistics_file import save_statistics
from cbd_trl.targets.pair import Pair
from cbd_trl.utils.files import write_text, writing
from cbd_trl.utils.progress import Progress

# To compare blocks; refitting what is chosen uses all there is.
_FIT_TOKENS = 2048


def choose_blocks(file: Path, teacher: PreTrainedModel, step: Step, tokens: torch.Tensor) -> list[Block]:
    """The blocks of a step, chosen once and the same in every process: read from the file if an earlier run chose.

    Args:
        file: where they are kept, as JSON.
        teacher: the anchor above.
        tokens: (N, T) calibration text. Its last row is for measuring, the first ones for refitting.
    """
    state = PartialState()
    if state.is_main_process and not file.exists():
        rows = tokens.to(teacher.device)
        fit = (rows[:-1] if len(rows) > 1 else rows)[: -(-_FIT_TOKENS // rows.shape[1])].split(CALIBRATION_BATCH)
        blocks = cheapest_blocks(
            teacher,
            describe(teacher.config),
            step.architecture.depth,
            [{"input_ids": batch} for batch in fit],
            {"input_ids": rows[-1:]},
        )
        write_text(file, json.dumps([asdict(block) for block in blocks]))
    found = [json.loads(file.read_text()) if state.is_main_process else None]
    broadcast_object_list(found)
    return [Block(tuple(block["layers"]), block["kept"], block["cost"]) for block in found[0] or []]


def initial_student(upper: Anchor, step: Step, blocks: list[Block]) -> PreTrainedModel:
    """The least-squares cut of the upper anchor over the kept layers, its norms balanced, not yet refitted."""
    weights, architecture = upper.load_weights(), upper.architecture()
    if step.architecture.sizes != architecture.sizes:
        narrow = architecture.resized(**step.architecture.sizes)
        cut = least_squares_cut(weights, architecture, upper.load_statistics(), narrow)
        weights = balance_norms(cut, narrow)
        architecture = narrow
    kept, shallow = select_layers(weights, architecture, [block.kept for block in blocks])
    return build_model(shallow, kept, getattr(torch, upper.dtype))


def refit_student(student: Any, teacher: PreTrainedModel, blocks: list[Block], tokens: torch.Tensor) -> None:
    """Fit the cut student to the teacher's stream, in place, on calibration tokens (N, T)."""
    batches = [{"input_ids": batch.to(student.device)} for batch in tokens.split(CALIBRATION_BATCH)]
    layers = [block.layers for block in blocks]
    refit_layers(student, teacher, describe(student.config), layers, batches)


def width_hybrid(upper: Anchor, step: Step, student: PreTrainedModel, blocks: list[Block]) -> WidthHybrid | None:
    """What hybrid steps train beside a student that is narrower than the anchor above; None where there are none, or
    where only depth differs: the trainer makes those itself."""
    architecture, above = describe(student.config), upper.architecture()
    if not step.args.swap_probability or architecture.sizes == above.sizes:
        return None
    pair = Pair(
        upper.load_weights(),
        above,
        {},
        architecture,
        upper.load_statistics(),
        [block.layers for block in blocks],
        [block.kept for block in blocks],
        block_costs(blocks),
    )
    return WidthHybrid(pair, step.args.swap_probability, step.args.seed)


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
    """The chain in a folder, with its cards beside it."""
    chain, state = Chain.from_pretrained(output_dir), PartialState()
    if state.is_main_process:
        save_cards(chain)
    state.wait_for_everyone()
    return chain


def _check_finite(name: str, model: PreTrainedModel) -> None:
    """Here, once, and not in each target made of the anchor, which may take no pass over its weights at all."""
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(
                f"The anchor {name} has a weight that is not finite ({key}), as all that is made of it would have. It "
                "was not written; the anchors above it stand. If it was trained here, its loss became NaN: train it "
                "with a lower learning_rate or a lower max_grad_norm. Otherwise the model that it was read from is "
                "damaged."
            )
