"""What a finished chain is worth: the held-out loss of each anchor and of a few sizes, written beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbd_trl.chain.from_chain import from_chain
from cbd_trl.chain.manifest import Chain
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.report.results import write_text
from cbd_trl.report.sweep import fingerprint

# Not the evaluation.json of the cards, which is what a sweep measured.
EVALUATION = "held_out.json"


def evaluate_chain(
    chain: Chain, folder: Path, blocks: Tensor, sizes: tuple[float, ...], device: Any
) -> dict[str, Any]:
    """Measure each anchor, and a target of each size; what an earlier run measured is kept.

    Args:
        chain: finished.
        folder: of the chain; `held_out.json` is written there after every measurement.
        blocks: (N, T) int64, text that nothing was trained on.
        sizes: parameter counts of targets.
        device: to measure on.

    Returns:
        what the file holds: `tokens`, and in `models` a list of {"kind": "anchor" or "target", "name" or "asked",
        "num_parameters", "loss": nats per token}.
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
        report["models"].append(known or {**named, **_measure(make(), blocks, device)})
        write_text(folder / EVALUATION, json.dumps(report, indent=1) + "\n")
    return report


def _measure(model: Any, blocks: Tensor, device: torch.device) -> dict[str, Any]:
    return {"num_parameters": model.num_parameters(), "loss": held_out_loss(model.to(device), blocks)}


def _measured(file: Path, key: str) -> list[dict[str, Any]]:
    """Of this chain on this text."""
    if not file.exists():
        return []
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return report["models"] if report["key"] == key else []
    except (ValueError, KeyError, TypeError):
        return []
