"""Make a chain of existing models, such as the sizes of a public family, which were trained separately."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.architectures import Architecture
from cbd_trl.build.compatibility import CommonForm, check_same_function, check_tokenizer, common_form, paired_layers
from cbd_trl.build.public_anchor import measured_power
from cbd_trl.build.special_tokens import SpecialTokens, listed
from cbd_trl.build.store import calibration_batches, finished_chain, store_anchor
from cbd_trl.build.training import WORK
from cbd_trl.chain.cards import ORIGINS
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.folders import check_place
from cbd_trl.chain.manifest import ALIGNED, ALPHA_POWER, MANIFEST
from cbd_trl.chain.model import build_model
from cbd_trl.chain.source import Source
from cbd_trl.surgery.align import MeasuredModel, collect_cross_moments, match_models, measured_model, order_above
from cbd_trl.surgery.blocks import Block, blocks_of
from cbd_trl.surgery.reorder import Importance, Order, importance, importance_order, permute
from cbd_trl.surgery.weights import Weights, weights_of
from cbd_trl.targets.operators import Pair
from cbd_trl.utils.blocks import TokenBlocks, calibration_length, token_blocks
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.formatting import anchor_name
from cbd_trl.utils.progress import Progress, progress_shown
from cbd_trl.utils.tensor_files import save_tensors

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Member:
    """One model that becomes an anchor.

    Args:
        source: the model.
        label: its name in messages.
        name: of its folder in the chain.
        form: the common form of all anchors.
        architecture: its architecture in that form.
        kept: for each of its layers the paired layer of the anchor above; for the first anchor its own layers.
    """

    source: Source
    label: str
    name: str
    form: CommonForm
    architecture: Architecture
    kept: list[int]

    def load(self) -> PreTrainedModel:
        """Load the model in the common form, in its own dtype and coordinates."""
        return self.form.load(self.source)


def plan_members(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> list[Member]:
    """Check and pair the models, as far as possible without weights.

    Args:
        sources: largest first.
        tokenizer: the chain's.

    Raises:
        ValueError: some are not compatible.
    """
    labels = [f"anchors[{i}]" + (f" ({source.name})" if source.name else "") for i, source in enumerate(sources)]
    own = {label: source.architecture() for label, source in zip(labels, sources, strict=True)}
    kinds = [architecture.config.model_type for architecture in own.values()]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"The anchors are of the model types {', '.join(kinds)}. A target is one stock model, so all anchors are "
            "of one type. Distill across families with build_chain instead."
        )
    for label, source in zip(labels, sources, strict=True):
        check_tokenizer(label, source, tokenizer)
    form = common_form(own, tokenizer)
    members: list[Member] = []
    for label, source in zip(labels, sources, strict=True):
        architecture = form.architecture(own[label])
        kept = list(range(architecture.depth))
        if members:
            above = members[-1]
            kept = paired_layers((above.label, label), above.architecture, architecture)
        if own[label].tied and not form.tied:
            logger.warning(
                f"{label} gets a head of its own, a copy of its table ({architecture.num_parameters:,} parameters "
                f"instead of {own[label].num_parameters:,}): another anchor has one, and a chain is tied or not."
            )
        name = anchor_name(architecture.num_parameters, [member.name for member in members])
        members.append(Member(source, label, name, form, architecture, kept))
    return members


def check_functions(members: Sequence[Member], tokens: torch.Tensor) -> None:
    """Load each lower anchor and check it under the config of the one above (see `check_same_function`).

    Args:
        members: largest first.
        tokens: (B, T) text to compare logits on.
    """
    for above, member in pairwise(members):
        weights = weights_of(member.load(), member.architecture)
        names = above.label, member.label
        check_same_function(names, above.architecture, member.architecture, weights, member.kept, tokens)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The coordinates each anchor is stored in, largest first.

    Args:
        orders: None where an anchor stays as it is.
        matches: of each anchor with the one above it, {kind: {"matched", "random"}} (see `Quality`); empty for the
            first.
    """

    orders: Sequence[Order | None]
    matches: Sequence[Mapping[str, Any]]

    @classmethod
    def unchanged(cls, count: int) -> "Coordinates":
        """Leave the coordinates of `count` anchors as they are."""
        return cls([None] * count, [{}] * count)

    @classmethod
    def matched(cls, members: Sequence[Member], blocks: torch.Tensor) -> "Coordinates":
        """Match every anchor with the one above it, and put each on a prefix of that one's coordinates.

        Two models are in memory at a time.

        Args:
            members: the anchors.
            blocks: (N, T) tokens of text.
        """
        state = PartialState()
        scores, matches = [], []
        model, side = _with_statistics(members[0], blocks)
        for number, member in enumerate(members[1:], start=1):
            state.print(f"[{number}/{len(members) - 1}] matching {member.label} with {members[number - 1].label}")
            below, below_side = _with_statistics(member, blocks)
            batches = Progress("Comparing streams", calibration_batches(blocks))
            cross = collect_cross_moments(
                model, side.architecture, below, below_side.architecture, member.kept, batches
            )
            matches.append(match_models(side, below_side, cross, member.kept))
            scores.append(_importance(side))
            model, side = below, below_side
        orders = [importance_order(_importance(side))]
        # From the smallest up: an anchor's order decides that of the one above it.
        for above, member, match, score in reversed(list(zip(members, members[1:], matches, scores, strict=False))):
            orders.insert(0, order_above(match, orders[0], above.architecture, score, member.kept))
        return cls(orders, [{}, *(match.record() for match in matches)])

    def save(self, file: Path, settings: Sequence[Mapping[str, Any]]) -> None:
        """Save them, so that an interrupted run resumes in the same coordinates."""
        tensors = {
            f"{number}.{field}": tensor.contiguous()
            for number, order in enumerate(self.orders)
            for field, tensor in (vars(order) if order is not None else {}).items()
            if tensor is not None
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"settings": json.dumps(settings), "matches": json.dumps(self.matches)}
        save_tensors(tensors, file, metadata)

    @classmethod
    def load(cls, file: Path, settings: Sequence[Mapping[str, Any]]) -> "Coordinates | None":
        """Load those of an earlier run with these settings; None if there are none."""
        if not file.exists():
            return None
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            if metadata["settings"] != json.dumps(settings):
                return None
            found: dict[int, dict[str, torch.Tensor]] = {}
            for key in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                number, field = key.split(".")
                found.setdefault(int(number), {})[field] = stored.get_tensor(key)
        return cls([Order(**found[number]) for number in sorted(found)], json.loads(metadata["matches"]))


