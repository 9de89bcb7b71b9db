"""The largest anchor of a chain, the source anchor: the source itself, or a model bridged from it, sorted."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, architecture_of
from cbd_trl.build.arguments import loading_options
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.build.store import Changed, calibration_batches, store_anchor
from cbd_trl.build.training import Trained
from cbd_trl.cards.origin import hub_datasets
from cbd_trl.chain.cards import DATASETS, ORIGINS
from cbd_trl.chain.chain import Anchor
from cbd_trl.chain.source import Source
from cbd_trl.surgery.reorder import (
    WIDTH,
    can_rotate,
    importance,
    importance_order,
    sort_weights,
    to_principal_axes,
)
from cbd_trl.surgery.statistics import Change, collect_statistics
from cbd_trl.surgery.weights import Weights, weights_of
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.formatting import anchor_name, format_count
from cbd_trl.utils.modeling import check_at_hand
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tokenizers import check_rows

# Key in the source anchor's metadata: arguments that decide it and belong to no training.
MADE_WITH = "source_options"


@dataclass(frozen=True)
class SourceAnchor:
    """The largest anchor, planned: everything needed to make it.

    Args:
        architecture: its shape.
        tokenizer: of the whole chain.
        special: special tokens and chat template that trainings of the chain set.
        args: training arguments; without training, they name columns and the device.
        dataset: text to train and calibrate on.
        record: metadata for chain.json: where it comes from.
        sources: the models that it is made from.
        description: printed while it is made.
        make: makes the model, not sorted yet; called with the label of the progress line.
    """

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    args: DistillConfig
    dataset: Any
    record: dict[str, Any]
    sources: Sequence[Source]
    description: str
    make: Callable[[str], Trained]

    @property
    def name(self) -> str:
        """Name of the anchor, such as `135M`."""
        return anchor_name(self.architecture.num_parameters)


def plan_source_anchor(
    origin: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DistillConfig,
    dataset: Any,
    special: SpecialTokens,
) -> SourceAnchor:
    """Plan a source anchor that is the source itself.

    Args:
        origin: the source.
        tokenizer: the one passed for it, if any.
        args: of the chain; its `model_init_kwargs` load the source.
        dataset: of the chain.
        special: special tokens that trainings of the chain set.

    Raises:
        ValueError: the source cannot be cut, has no tokenizer, another tokenizer, or one without the tokens set.
    """
    architecture = origin.architecture()
    tokenizer = origin.tokenizer_or(tokenizer)
    check_rows(origin.role, architecture.sizes["vocab"], tokenizer, "processing_class")
    return SourceAnchor(
        architecture=architecture,
        tokenizer=special.tokenizer(tokenizer),
        special=special,
        args=args,
        dataset=dataset,
        record=source_record(origin, args, special),
        sources=[origin],
        description=f"sorting the source ({format_count(architecture.num_parameters)} parameters)",
        make=lambda label: Trained(origin.model(args.model_init_kwargs)),
    )


def source_record(origin: Source, args: DistillConfig, special: SpecialTokens) -> dict[str, Any]:
    """Metadata that identifies the source of a chain, for chain.json.

    Args:
        origin: the source.
        args: of the chain.
        special: special tokens that trainings of the chain set.
    """
    made = {"model_init_kwargs": loading_options(args.model_init_kwargs), **special.record()}
    return {**origin.record(), MADE_WITH: made}


def store_source_anchor(output_dir: Path, source_anchor: SourceAnchor, made: Trained, text: TokenBlocks) -> Anchor:
    """Sort the model, rotate its residual stream onto its principal axes where that is exact, and write the anchor.

    Args:
        output_dir: the chain's folder.
        source_anchor: its plan.
        made: the model that `source_anchor.make` returned, on the device to calibrate on.
        text: calibration text.

    Raises:
        ValueError: its weights are offloaded, or its head is not tied as the plan has it.
    """
    model: PreTrainedModel = made.model
    check_at_hand(model, "source")
    architecture = architecture_of(model)
    if architecture.tied != source_anchor.architecture.tied:
        # The plan used the config of a model on the Hub whose tensors could not be inspected before.
        raise ValueError(
            f"tie_word_embeddings is {source_anchor.architecture.tied} in the config of the {type(model).__name__}, "
            f"but {architecture.tied} by its weights, which are downloaded now: run the same again."
        )
    blocks = text.input_ids
    in_order, change = _sorted(model, architecture, blocks)
    record = {
        "name": source_anchor.name,
        "parent": None,
        "text_start": list(text.start),
        "tokens_seen": made.tokens_seen,
        "losses": made.losses,
        "training": {
            **source_anchor.record,
            ORIGINS: [source.origin().record() for source in source_anchor.sources],
            **({DATASETS: hub_datasets(source_anchor.dataset)} if made.tokens_seen else {}),
        },
    }
    # The model may be the caller's.
    like = SimpleNamespace(
        config=copy.deepcopy(architecture.config), generation_config=copy.deepcopy(model.generation_config)
    )
    source_anchor.special.follow(like, source_anchor.tokenizer)
    changed = Changed(in_order, change, like)
    return store_anchor(output_dir, record, model, source_anchor.tokenizer, blocks, changed)


def _sorted(model: PreTrainedModel, architecture: Architecture, blocks: torch.Tensor) -> tuple[Weights, Change]:
    """Sort the model's weights by importance, on principal axes where that is exact; none is made before it is read.

    Returns:
        The weights and the change of what their readers read.
    """
    weights = weights_of(model, architecture)
    rotated = can_rotate(weights, architecture)
    streams = {site.name: "stream" for site in architecture.sites if rotated and site.axis == WIDTH}
    batches = Progress("Measuring the coordinates", calibration_batches(blocks))
    statistics = collect_statistics(model, architecture, batches, seconds=streams)
    scores = importance(weights, architecture, statistics)
    in_order, sort = sort_weights(weights, architecture, scores)
    if not rotated:
        return in_order, sort
    order = importance_order(scores).width
    second = statistics.second("stream")[order][:, order]
    on_axes, turn = to_principal_axes(in_order, architecture, second)
    return on_axes, lambda name, rows: turn(name, sort(name, rows))
