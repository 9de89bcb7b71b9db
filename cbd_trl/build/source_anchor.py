"""The anchor at the head of a chain: the source, or what was bridged from it, sorted."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import Architecture, architecture_of
from cbd_trl.build.arguments import loading_options
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.build.student import calibration_batches, store_anchor
from cbd_trl.build.training import Trained
from cbd_trl.cards.origin import hub_datasets
from cbd_trl.chain.cards import DATASETS, ORIGINS
from cbd_trl.chain.chain import Anchor
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.reorder import can_rotate, importance, sort_weights, to_principal_axes
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.formatting import anchor_name, format_count
from cbd_trl.utils.tokenizers import check_rows

# In the record of the first anchor: arguments that decide it, and that are those of no training.
MADE_WITH = "source_options"


@dataclass(frozen=True)
class Head:
    """The first anchor, as it is to be made.

    Args:
        architecture: its shape.
        tokenizer: its own, and that of the whole chain.
        special: what trainings changed of it.
        args: training arguments; where nothing is trained, for the names of columns and the device.
        dataset: text that it is trained and calibrated on.
        record: what it is made from, as chain.json has it.
        sources: the models that it is made from.
        doing: what is said while it is made.
        make: gives the model, in the coordinates it has; given what the line of its progress begins with.
    """

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    args: DistillConfig
    dataset: Any
    record: dict[str, Any]
    sources: Sequence[Source]
    doing: str
    make: Callable[[str], Trained]

    @property
    def name(self) -> str:
        """Of the anchor."""
        return anchor_name(self.architecture.num_parameters)


def source_head(
    origin: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DistillConfig,
    dataset: Any,
    special: SpecialTokens,
) -> Head:
    """The source as it is.

    Args:
        origin: the source.
        tokenizer: the one given for it.
        args: of the chain; its `model_init_kwargs` load the source.
        dataset: of the chain.
        special: what the trainings of the chain make of its tokenizer.

    Raises:
        ValueError: the source cannot be cut, or has no tokenizer, another one, or one without these tokens.
    """
    architecture = origin.architecture()
    tokenizer = origin.tokenizer_or(tokenizer)
    check_rows(origin.role, architecture.sizes["vocab"], tokenizer, "processing_class")
    return Head(
        architecture=architecture,
        tokenizer=special.tokenizer(tokenizer),
        special=special,
        args=args,
        dataset=dataset,
        record=head_record(origin, args, special),
        sources=[origin],
        doing=f"sorting the source ({format_count(architecture.num_parameters)} parameters)",
        make=lambda label: Trained(origin.model(args.model_init_kwargs)),
    )


def head_record(origin: Source, args: DistillConfig, special: SpecialTokens) -> dict[str, Any]:
    """What tells a chain's beginning from another, as chain.json has it.

    Args:
        origin: the source.
        args: of the chain.
        special: what the trainings of the chain make of its tokenizer.
    """
    made = {"model_init_kwargs": loading_options(args.model_init_kwargs), **special.record()}
    return {**origin.record(), MADE_WITH: made}


def store_head(output_dir: Path, head: Head, made: Trained, text: TokenBlocks) -> Anchor:
    """Sort the model, turn its stream onto its principal axes where that is exact, and write it as the first anchor.

    Args:
        output_dir: the chain's folder.
        head: what it is.
        made: what `head.make` returned, on the device to calibrate on.
        text: to calibrate on.
    """
    model: PreTrainedModel = made.model
    architecture = architecture_of(model)
    if architecture.tied != head.architecture.tied:
        # Planned by the config of a model on the Hub whose tensors could not be looked at before.
        raise ValueError(
            f"tie_word_embeddings is {head.architecture.tied} in the config of the {type(model).__name__} that was "
            f"loaded, but {architecture.tied} by its weights, which are here now: run the same again."
        )
    weights = {key: tensor.cpu() for key, tensor in weights_of(model, architecture).items()}
    blocks = text.input_ids
    statistics = collect_statistics(model, architecture, calibration_batches(blocks), blocks.numel())
    scores = importance(weights, architecture, statistics)
    in_order, statistics = sort_weights(weights, architecture, statistics, scores)
    if can_rotate(in_order, architecture):
        in_order, statistics = to_principal_axes(in_order, architecture, statistics)
    record = {
        "name": head.name,
        "parent": None,
        "text_start": list(text.start),
        "tokens_seen": made.tokens_seen,
        "losses": made.losses,
        "training": {
            **head.record,
            ORIGINS: [source.origin().record() for source in head.sources],
            **({DATASETS: hub_datasets(head.dataset)} if made.tokens_seen else {}),
        },
    }
    sorted_model = build_model(architecture, in_order, model.dtype)
    sorted_model.generation_config = copy.deepcopy(model.generation_config)
    head.special.follow(sorted_model, head.tokenizer)
    return store_anchor(output_dir, record, sorted_model, head.tokenizer, statistics)
