"""Lower anchors that are models which exist already, such as the smaller checkpoint of a public family.

Where its weights can be matched with the anchor above, the model itself becomes the anchor: put into the coordinates
of the anchor above, which changes no logit, and then distilled beside hybrids, so that the sizes between the two work.
Where they cannot, the anchor is cut from the one above as others are, and the model is its second teacher.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, describe
from cbd_trl.build.compatibility import (
    CommonForm,
    blocks_by_type,
    check_smaller,
    check_tokenizer,
    function_difference,
    same_type,
    shape_difference,
    special_tokens,
)
from cbd_trl.build.store import calibration_batches, check_finite
from cbd_trl.build.width_hybrid import targets_between
from cbd_trl.chain.anchor import Anchor
from cbd_trl.chain.folders import ONE_TOKENIZER
from cbd_trl.chain.manifest import OBSTACLE
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.align import (
    collect_cross_moments,
    layer_similarity,
    match_models,
    measured_model,
    order_below,
    stream_axes,
)
from cbd_trl.surgery.blocks import Block, similar_blocks, swap_blocks
from cbd_trl.surgery.reorder import Order, can_rotate, permute, rotate
from cbd_trl.surgery.weights import Weights, weights_of
from cbd_trl.targets.operators import NESTED_ALPHA_POWER, Pair, Plan, cut_upper, mixer
from cbd_trl.utils.files import TEMPORARY
from cbd_trl.utils.modeling import in_eval_mode, portable_attention
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import save_tensors

# In an anchor's work folder: where the model went among the coordinates of the anchor above.
PLACEMENT = "placement.safetensors"
# Tokens whose streams are compared to pair layers: the memory is their square for every layer.
PAIRING_TOKENS = 1024
# Rows of calibration text that the costs of blocks are measured on.
COST_ROWS = 2
# Of the way down, that the weight of a model is which was trained apart; the last one is that of a cut.
ALPHA_POWERS = (0.0, 0.1, 0.2, 0.35, 0.5, NESTED_ALPHA_POWER)
# Rows that it is measured on, and what another power than 0 has to gain before training, nats per token: between two
# seeds 0.03 before became a loss of 0.02 after it, between siblings 0.1 stayed (docs/results/trained_apart.md).
POWER_ROWS = 8
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class PublicModel:
    """A model that exists already, planned as a lower anchor or as its second teacher.

    Args:
        source: the model; of one on the Hub with its commit.
        requested_revision: the branch or tag that led to that commit, as it was requested.
        form: the chain's vocabulary rows and head.
        architecture: of the model in that form.
        obstacle: why its weights cannot be matched with the anchor above; None where they can.
    """

    source: Source
    requested_revision: str | None
    form: CommonForm
    architecture: Architecture
    obstacle: str | None

    @property
    def matched(self) -> bool:
        """Whether the model itself becomes the anchor."""
        return self.obstacle is None

    @property
    def summary(self) -> str:
        """Explain what it is used for."""
        if self.obstacle is None:
            return (
                f"{self.source.label} becomes this anchor, in the coordinates of the one above, and teaches it, too."
            )
        return (
            f"{self.source.label} teaches this anchor beside the one above, from which it is cut: its own weights "
            f"cannot be matched. {self.obstacle}"
        )

    def record(self) -> dict[str, Any]:
        """Describe it for chain.json."""
        known = self.source.record()
        return {
            "model": known["source"],
            "weights_sha256": known["weights_sha256"],
            "revision": self.source.revision,
            "requested_revision": self.requested_revision,
            OBSTACLE: self.obstacle,
        }

    def teacher(self, dtype: torch.dtype) -> PreTrainedModel:
        """Load the model as it is, to teach; one in memory stays the caller's."""
        model = self.source.model({"dtype": dtype})
        return copy.deepcopy(model) if isinstance(self.source.place, PreTrainedModel) else model


