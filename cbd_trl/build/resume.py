"""Find the anchors that an earlier run of a build finished, and check that they are those requested now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbd_trl.build.arguments import changed_arguments, then_and_now, training_record
from cbd_trl.build.plan import Step
from cbd_trl.build.public_anchor import PublicModel
from cbd_trl.build.source_anchor import MADE_WITH, SourceAnchor
from cbd_trl.build.training import ARGUMENTS, begun_trainings
from cbd_trl.chain.cards import VALUES
from cbd_trl.chain.chain import Anchor, Chain
from cbd_trl.chain.folders import check_place
from cbd_trl.chain.manifest import MANIFEST, OBSTACLE, PUBLIC_MODEL, SHAPE_SEARCH
from cbd_trl.utils.tokenizers import tokenizer_hash

_SOURCE = ("source", "weights_sha256")


def finished_anchors(output_dir: Path, source_anchor: SourceAnchor, steps: Sequence[Step]) -> dict[int, Anchor]:
    """Find anchors that an earlier run finished, by position (0 is the source anchor).

    Args:
        output_dir: the chain's folder.
        source_anchor: the largest anchor as requested now; names and fingerprints are compared where known.
        steps: the lower anchors.

    Raises:
        ValueError: the folder holds a chain of another source or other settings, or another file where an anchor
            would go.
    """
    names = [source_anchor.name, *(step.name for step in steps)]
    if not (output_dir / MANIFEST).exists():
        check_place(output_dir, names)
        return {}
    anchors = Chain.from_pretrained(output_dir).anchors
    way_out = "Choose another output_dir, or delete that folder to build anew."
    _check_source_anchor(output_dir, anchors[0], source_anchor, way_out)
    if len(anchors) > len(steps) + 1:
        there = ", ".join(anchor.name for anchor in anchors)
        raise ValueError(f"{output_dir} already holds a chain of more anchors ({there}) than requested now. {way_out}")
    for anchor, step in zip(anchors[1:], steps, strict=False):
        recorded, now = anchor.training.get(ARGUMENTS) or {}, training_record(step.args)
        was = _model_values(anchor.training.get(PUBLIC_MODEL))
        was |= _search_values(step.search, anchor.training.get(SHAPE_SEARCH))
        wanted = {**_model_values(_record(step.public)), **_search_values(step.search, step.search)}
        changed = [name for name, value in wanted.items() if was[name] != value]
        changed += changed_arguments(recorded, now)
        if anchor.shape != step.architecture.shape or changed:
            raise ValueError(
                f"{output_dir} already holds the anchor {anchor.name} {anchor.shape}, built with other settings than "
                f"requested now: {step.architecture.shape}; changed arguments: {changed or 'none'}"
                f"{then_and_now(changed, {**recorded.get(VALUES, {}), **was}, {**now[VALUES], **wanted})}. "
                f"{way_out}"
            )
    check_place(output_dir, names[len(anchors) :])
    return dict(enumerate(anchors))


def chosen_shapes(output_dir: Path) -> dict[int, dict[str, int]]:
    """Find the shapes of finished anchors that a search found, by their position among those requested.

    Args:
        output_dir: the chain's folder.

    Raises:
        ValueError: there is a chain, and it is damaged.
    """
    if not (output_dir / MANIFEST).exists():
        return {}
    lower = Chain.from_pretrained(output_dir, verify=False).anchors[1:]
    return {position: anchor.shape for position, anchor in enumerate(lower) if SHAPE_SEARCH in anchor.training}


def pinned_commits(output_dir: Path) -> dict[tuple[str, str | None], str]:
    """Find the commits of models on the Hub that the anchors of a folder were begun with, finished or not.

    A branch may have moved since; what was begun goes on with what it began with.

    Args:
        output_dir: the chain's folder.

    Returns:
        (id, revision as it was requested) -> commit.

    Raises:
        ValueError: there is a chain, and it is damaged.
    """
    trainings: list[Mapping[str, Any]] = list(begun_trainings(output_dir))
    if (output_dir / MANIFEST).exists():
        trainings += [anchor.training for anchor in Chain.from_pretrained(output_dir, verify=False).anchors]
    records = [record for training in trainings if isinstance(record := training.get(PUBLIC_MODEL), Mapping)]
    return {
        (str(record.get("model")), record.get("requested_revision")): commit
        for record in records
        if isinstance(commit := record.get("revision"), str)
    }


def _record(public: PublicModel | None) -> Mapping[str, Any] | None:
    return None if public is None else public.record()


def _model_values(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a model that is an anchor, or teaches it, may not change; None where there is none."""
    found = record or {}
    way = None if record is None else "matched" if found.get(OBSTACLE) is None else "a second teacher"
    return {**{name: found.get(name) for name in ("model", "revision", "weights_sha256")}, "way": way}


def _search_values(requested: Mapping[str, Any] | None, record: Any) -> dict[str, Any]:
    """What a record has of a search that is requested now; without one any way to come to the shape is the same."""
    found = record if isinstance(record, Mapping) else {}
    return {f"{SHAPE_SEARCH}.{name}": found.get(name) for name in requested or {}}


def _check_source_anchor(output_dir: Path, anchor: Anchor, source_anchor: SourceAnchor, way_out: str) -> None:
    there, now = ({key: record.get(key) for key in _SOURCE} for record in (anchor.training, source_anchor.record))
    shape = source_anchor.architecture.shape
    bridged = "bridge" in anchor.training or "bridge" in source_anchor.record
    if _differing(there, now) or (anchor.shape != shape and not bridged):
        raise ValueError(
            f"{output_dir} already holds a chain of another source ({there}, {anchor.shape}; requested: {now}, "
            f"{shape}). {way_out}"
        )
    changed = _changed_bridge(anchor.training.get("bridge"), source_anchor)
    made, wanted = anchor.training.get(MADE_WITH) or {}, source_anchor.record.get(MADE_WITH, {})
    changed += [name for name, value in wanted.items() if made.get(name, value) != value]
    if anchor.tokenizer_sha256 is not None and anchor.tokenizer_sha256 != tokenizer_hash(source_anchor.tokenizer):
        changed.insert(0, "tokenizer")
    if anchor.shape != shape or changed:
        raise ValueError(
            f"{output_dir} already holds the anchor {anchor.name} {anchor.shape}, made with other settings than "
            f"requested now: {shape}; changed: {changed or 'none'}"
            f"{_values(changed, anchor.training, source_anchor.record)}. {way_out}"
        )


def _values(changed: list[str], there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = ({**(r.get(MADE_WITH) or {}), **_bridge_arguments(r)} for r in (there, now))
    return then_and_now(changed, *flat)


def _bridge_arguments(record: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = (record.get("bridge") or {}).get(ARGUMENTS) or {}
    return arguments.get(VALUES) or {}


def _differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys known in both records whose values differ."""
    return [key for key in there if there[key] and now.get(key) and there[key] != now[key]]


def _changed_bridge(recorded: Mapping[str, Any] | None, source_anchor: SourceAnchor) -> list[str]:
    wanted = source_anchor.record.get("bridge")
    if recorded is None or wanted is None:
        return [] if recorded is wanted else ["bridge"]
    there = {key: value for key, value in recorded.items() if key != ARGUMENTS}
    return _differing(there, wanted) + changed_arguments(recorded.get(ARGUMENTS) or {}, wanted[ARGUMENTS])
