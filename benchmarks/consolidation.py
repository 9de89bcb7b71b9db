"""Does a consolidation make the models between the anchors better than as many tokens for the anchors alone?

    python -m benchmarks.consolidation --chain runs/real/chain --gsm8k gsm8k_train.jsonl \\
        --wikitext wikitext2_valid.txt --output runs/consolidation

Three chains are compared: the given one; it consolidated; and it trained for as many steps of the same text, by the
same loss and teacher, each of which trains an anchor itself. Of every two neighboring anchors eta is measured
(`benchmarks.merit`), on targets at fixed shares of the way, on held-out text. The given chain's anchors are the line
that all three are compared with: what the anchors themselves gain counts too. Interrupted, it goes on where it
stopped.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset

import cbd_trl.build.consolidate as consolidation
from benchmarks.held_out import MEAN, HeldOut, Measurement, eta_on, loss_on
from benchmarks.merit import targets_at
from benchmarks.real_text_chain import BLOCK_LENGTH, RESULTS, arguments, held_out_texts, real_texts, training_dataset
from benchmarks.tables import machine, markdown
from cbd_trl import Chain, DistillConfig, consolidate_chain, from_chain
from cbd_trl.utils.files import Results, write_text

BEFORE, CONSOLIDATED, PLAIN = "before", "consolidated", "anchors alone"
SHARES = (0.125, 0.375, 0.625, 0.875)


def chains(chain: Chain, dataset: Dataset, args: DistillConfig, output: Path) -> dict[str, Chain]:
    """The given chain and the two that are trained from it, in folders of `output`; finished ones are kept."""
    # All else is the same: rows, steps, teacher, statistics.
    with patch.object(consolidation, "OWN_SHARE", 1.0):
        plain = consolidate_chain(chain, dataset, args=args, output_dir=output / "plain")
    consolidated = consolidate_chain(chain, dataset, args=args, output_dir=output / "consolidated")
    return {BEFORE: chain, CONSOLIDATED: consolidated, PLAIN: plain}


def measure(made: dict[str, Chain], held_out: HeldOut, shares: Sequence[float]) -> dict[str, Any]:
    """Losses of every chain's anchors and targets, and eta, by pair of anchors.

    Args:
        made: by the names of `chains`.
        held_out: measures.
        shares: of the way between two anchors, of the targets.

    Returns:
        {pair: {chain: {"anchors": [measurement], "targets": [measurement], "eta": {text: number}}}}.
    """
    report: dict[str, Any] = {}
    for place, (upper, lower) in enumerate(pairwise(made[BEFORE].anchors)):
        pair = Chain.from_pretrained(made[BEFORE].path, verify=False)
        pair.anchors = [upper.model_copy(update={"parent": None, "blocks": None}), lower]
        shapes = targets_at(pair, shares)
        line: list[Measurement] = [held_out.anchor(anchor) for anchor in (lower, upper)]
        for name, chain in made.items():
            anchors = [held_out.anchor(anchor) for anchor in chain.anchors[place : place + 2]]
            targets = [
                held_out.target(chain, shape, name, partial(from_chain, chain, config=shape)) for shape in shapes
            ]
            merits = {text: eta_on(text, *line, targets) for text in (*held_out.texts, MEAN)}
            report.setdefault(f"{upper.name} to {lower.name}", {})[name] = {
                "anchors": anchors,
                "targets": targets,
                "eta": merits,
            }
    return report


def table(report: dict[str, Any]) -> str:
    """Eta and mean losses, a line for each pair and chain."""
    lines = []
    for pair, rows in report.items():
        for name, row in rows.items():
            losses = [f"{loss_on(one, MEAN):.3f}" for one in (*row["anchors"], *row["targets"])]
            merit = row["eta"][MEAN]
            shown = "" if merit is None else f"{merit:.2f}"
            lines.append([f"{pair}, {name}", shown, *losses[:2], ", ".join(losses[2:])])
    return markdown(["anchors, chain", "eta", "upper anchor", "lower anchor", "targets, from the smallest"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help=f"rows of {BLOCK_LENGTH} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the way, where the targets are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out-blocks", type=int, default=40, help=f"of {BLOCK_LENGTH} tokens, of each text")
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chain = Chain.from_pretrained(options.chain)
    texts = held_out_texts(real_texts(options), chain.tokenizer(), options.held_out_blocks)
    dataset = training_dataset(options, options.seed)
    args = arguments(
        options.steps, options.learning_rate, None, options.seed, not options.fp32, batch_size=options.batch_size
    )
    held_out = HeldOut(texts, Results(options.output / RESULTS), not options.fp32)
    report = measure(chains(chain, dataset, args, options.output), held_out, options.shares)
    write_text(options.output / "consolidation.json", json.dumps(report, indent=1))
    text = table(report)
    write_text(options.output / "consolidation.md", f"{text}\n{machine(options.threads)}")
    print(text)


if __name__ == "__main__":
    main()
