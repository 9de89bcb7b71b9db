"""Prepare the student of a step: choose its layers, cut it from the anchor above, refit it, and pick its hybrid."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.build.plan import Step
from cbd_trl.build.store import CALIBRATION_BATCH
from cbd_trl.build.width_hybrid import WidthHybrid, targets_between, weights_of_teacher
from cbd_trl.chain.chain import Anchor
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.block_search import BlockSearch
from cbd_trl.surgery.blocks import Block, block_costs, select_layers
from cbd_trl.surgery.least_squares import least_squares_cut
from cbd_trl.surgery.norms import balance_norms
from cbd_trl.surgery.refit import refit_layers
from cbd_trl.targets.operators import Pair
from cbd_trl.utils.files import write_text

# Tokens to compare blocks on; refitting the chosen ones uses all calibration tokens.
FIT_TOKENS = 2048
# Which shapes a hybrid in width has: `targets_between` or, for comparison, `many_targets_between`.
HYBRID_SHAPES = targets_between


def block_search(teacher: PreTrainedModel, tokens: torch.Tensor) -> BlockSearch:
    """Prepare the choice of blocks.

    Args:
        teacher: the anchor above.
        tokens: (N, T) calibration text. Its last row is for measuring, the first ones for refitting.
    """
    rows = tokens.to(teacher.device)
    fit = (rows[:-1] if len(rows) > 1 else rows)[: -(-FIT_TOKENS // rows.shape[1])].split(CALIBRATION_BATCH)
    inputs = [{"input_ids": batch} for batch in fit]
    return BlockSearch(teacher, describe(teacher.config), inputs, {"input_ids": rows[-1:]})


def choose_blocks(
    file: Path, teacher: PreTrainedModel, step: Step, tokens: torch.Tensor, search: BlockSearch | None = None
) -> list[Block]:
    """Choose the blocks of a step once, the same in every process; read them from the file if an earlier run chose.

    Args:
        file: where they are kept, as JSON.
        teacher: the anchor above.
        tokens: (N, T) calibration text, as of `block_search`.
        search: of that teacher and text, which knows what it measured for other depths; None for a new one.
    """
    state = PartialState()
    if state.is_main_process and not file.exists():
        blocks = (search or block_search(teacher, tokens)).cheapest(step.architecture.depth)
        write_text(file, json.dumps([asdict(block) for block in blocks]))
    found = [json.loads(file.read_text()) if state.is_main_process else None]
    broadcast_object_list(found)
    return [Block(tuple(block["layers"]), block["kept"], block["cost"]) for block in found[0] or []]


def initial_student(upper: Anchor, step: Step, blocks: list[Block]) -> PreTrainedModel:
    """Cut the upper anchor to the step's shape: least squares in width, the kept layers in depth, norms balanced."""
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


def width_hybrid(
    upper: Anchor,
    teacher: PreTrainedModel,
    step: Step,
    student: PreTrainedModel,
    blocks: list[Block],
    power: float | None,
) -> WidthHybrid | None:
    """Make the hybrid for a student narrower than the anchor above, whose model teaches it.

    Args:
        upper: the anchor above.
        teacher: its model.
        step: to the student.
        student: as it starts.
        blocks: that its layers stand for.
        power: `Pair.alpha_power` of the two.

    Returns:
        None without hybrid steps, or where only depth differs: the trainer makes those hybrids itself.
    """
    architecture, above = describe(student.config), upper.architecture()
    if not step.args.swap_probability or architecture.sizes == above.sizes:
        return None
    pair = Pair(
        weights_of_teacher(teacher, above, stored=upper.load_weights()),
        above,
        {},
        architecture,
        upper.load_statistics(),
        [block.layers for block in blocks],
        [block.kept for block in blocks],
        block_costs(blocks),
        power,
    )
    shapes = HYBRID_SHAPES(above, architecture, pair.blocks)
    return WidthHybrid(pair, step.args.swap_probability, step.args.seed, shapes)