def plan_public_model(
    source: Source,
    requested_revision: str | None,
    upper: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, str],
) -> PublicModel:
    """Check a model that is requested as an anchor, and find out whether its weights can be matched.

    Args:
        source: the model; of one on the Hub with its commit.
        requested_revision: the branch or tag that led to that commit.
        upper: architecture of the anchor above.
        tokenizer: the chain's.
        names: of the anchor above and of the model, in messages.

    Raises:
        ValueError: it is quantized, no smaller than the anchor above, or reads other tokens.
    """
    config = source.config()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{names[1]} is quantized, and an anchor is trained and mixed in its weights. Give the model that was not "
            "quantized."
        )
    own = source.architecture()
    check_smaller(names, upper, own)
    check_tokenizer(names[1], source, tokenizer)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if own.sizes["vocab"] < tokens:
        raise ValueError(
            f"{names[1]} has {own.sizes['vocab']} vocabulary rows, and the chain's tokenizer {tokens} tokens. "
            f"{ONE_TOKENIZER}"
        )
    form = CommonForm(upper.sizes["vocab"], upper.tied)
    obstacle = _obstacle(names, upper, own)
    architecture = form.architecture(own) if obstacle is None else own
    return PublicModel(source, requested_revision, form, architecture, obstacle)


def _obstacle(names: tuple[str, str], upper: Architecture, lower: Architecture) -> str | None:
    """Explain why the weights of a model cannot be matched with the anchor above; None where they can."""
    if lower.config.model_type != upper.config.model_type:
        return f"{names[1]} is of the model type {lower.config.model_type}, {names[0]} of {upper.config.model_type}."
    if upper.family.experts is not None:
        return f"Which expert of {names[1]} is which of {names[0]} is not known."
    if upper.tied and not lower.tied:
        return f"{names[1]} has an output head of its own, and {names[0]} has none."
    if lower.sizes["vocab"] < upper.sizes["vocab"]:
        return f"{names[1]} has {lower.sizes['vocab']} vocabulary rows, {names[0]} {upper.sizes['vocab']}."
    if max(special_tokens(lower.config), default=0) >= upper.sizes["vocab"]:
        return f"{names[1]} has a special token among the vocabulary rows that {names[0]} lacks."
    lower = CommonForm(upper.sizes["vocab"], upper.tied).architecture(lower)
    return shape_difference(names, upper, lower) or function_difference(names, upper, lower)


@dataclass(frozen=True)
class Placement:
    """Where a model goes among the coordinates of the anchor above.

    Args:
        blocks: of the anchor above, that its layers stand for.
        axes: by which its stream is rotated before (see `rotate`); None where it is not.
        order: its new coordinates.
        quality: of the match, {kind: {"matched", "random"}} (see `Quality`).
        alpha_power: `Pair.alpha_power` of the two, as measured; None where only depth differs.
    """

    blocks: Sequence[Block]
    axes: Tensor | None
    order: Order
    quality: Mapping[str, Mapping[str, float]]
    alpha_power: float | None = None

    def placed(self, weights: Weights, architecture: Architecture) -> Weights:
        """Move a model's weights there; the logits stay equal."""
        if self.axes is not None:
            weights = rotate(weights, architecture, self.axes)
        return permute(weights, architecture, self.order)

    def save(self, file: Path) -> None:
        """Save it."""
        tensors = {name: tensor for name, tensor in vars(self.order).items() if tensor is not None}
        if self.axes is not None:
            tensors["axes"] = self.axes
        metadata = {
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "quality": self.quality,
            "alpha_power": self.alpha_power,
        }
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # Whole or not there: an interrupted run takes it as it is.
        unfinished = file.with_name(f"{TEMPORARY}{file.name}")
        save_tensors(contiguous, unfinished, {name: json.dumps(value) for name, value in metadata.items()})
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Placement":
        """Load one that was saved."""
        with safe_open(file, "pt") as stored:
            metadata = {name: json.loads(value) for name, value in stored.metadata().items() if name != "format"}
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (safe_open is no mapping)
        axes = found.pop("axes", None)
        blocks = [Block(tuple(block["layers"]), block["kept"], block["cost"]) for block in metadata["blocks"]]
        return cls(blocks, axes, Order(**found), metadata["quality"], metadata["alpha_power"])


