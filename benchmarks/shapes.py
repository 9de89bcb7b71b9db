"""Of all shapes of one size, which is the best, and does a score that needs no or little data find it?

    python -m benchmarks.shapes --chain runs/real/chain --sizes 62M 80M 98M --text held_out.jsonl \\
        --calibration other.jsonl --output runs/shapes

Every shape that `from_chain(..., shape_search=...)` would compare at a size is made and measured on held-out text,
with both scores beside it: the share of the energy lost by the chain's statistics, and KL to the upper anchor on
calibration text. For each score: Spearman's rank correlation with the loss (1: the same order), and by how much the
shape that it chooses is better than the one on the line between the anchors. Interrupted, it goes on where it stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr

from benchmarks.curves import mean_loss
from benchmarks.held_out import HeldOut
from benchmarks.tables import machine, markdown
from cbd_trl import Chain
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.cli.parsing import parse_sizes
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.report.sweep import fingerprint
from cbd_trl.targets.calibrate import calibration_tokens
from cbd_trl.targets.from_chain import load_pair, make_model
from cbd_trl.targets.many import multiplied_weights
from cbd_trl.targets.operators import Pair
from cbd_trl.targets.request import ANCHOR, Request, Target, find_targets
from cbd_trl.targets.shape_search import score_by_statistics, score_on_text
from cbd_trl.utils.datasets import load_rows
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count

SCORES = {"energy": "without data", "kl": "KL on text"}


class Shapes:
    """The shapes of a size with their losses and scores.

    Args:
        chain: the chain.
        held_out: measures, and keeps the scores too.
        calibration: text for the score by KL.
        key: of chain and calibration text, for the scores.
    """

    def __init__(self, chain: Chain, held_out: HeldOut, calibration: Dataset, key: str) -> None:
        self.chain, self.held_out, self.calibration, self.key = chain, held_out, calibration, key

    def size(self, size: float, count: int) -> list[dict[str, Any]]:
        """Measure the shapes of a size, that on the line first; empty where the size is an anchor's.

        Args:
            size: number of parameters.
            count: the most shapes.
        """
        request = Request(size, shape_search=count)
        targets = find_targets(self.chain, request)
        if targets[0].operator == ANCHOR:
            return []
        pair, name = load_pair(*targets[0].anchors), f"{self.key}/{size:.0f}/{count}"
        scores: Mapping[str, Mapping[str, float]] | None = self.held_out.results.get(f"{name}/scores")
        if scores is None:
            tokens = calibration_tokens(targets[0], self.calibration)
            assert tokens is not None
            by_text = score_on_text(targets, request, tokens, pair)
            scores = {"energy": _by_shape(score_by_statistics(targets, request)), "kl": _by_shape(by_text)}
            self.held_out.results.put(f"{name}/scores", scores)
        return [self._row(request, target, pair, scores) for target in targets]

    def _row(
        self, request: Request, target: Target, pair: Pair, scores: Mapping[str, Mapping[str, float]]
    ) -> dict[str, Any]:
        shape, architecture = json.dumps(target.architecture.shape), target.architecture
        make: Any = partial(make_model, self.chain, request, target, None, torch.float32, pair)
        measured = self.held_out.target(self.chain, architecture.shape, request.operator, make)
        return {
            "shape": architecture.shape,
            "parameters": architecture.num_parameters,
            "flops": 2 * multiplied_weights(architecture),
            **{name: values[shape] for name, values in scores.items()},
            "losses": measured["loss"],
            "mean": mean_loss(measured),
        }


def _by_shape(targets: Sequence[Target]) -> dict[str, float]:
    return {json.dumps(target.architecture.shape): target.score or 0.0 for target in targets}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Compare the scores with the mean loss.

    Args:
        rows: of `Shapes.size`, two at least.

    Returns:
        {score: its rank correlation with the loss, and `gained`: loss of the shape on the line minus that of the one
        chosen, nats}; `best` has what choosing by the loss itself would gain.
    """
    losses = [row["mean"] for row in rows]
    found = {"best": {"correlation": 1.0, "gained": losses[0] - min(losses)}}
    for score in SCORES:
        values = [row[score] for row in rows]
        chosen = rows[values.index(min(values))]
        found[score] = {
            "correlation": float(spearmanr(values, losses).statistic),
            "gained": losses[0] - chosen["mean"],
        }
    return found


def table(size: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """Make one size a Markdown table, the lowest loss first.

    Args:
        size: number of parameters.
        rows: of `Shapes.size`.
    """
    texts = list(rows[0]["losses"])
    header = [format_count(size), "parameters", "FLOPs a token", *SCORES.values(), *texts, "mean loss"]
    lines = [
        [
            describe_shape(row["shape"], short=True) + (" (line)" if row is rows[0] else ""),
            format_count(row["parameters"]),
            format_count(row["flops"]),
            *(f"{row[score]:.3f}" for score in SCORES),
            *(f"{row['losses'][text]:.3f}" for text in texts),
            f"{row['mean']:.3f}",
        ]
        for row in sorted(rows, key=lambda row: row["mean"])
    ]
    compared = "; ".join(
        f"{SCORES.get(name, name)}: rank correlation {of['correlation']:.2f}, gained {of['gained']:+.3f} nats"
        for name, of in summary(rows).items()
    )
    return f"{markdown(header, lines)}\n{compared}\n"


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", required=True, help="numbers of parameters: 62M 80M")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out texts, as of cbd-trl report")
    parser.add_argument("--calibration", type=Path, required=True, help="text for the score by KL, other than --text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", type=int, default=12, help="of each size")
    parser.add_argument("--blocks", type=int, default=40, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(flags)
    torch.set_num_threads(options.threads)
    chain = Chain.from_pretrained(options.chain)
    texts = {
        path.stem: held_out_blocks(chain.tokenizer(), load_rows(str(path)), options.block_length, options.blocks)
        for path in options.text
    }
    files = [anchor.files for anchor in chain.anchors]
    calibration = load_rows(str(options.calibration))
    key = fingerprint(files, options.calibration.read_bytes())
    held_out = HeldOut(texts, Results(options.output / "results.json"))
    shapes = Shapes(chain, held_out, calibration, key)
    rows = {size: shapes.size(size, options.shapes) for size in parse_sizes(options.sizes)}
    found = "\n".join(table(size, measured) for size, measured in rows.items() if len(measured) > 1)
    report = f"{found}\n{machine(options.threads)}"
    write_text(options.output / "report.md", report)
    print(report)


if __name__ == "__main__":
    main()