def _with_statistics(member: Member, blocks: torch.Tensor) -> tuple[PreTrainedModel, MeasuredModel]:
    model: Any = member.load()
    model.to(PartialState().device)
    return model, measured_model(model, member.architecture, calibration_batches(blocks))


def _importance(side: MeasuredModel) -> Importance:
    return importance(side.weights, side.architecture, side.statistics)


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
    """Make a chain of existing models; `from_chain` then makes the sizes between them.

    Nothing is trained, and every anchor computes what it computed: only its coordinates are renumbered. Models that
    were trained apart share none, so each is matched with the one above by what both do on calibration text: residual
    channels (up to their sign where the norms are RMSNorms), FFN neurons, key/value groups and their query heads.
    Coordinates of the lower anchor come first in the upper one, the rest by importance. The quality of a match is in
    `chain.anchors[i].training["match"]`. Matching needs text and forward passes of both models, so it is done once,
    when the chain is made; `from_chain` needs neither.

    Each lower layer stands for a block of the upper anchor, evenly spaced. Anchors with padded vocabularies are cut to
    the rows that all have; where one has a head of its own, tied ones get a copy of their table as theirs.

    Run again with the same arguments to resume an interrupted run.

    Args:
        anchors: two or more models of one family, largest first: models, paths or Hub ids.
        dataset: text in any format of SFTTrainer, whose first tokens calibrate.
        output_dir: where the chain is written.
        processing_class: the tokenizer that they share; by default the first one's.
        align: False leaves all coordinates as they are, for anchors that share theirs already.
        calibration_tokens: tokens of text behind matches and statistics.
        token: for anchors on the Hub.

    Raises:
        ValueError: before anything is written, for anchors that are not compatible (the message gives the reason),
            mixtures of experts that are to be aligned, or a folder that holds another chain.
    """
    output_dir, dataset = Path(output_dir), sft_dataset(dataset, "dataset")
    sources = [Source(place, token=token, role="anchor") for place in anchors]
    if len(sources) < 2:
        raise ValueError(f"A chain needs two anchors or more, got {len(sources)}. Give models, paths or Hub ids.")
    tokenizer = sources[0].tokenizer_or(processing_class)
    members = plan_members(sources, tokenizer)
    if align and members[0].architecture.family.experts is not None:
        raise ValueError(
            f"Anchors of {members[0].architecture.config.model_type} cannot be matched: which expert of one is which "
            "of the other is not known. Set align=False for anchors that share their coordinates, or distill the "
            "lower ones with build_chain."
        )
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
    state, work, blocks = PartialState(), output_dir / WORK, text.input_ids
    settings = _settings(members, align, blocks)
    finished = _finished(output_dir, members, settings)
    if finished == len(members):
        return
    file = work / "coordinates.safetensors"
    coordinates = Coordinates.load(file, settings) if align else Coordinates.unchanged(len(members))
    if coordinates is None:
        # Anchors stored in coordinates that were lost cannot be combined with new ones.
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
    """Settings that decide each anchor: all anchors, since the order of one depends on those below it."""
    text = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    sources = [member.source.record() for member in members]
    return [{**own, "sources": sources, ALIGNED: align, "text_sha256": text} for own in sources]