def adopt(
    file: Path, upper: Anchor, teacher: PreTrainedModel, public: PublicModel, tokens: Tensor
) -> tuple[PreTrainedModel, Placement]:
    """Load a model in the coordinates of the anchor above; its logits are its own.

    Args:
        file: where its place among them is kept (see `find_placement`).
        upper: the anchor above.
        teacher: its model.
        public: the model, whose weights can be matched.
        tokens: (N, T) calibration text.

    Returns:
        the model, on the teacher's device, and its place.
    """
    # Moved in float32, and rounded once.
    model: Any = public.form.load(public.source, torch.float32)
    check_finite(public.source.label, model)
    placement = find_placement(file, upper, teacher, model.to(teacher.device), tokens)
    weights = placement.placed(weights_of(model.cpu(), public.architecture), public.architecture)
    placed: Any = build_model(public.architecture, weights, teacher.dtype)
    return placed.to(teacher.device), placement


def find_placement(
    file: Path, upper: Anchor, teacher: PreTrainedModel, model: PreTrainedModel, tokens: Tensor
) -> Placement:
    """Pair and match a model with the anchor above, once among all processes and runs.

    Args:
        file: where the result is kept.
        upper: the anchor above.
        teacher: its model.
        model: the lower model, in the chain's form; on the same device.
        tokens: (N, T) calibration text.
    """
    state = PartialState()
    if state.is_main_process and not file.exists():
        _find_placement(upper, teacher, model, tokens).save(file)
    state.wait_for_everyone()
    return Placement.load(file)


def _find_placement(anchor: Anchor, teacher: Any, model: Any, tokens: Tensor) -> Placement:
    upper, lower = describe(teacher.config), describe(model.config)
    own = weights_of(model, lower)
    blocks = _paired_blocks(teacher, upper, model, lower, tokens)
    kept = [block.kept for block in blocks]
    batches = calibration_batches(tokens.to(teacher.device))

    def compared() -> dict[str, Tensor]:
        return collect_cross_moments(teacher, upper, model, lower, kept, Progress("Comparing streams", batches))

    cross, axes = compared(), None
    if can_rotate(own, lower):
        axes = stream_axes(cross, upper, lower, kept)
        turned: Any = build_model(lower, rotate(own, lower, axes), model.dtype)
        model = turned.to(teacher.device)
        cross = compared()
    above, below = measured_model(teacher, upper, batches), measured_model(model, lower, batches)
    match = match_models(above, below, cross, kept, prefix=True)
    placement = Placement(blocks, axes, order_below(match), match.record())
    if upper.sizes == lower.sizes and upper.depth > lower.depth:
        placed = placement.placed(own, lower)
        rows = tokens[-COST_ROWS:].to(teacher.device)
        costs = _block_costs(weights_of(teacher, upper), upper, placed, lower, blocks, rows, teacher.dtype)
        measured = [
            dataclasses.replace(block, cost=cost if math.isfinite(cost) else None)
            for block, cost in zip(blocks, costs, strict=True)
        ]
        placement = dataclasses.replace(placement, blocks=measured)
    elif upper.sizes != lower.sizes:
        layers = [block.layers for block in blocks]
        pair = Pair(above.weights, upper, placement.placed(own, lower), lower, anchor.load_statistics(), layers, kept)
        placement = dataclasses.replace(placement, alpha_power=measured_power(pair, tokens, model.dtype))
    return placement


