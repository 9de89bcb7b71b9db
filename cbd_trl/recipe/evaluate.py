"""What a finished chain is worth: the held-out loss of each anchor and of a few sizes, beside it and on its cards."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbd_trl.architectures import describe
from cbd_trl.cards import save_cards
from cbd_trl.chain.from_chain import from_chain
from cbd_trl.chain.manifest import Chain
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.report.results import write_text
from cbd_trl.report.sweep import fingerprint

EVALUATION = "evaluation.json"
_MEASURED = ("num_parameters", "shape", "loss", "seconds")


def evaluate_chain(
    chain: Chain, folder: Path, blocks: Tensor, sizes: tuple[float, ...], device: Any
) -> dict[str, Any]:
    """Measure each anchor, and a target of each size, and show it on the cards; what an earlier run measured is kept.

    Args:
        chain: finished.
        folder: of the chain; `evaluation.json` is written there after every measurement.
        blocks: (N, T) int64, text that nothing was trained on.
        sizes: parameter counts of targets.
        device: to measure on.

    Returns:
        what the file holds: `tokens`, and in `models` a list of {"kind": "anchor" or "target", "name" or "asked",
        "num_parameters", "shape", "loss": nats per token, "seconds" to make the model}.
    """
    key = fingerprint(blocks, [anchor.files for anchor in chain.anchors])
    kept = _measured(folder / EVALUATION, key)
    report: dict[str, Any] = {"key": key, "tokens": blocks.numel(), "models": []}
    wanted: list[tuple[dict[str, Any], Any]] = [
        ({"kind": "anchor", "name": anchor.name}, anchor.load_model) for anchor in chain.anchors
    ]
    wanted += [({"kind": "target", "asked": size}, lambda size=size: from_chain(chain, size)) for size in sizes]
    for named, make in wanted:
        known = next((entry for entry in kept if named.items() <= entry.items()), None)
        report["models"].append(known or {**named, **_measure(make, blocks, device)})
        write_text(folder / EVALUATION, json.dumps(report, indent=1) + "\n")
    save_cards(chain, _as_sweep(report["models"]))
    return report


def _measure(make: Callable[[], Any], blocks: Tensor, device: torch.device) -> dict[str, Any]:
    begin = time.perf_counter()
    model = make()
    seconds = time.perf_counter() - begin
    values = (model.num_parameters(), describe(model.config).shape, held_out_loss(model.to(device), blocks), seconds)
    return dict(zip(_MEASURED, values, strict=True))


def _as_sweep(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same as `cbd_trl.report.sweep.sweep` has it."""
    targets = [entry for entry in models if entry["kind"] == "target"]
    return {
        "anchors": [entry for entry in models if entry["kind"] == "anchor"],
        "targets": [{**entry, "loss": {"nested": entry["loss"]}} for entry in targets],
    }


def _measured(file: Path, key: str) -> list[dict[str, Any]]:
    """Of this chain on this text."""
    if not file.exists():
        return []
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        models = report["models"] if report["key"] == key else []
        return [entry for entry in models if entry.keys() >= {*_MEASURED}]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