def _finished(output_dir: Path, members: Sequence[Member], settings: Sequence[Mapping[str, Any]]) -> int:
    """Count the anchors that an earlier run wrote.

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
                f"other settings than requested now, {member.architecture.shape}: {differing} (there, now). "
                "Choose another output_dir, or delete that folder to build anew."
            )
    check_place(output_dir, [member.name for member in members[len(anchors) :]])
    return len(anchors)


def _ends(member: Member) -> list[int]:
    """Eos token ids of a model, from its generation config or, without one, its config."""
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
    """Reorder one anchor, collect its statistics, and write it."""
    member, order = members[number], coordinates.orders[number]
    model: Any = member.load()
    power = None
    if order is not None:
        weights = permute(weights_of(model, member.architecture), member.architecture, order)
        permuted = build_model(member.architecture, weights, model.dtype)
        permuted.generation_config = model.generation_config
        model = permuted
        if number:
            power = _alpha_power(Chain.from_pretrained(output_dir).anchors[number - 1], weights, member, text)
    SpecialTokens().follow(model, tokenizer, ends)
    model.to(PartialState().device)
    above = [Block(tuple(layers), kept) for layers, kept in zip(blocks_of(member.kept), member.kept, strict=True)]
    training = {**settings, "match": coordinates.matches[number], ORIGINS: [member.source.origin().record()]}
    if power is not None:
        training[ALPHA_POWER] = power
    record = {
        "name": member.name,
        "parent": members[number - 1].name if number else None,
        "blocks": above if number else None,
        "text_start": list(text.start),
        "tokens_seen": 0,
        "losses": {},
        "training": training,
    }
    store_anchor(output_dir, record, model, tokenizer, text.input_ids)


def _alpha_power(upper: Anchor, lower: Weights, member: Member, text: TokenBlocks) -> float | None:
    """Measure it (see `measured_power`); None where only depth differs."""
    above = upper.architecture()
    if above.sizes == member.architecture.sizes:
        return None
    weights, moments = upper.load_weights(), upper.load_statistics()
    pair = Pair(weights, above, lower, member.architecture, moments, blocks_of(member.kept), member.kept)
    return measured_power(pair, text.input_ids, getattr(torch, upper.dtype))