@torch.no_grad()
def measured_power(pair: Pair, tokens: Tensor, dtype: torch.dtype) -> float:
    """Measure how much the lower of two models that were trained apart counts in what is between them: what makes the
    best target in the middle, untrained.

    The more two models have in common, the more of the upper one is worth having: of two seeds the lower one counts in
    full, of a sibling of SmolLM2-135M whose weights come from the same model, 0.8 in the middle
    (docs/results/trained_apart.md).

    Args:
        pair: the two, in the same coordinates; of unequal widths.
        tokens: (N, T) calibration text, whose last rows are measured.
        dtype: to run the target in.

    Returns:
        `Pair.alpha_power`, one of `ALPHA_POWERS`; 0, in full, where no other one gains `LEAST_GAIN`, or no shape lies
        between the two.
    """
    between = targets_between(pair.upper_architecture, pair.lower_architecture, pair.blocks)
    if not between:
        return 0.0
    rows, plan = tokens[-POWER_ROWS:].to(PartialState().device), Plan(between[len(between) // 2])
    lazy, architecture = cut_upper(pair, plan)
    cut = dict(lazy)

    def loss(power: float) -> float:
        # Without the balance of the norms that `nested` adds, which changes no logit.
        weights = mixer(dataclasses.replace(pair, alpha_power=power), plan)(cut, pair.lower)
        model: Any = build_model(architecture, weights, dtype)
        model.to(rows.device)
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in rows]
        return float(torch.stack(losses).mean())

    losses = {power: loss(power) for power in Progress("Measuring how much it counts", ALPHA_POWERS)}
    best = min(losses, key=losses.__getitem__)
    return best if losses[best] < losses[0.0] - LEAST_GAIN else 0.0


@torch.no_grad()
def _block_costs(
    upper: Weights,
    upper_architecture: Architecture,
    lower: Weights,
    lower_architecture: Architecture,
    blocks: Sequence[Block],
    rows: Tensor,
    dtype: torch.dtype,
) -> list[float]:
    """Measure for each layer what it costs, in nats per token, that it stands for its block: by how much the loss
    falls when the block takes its place; it may rise. Blocks that cost the most are swapped first."""
    layers, kept = [block.layers for block in blocks], [block.kept for block in blocks]

    def loss(swapped: list[int]) -> float:
        weights, architecture = swap_blocks(
            lower, lower_architecture, upper, upper_architecture, layers, swapped, kept
        )
        model: Any = build_model(architecture, weights, dtype)
        model.to(rows.device)
        return float(model(input_ids=rows, labels=rows, use_cache=False).loss)

    alone = loss([])
    return [alone - loss([i]) for i in Progress("Swapping blocks", range(len(blocks)))]


@torch.no_grad()
def _paired_blocks(teacher: Any, upper: Architecture, model: Any, lower: Architecture, tokens: Tensor) -> list[Block]:
    """Choose the blocks of the anchor above that the model's layers stand for, by what layers do."""
    if upper.depth == lower.depth:
        return [Block((layer,), layer) for layer in range(upper.depth)]
    few = tokens[: -(-PAIRING_TOKENS // tokens.shape[1])].to(teacher.device)
    streams, written = [], []
    for one in (teacher, model):
        with in_eval_mode(one), portable_attention(one):
            found = one(input_ids=few, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        rows = [stream.flatten(0, 1)[:PAIRING_TOKENS].float() for stream in found]
        # A few tokens of huge norm would decide alone.
        streams.append([torch.nn.functional.normalize(row, dim=-1) for row in rows[1:]])
        written.append([after - before for before, after in pairwise(rows)])
    # What the last layers write is not known behind the final norm, and they stand for each other.
    by_what_is_written = layer_similarity(*written).cpu()
    by_what_is_written[-1, -1] = 1.0
    blocks = similar_blocks(by_what_is_written, layer_similarity(*streams).cpu(), same_type(upper, lower))
    if upper.sizes != lower.sizes and blocks and not targets_between(upper, lower, [one.layers for one in blocks]):
        # Nothing would lie between the two.
        blocks = blocks_by_type(upper, lower)
    assert blocks is not None
    return blocks
