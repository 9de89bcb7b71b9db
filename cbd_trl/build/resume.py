"""What an earlier run of a build finished, if it is what is asked for now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbd_trl.build.arguments import changed_arguments, there_and_now, training_record
from cbd_trl.build.plan import Step
from cbd_trl.build.source_anchor import MADE_WITH, Head
from cbd_trl.build.training import ARGUMENTS
from cbd_trl.chain.cards import VALUES
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.folders import check_place
from cbd_trl.chain.manifest import MANIFEST
from cbd_trl.utils.tokenizers import tokenizer_hash

_SOURCE = ("source", "weights_sha256")


def finished_anchors(output_dir: Path, head: Head, steps: Sequence[Step]) -> dict[int, Anchor]:
    """Anchors that an earlier run finished, by position (0 is the head).

    Args:
        output_dir: the chain's folder.
        head: the first anchor, as it is asked for now. Names and hashes of weights are compared where both are known.
        steps: the others.

    Raises:
        ValueError: the folder holds a chain that was built from something else or with other settings, or something
            else in the place of an anchor.
    """
    names = [head.name, *(step.name for step in steps)]
    if not (output_dir / MANIFEST).exists():
        check_place(output_dir, names)
        return {}
    anchors = Chain.from_pretrained(output_dir).anchors
    way_out = "Choose another output_dir, or delete that folder to build anew."
    _check_head(output_dir, anchors[0], head, way_out)
    if len(anchors) > len(steps) + 1:
        there = ", ".join(anchor.name for anchor in anchors)
        raise ValueError(
            f"{output_dir} already holds a chain of more anchors ({there}) than are asked for now. {way_out}"
        )
    for anchor, step in zip(anchors[1:], steps, strict=False):
        recorded, now = anchor.training.get(ARGUMENTS) or {}, training_record(step.args)
        changed = changed_arguments(recorded, now)
        if anchor.shape != step.architecture.shape or changed:
            raise ValueError(
                f"{output_dir} already holds the anchor {anchor.name} {anchor.shape}, built with other settings than "
                f"are asked for now: {step.architecture.shape}; changed arguments: {changed or 'none'}"
                f"{there_and_now(changed, recorded.get(VALUES, {}), now[VALUES])}. {way_out}"
            )
    check_place(output_dir, names[len(anchors) :])
    return dict(enumerate(anchors))


def _check_head(output_dir: Path, anchor: Anchor, head: Head, way_out: str) -> None:
    there, now = ({key: record.get(key) for key in _SOURCE} for record in (anchor.training, head.record))
    shape = head.architecture.shape
    bridged = "bridge" in anchor.training or "bridge" in head.record
    if _differing(there, now) or (anchor.shape != shape and not bridged):
        raise ValueError(
            f"{output_dir} already holds a chain of another source ({there}, {anchor.shape}; asked for: {now}, "
            f"{shape}). {way_out}"
        )
    changed = _changed_bridge(anchor.training.get("bridge"), head)
    made, wanted = anchor.training.get(MADE_WITH) or {}, head.record.get(MADE_WITH, {})
    changed += [name for name, value in wanted.items() if made.get(name, value) != value]
    if anchor.tokenizer_sha256 is not None and anchor.tokenizer_sha256 != tokenizer_hash(head.tokenizer):
        changed.insert(0, "tokenizer")
    if anchor.shape != shape or changed:
        raise ValueError(
            f"{output_dir} already holds the anchor {anchor.name} {anchor.shape}, made with other settings than are "
            f"asked for now: {shape}; changed: {changed or 'none'}{_values(changed, anchor.training, head.record)}. "
            f"{way_out}"
        )


def _values(changed: list[str], there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = ({**(r.get(MADE_WITH) or {}), **_bridge_arguments(r)} for r in (there, now))
    return there_and_now(changed, *flat)


def _bridge_arguments(record: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = (record.get("bridge") or {}).get(ARGUMENTS) or {}
    return arguments.get(VALUES) or {}


def _differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is known of both and differs."""
    return [key for key in there if there[key] and now.get(key) and there[key] != now[key]]


def _changed_bridge(recorded: Mapping[str, Any] | None, head: Head) -> list[str]:
    wanted = head.record.get("bridge")
    if recorded is None or wanted is None:
        return [] if recorded is wanted else ["bridge"]
    there = {key: value for key, value in recorded.items() if key != ARGUMENTS}
    return _differing(there, wanted) + changed_arguments(recorded.get(ARGUMENTS) or {}, wanted[ARGUMENTS])
