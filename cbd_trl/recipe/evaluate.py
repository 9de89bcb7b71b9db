"""What a finished chain is worth: the held-out loss of each anchor and of a few sizes, written beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cbd_trl.cards import MEASURED, save_cards
from cbd_trl.chain.chain import Chain
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.report.sweep import Target, fingerprint, sweep
from cbd_trl.report.text import add_bits_per_byte
from cbd_trl.targets.describe_targets import describe_targets
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.progress import Progress

# Every measurement as soon as it is made.
RESULTS = "evaluation-results.json"


def evaluate_chain(
    chain: Chain, folder: Path, blocks: TokenBlocks, sizes: Sequence[float], device: Any
) -> dict[str, list[dict[str, Any]]]:
    """Measure each anchor, and a target of each size; what an earlier run measured is kept.

    Args:
        chain: finished.
        folder: of the chain. The report is written there, with a picture, and the chain's card shows both.
        blocks: text that nothing was trained on.
        sizes: parameter counts of targets. One that no target has is left out and named: which layers stand for which
            is known only when the anchors are made, and with it the depths between two of them.
        device: to measure on.

    Returns:
        what `loss-against-size.json` holds: what `sweep` returns, with bits per byte.
    """

    def loss(model: PreTrainedModel) -> float:
        return held_out_loss(model.to(device), blocks)

    with Progress("measuring") as bar:
        report = sweep(
            chain,
            [Target(num_parameters=size) for size in sizes if _can_be_had(chain, size)],
            ("nested",),
            loss,
            results=folder / RESULTS,
            key=fingerprint(blocks.input_ids, blocks.labels),
            random=False,
            on_step=bar.at,
        )
    add_bits_per_byte(report, chain.tokenizer(), blocks)
    if report != _written(folder / MEASURED):
        save_cards(chain, report)
    return report


def _can_be_had(chain: Chain, size: float) -> bool:
    try:
        describe_targets(chain, [size])
    except ValueError as error:
        print(f"evaluation.sizes: {size:,.0f} is not measured. {error}")
        return False
    return True


def _written(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
