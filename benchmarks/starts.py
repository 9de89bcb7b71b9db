"""The starts that are compared: models of one shape, made in every way there is."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTTrainer

from cbd_trl import Chain, DistillConfig, DistillTrainer, from_chain
from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import axis_length
from cbd_trl.build.plan import plan_chain
from cbd_trl.build.student import choose_blocks, initial_student, refit_student
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.model import build_model
from cbd_trl.report.sweep import random_model
from cbd_trl.surgery.blocks import select_layers
from cbd_trl.surgery.least_squares import plain_cut
from cbd_trl.surgery.weights import Weights, reader_keys
from cbd_trl.trainers.checkpointing import last_checkpoint

TARGET = {
    "num_hidden_layers": 16,
    "hidden_size": 432,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1152,
}
OPERATORS = ("nested", "slice", "expand", "linear")
SUBCLONE, DIRECT, SCRATCH = "subclone", "direct", "scratch"
STARTS = (*OPERATORS, SUBCLONE, DIRECT, SCRATCH)


def outer_layers(total: int, kept: int) -> list[int]:
    """The first and the last layers of `total`, half of `kept` each: those in the middle are dropped.

    Weight subcloning, arXiv 2312.09299: the blocks in the middle change the stream least. One more of the first where
    `kept` is odd.

    Raises:
        ValueError: more are to be kept than there are.
    """
    if kept > total:
        raise ValueError(
            f"Cannot keep {kept} of {total} layers. The benchmark's target is cut from the source, so its shape needs "
            "at most as many layers."
        )
    first = (kept + 1) // 2
    return [*range(first), *range(total - kept + first, total)]


def subclone(weights: Weights, architecture: Architecture, fields: dict[str, int]) -> tuple[Weights, Architecture]:
    """Weight subcloning (Samragh et al. 2023, arXiv 2312.09299) of a sorted model.

    The most important channels, neurons and heads are kept as they are; a layer that reads d of the D inputs it had is
    multiplied by sqrt(D / d), which keeps the spread of its outputs; layers in the middle are dropped.

    Deviations: important is what the chain sorts by, root mean square activation times the size of what reads it (the
    paper: mean absolute activation). A tied table counts as the layer it is at the head, so it is multiplied too.

    Args:
        weights: of the model, most important coordinates first.
        architecture: what they mean.
        fields: config fields of the target, no deeper and no wider.

    Returns:
        Weights and architecture of the target.
    """
    depth, sizes = architecture.resolve_sizes(fields)
    picked, shallow = select_layers(weights, architecture, outer_layers(architecture.depth, depth))
    target = shallow.resized(**sizes)
    cut = dict(plain_cut(picked, shallow, target))
    for site in target.sites:
        scale = math.sqrt(axis_length(site.axis, shallow.sizes) / axis_length(site.axis, target.sizes))
        for reader in site.readers:
            key, _ = reader_keys(reader, cut, target)
            cut[key] = cut[key] * scale
    return cut, target


def make_start(name: str, chain: Chain, seed: int) -> PreTrainedModel:
    """An untrained start in the target's shape (that of direct distillation: `own_trainer`).

    Args:
        name: an operator, "subclone" or "scratch".
        chain: a built chain, its source sorted.
        seed: of the random initialization.
    """
    if name in OPERATORS:
        return from_chain(chain, config=TARGET, operator=name)
    if name == SCRATCH:
        # Any start's config but that of `expand`, which has another epsilon, is that of a plain model.
        return random_model(from_chain(chain, config=TARGET, operator="slice"), seed)
    weights, target = subclone(chain.source.load_weights(), chain.source.architecture(), TARGET)
    return build_model(target, weights, getattr(torch, chain.source.dtype))


class WholeHead(SFTTrainer):
    """SFT with all logits at once, as the stock Trainer has them: the same loss in half the time of a small batch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)


def sft_trainer(
    model: PreTrainedModel, args: DistillConfig, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> SFTTrainer:
    """Plain cross-entropy: `args` is read as the SFTConfig that it is."""
    return WholeHead(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def own_trainer(
    upper: Anchor,
    fields: Mapping[str, int],
    args: DistillConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    calibration: torch.Tensor,
) -> DistillTrainer:
    """One-shot distillation: a model cut from an anchor and refitted to it, as build_chain starts the next anchor, and
    trained by the loss with which build_chain trains that, without hybrids.

    Args:
        upper: the anchor, its coordinates sorted; the teacher.
        fields: config fields of the model.
        args: training arguments; the chain's defaults are filled in. The blocks that were chosen, and checkpoints, are
            kept in its `output_dir`.
        dataset: training text.
        tokenizer: of the chain.
        calibration: (N, T) int64 token blocks of the training text for the refit.
    """
    [step] = plan_chain(upper.architecture(), [fields], args, dataset)
    work, teacher = Path(args.output_dir), upper.load_model()
    blocks = choose_blocks(work / "blocks.json", teacher.to(args.device), step, calibration)
    student: Any = initial_student(upper, step, blocks).to(args.device)
    if last_checkpoint(work) is None:
        refit_student(student, teacher, blocks, calibration)
    block_map = [list(block.layers) for block in blocks]
    return DistillTrainer(
        student, teacher, step.args, train_dataset=dataset, processing_class=tokenizer, block_map=block_map
    )
