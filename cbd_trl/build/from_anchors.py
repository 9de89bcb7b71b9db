"""A chain of models that exist already, such as a public family's sizes, which were trained apart."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.build.coordinates import Coordinates
from cbd_trl.build.members import Member, check_functions, plan_members
from cbd_trl.build.special_tokens import SpecialTokens, listed
from cbd_trl.build.store import calibration_batches, finished_chain, store_anchor
from cbd_trl.chain.chain import Chain
from cbd_trl.chain.folders import check_place
from cbd_trl.chain.history import ORIGINS
from cbd_trl.chain.manifest import MANIFEST
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.blocks import blocks_of
from cbd_trl.surgery.reorder import permute
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.calibration import calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.progress import progress_shown


def chain_from_anchors(
    anchors: Sequence[str | Path | PreTrainedModel],
    *,
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    processing_class: PreTrainedTokenizerBase | None = None,
    align: bool = True,
    calibration_tokens: int = 8192,
    token: str | None = None,
) -> Chain:
    """Make a chain of models that exist already; `from_chain` then makes the sizes between them.

    Nothing is trained, and every anchor computes what it computed: only its coordinates are renumbered. Models that
    were trained apart share none, so each is matched with the one above by what both do on calibration text: residual
    channels (up to their sign where the norms are RMSNorms), FFN neurons, key/value groups and their query heads. What
    the lower anchor has then comes first in the upper one, the rest by importance. How well they matched stands in
    `chain.anchors[i].training["match"]`. This takes text and forward passes of both models, which `from_chain` does
    without: so aligning belongs to making the chain, and is done once.

    Each lower layer stands for a block of the upper anchor, evenly spaced. Anchors with padded vocabularies are cut to
    the rows that all have; where one has a head of its own, tied ones get a copy of their table as theirs.

    Run again with the same arguments, it goes on where it was interrupted.

    Args:
        anchors: two or more models of one family, largest first: models, paths or Hub ids.
        dataset: text in any format of SFTTrainer, whose first tokens calibrate.
        output_dir: where the chain is written.
        processing_class: the tokenizer that they share; by default the first one's.
        align: False leaves all coordinates as they are, for anchors that share theirs already.
        calibration_tokens: tokens of text behind matches and statistics.
        token: for anchors on the Hub.

    Raises:
        ValueError: before anything is written, for anchors that do not go together (the message says why) or a folder
            that holds another chain.
    """
    output_dir, dataset = Path(output_dir), sft_dataset(dataset, "dataset")
    sources = [Source(place, token=token, role="anchor") for place in anchors]
    if len(sources) < 2:
        raise ValueError(f"A chain needs two anchors or more, got {len(sources)}. Give models, paths or Hub ids.")
    tokenizer = sources[0].tokenizer_or(processing_class)
    members = plan_members(sources, tokenizer)
    for source in sources:
        source.check_weights()
    length = min(calibration_length(member.architecture.config) for member in members)
    text = token_blocks(dataset, tokenizer, calibration_tokens, length)
    with progress_shown(PartialState().is_local_main_process):
        _make(output_dir, members, tokenizer, text, align)
    return finished_chain(output_dir)


def _make(
    output_dir: Path,
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerBase,
    text: TokenBlocks,
    align: bool,
) -> None:
    """Write the anchors that an earlier run did not finish."""
    state, work, blocks = PartialState(), output_dir / ".work", text.input_ids
    settings = _settings(members, align, blocks)
    finished = _finished(output_dir, members, settings)
    if finished == len(members):
        return
    file = work / "coordinates.safetensors"
    coordinates = Coordinates.load(file, settings) if align else Coordinates.unchanged(len(members))
    if coordinates is None:
        # What was written in coordinates that are no longer known does not go with what comes.
        finished = 0
    if not finished:
        check_functions(members, blocks[:1])
    if coordinates is None:
        coordinates = Coordinates.matched(members, blocks)
        if state.is_main_process:
            coordinates.save(file, settings)
    # A target between two anchors stops where either of them does.
    ends = [end for member in members for end in _ends(member)]
    for number in range(finished, len(members)):
        state.print(f"[{number + 1}/{len(members)}] writing {members[number].name}")
        _write(output_dir, members, number, coordinates, settings[number], tokenizer, ends, text)
    if state.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()


def _settings(members: Sequence[Member], align: bool, blocks: torch.Tensor) -> list[dict[str, Any]]:
    """What decides each anchor's folder: all anchors, since the order of one depends on those below it."""
    text = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]
    beside = [member.source.record() for member in members]
    return [{**own, "beside": beside, "aligned": align, "text": text} for own in beside]


def _finished(output_dir: Path, members: Sequence[Member], settings: Sequence[Mapping[str, Any]]) -> int:
    """How many anchors an earlier run wrote.

    Raises:
        ValueError: the folder holds another chain.
    """
    if not (output_dir / MANIFEST).exists():
        check_place(output_dir, [member.name for member in members])
        return 0
    anchors = Chain.from_pretrained(output_dir).anchors
    for anchor, member, wanted in zip(anchors, members, settings, strict=False):
        recorded = {key: anchor.training.get(key) for key in wanted}
        if recorded != wanted or anchor.shape != member.architecture.shape:
            differing = {key: (recorded[key], value) for key, value in wanted.items() if recorded[key] != value}
            raise ValueError(
                f"{output_dir} already holds another chain: its anchor {anchor.name} {anchor.shape} was made with "
                f"other settings than are asked for now, {member.architecture.shape}: {differing} (there, now). "
                "Choose another output_dir, or delete that folder to build anew."
            )
    check_place(output_dir, [member.name for member in members[len(anchors) :]])
    return len(anchors)


def _ends(member: Member) -> list[int]:
    """What ends a text of a model, by its generation config or, where it has none, its config."""
    source = member.source
    generation: Any = getattr(source.place, "generation_config", None)
    if not isinstance(source.place, PreTrainedModel):
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(
                source.place, revision=source.revision or "main", token=source.token
            )
    if generation is None:
        generation = member.architecture.config.get_text_config()
    return listed(generation.eos_token_id)


def _write(
    output_dir: Path,
    members: Sequence[Member],
    number: int,
    coordinates: Coordinates,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    text: TokenBlocks,
) -> None:
    """Put one anchor into its coordinates, measure it there, and write it."""
    member, order = members[number], coordinates.orders[number]
    model: Any = member.load()
    if order is not None:
        weights = permute(weights_of(model, member.architecture), member.architecture, order)
        permuted = build_model(member.architecture, weights, model.dtype)
        permuted.generation_config = model.generation_config
        model = permuted
    SpecialTokens().follow(model, tokenizer, ends)
    model.to(PartialState().device)
    blocks = text.input_ids
    statistics = collect_statistics(model, member.architecture, calibration_batches(blocks), blocks.numel())
    record = {
        "name": member.name,
        "parent": members[number - 1].name if number else None,
        "block_map": blocks_of(member.kept) if number else None,
        "kept_layers": list(member.kept) if number else None,
        "block_start": list(text.start),
        "tokens_seen": 0,
        "losses": {},
        "training": {**settings, "match": coordinates.matches[number], ORIGINS: [member.source.origin().record()]},
    }
    store_anchor(output_dir, record, model.cpu(), tokenizer, statistics)
