"""In which coordinates the anchors of a chain are stored, where they were trained apart."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import PreTrainedModel

from cbd_trl.build.members import Member
from cbd_trl.build.store import calibration_batches
from cbd_trl.surgery.align import Match, Side, match_models, order_above
from cbd_trl.surgery.cross_moments import collect_cross_moments
from cbd_trl.surgery.reorder import Order
from cbd_trl.surgery.sort import Importance, importance, importance_order
from cbd_trl.surgery.statistics import collect_statistics
from cbd_trl.surgery.weights import weights_of
from cbd_trl.utils.tensor_files import save_tensors


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """New coordinates of every anchor, largest first.

    Args:
        orders: None where an anchor stays as it is.
        matches: of each anchor with the one above it, {kind: {"matched", "random"}} (see `Quality`); empty for the
            first.
    """

    orders: Sequence[Order | None]
    matches: Sequence[Mapping[str, Any]]

    @classmethod
    def unchanged(cls, count: int) -> "Coordinates":
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
        model, side = _measured(members[0], blocks)
        for number, member in enumerate(members[1:], start=1):
            state.print(f"[{number}/{len(members) - 1}] matching {member.label} with {members[number - 1].label}")
            below, below_side = _measured(member, blocks)
            batches = calibration_batches(blocks, "Comparing streams")
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
        return cls(orders, [{}, *(_told(match) for match in matches)])

    def save(self, file: Path, settings: Sequence[Mapping[str, Any]]) -> None:
        """Write them down, so that an interrupted run goes on in the same coordinates."""
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
        """What a run with these settings wrote down, None where none did."""
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


def _measured(member: Member, blocks: torch.Tensor) -> tuple[PreTrainedModel, Side]:
    model: Any = member.load()
    weights = weights_of(model, member.architecture)
    model.to(PartialState().device)
    statistics = collect_statistics(model, member.architecture, calibration_batches(blocks), blocks.numel())
    return model, Side(weights, member.architecture, statistics)


def _importance(side: Side) -> Importance:
    return importance(side.weights, side.architecture, side.statistics)


def _told(match: Match) -> dict[str, dict[str, float]]:
    """The quality of a match as it is to stand in chain.json."""
    return {
        kind: {name: round(value, 4) for name, value in dataclasses.asdict(quality).items()}
        for kind, quality in match.quality.items()
    }
