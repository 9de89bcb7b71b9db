"""Is the shape that `build_chain(..., shape_search=N)` finds for an anchor better after training than the one without?

    python -m benchmarks.anchor_shapes --source DIR --size 62M --data train.jsonl --text held_out.jsonl other.jsonl \\
        --steps 200 --output runs/anchor_shapes

Of one source and one size, four shapes are distilled on the same rows for as many steps, each as `build_chain` does
it: the one without a search, the one that the search chooses, and of the others the one that it ranks first and the
one that it ranks last (`--others`). Measured on held-out text, beside the score of the search: KL to the source before
any training. With `--flops` the shapes have equal FLOPs a token (those of the first shape of the size) and not equal
parameters. The source anchor is made once. Interrupted, it goes on where it stopped; run again with other `--others`
or with `--flops`, what is finished is kept.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr

from benchmarks.curves import mean_loss
from benchmarks.held_out import HeldOut
from benchmarks.real_text_chain import arguments
from benchmarks.tables import machine, markdown
from cbd_trl import Chain, DistillConfig, build_chain
from cbd_trl.architectures import Architecture
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.build.plan import ShapeSearch, plan_step
from cbd_trl.build.shape_search import SearchText, best_shape, score_shapes
from cbd_trl.chain.manifest import MANIFEST, read_manifest, write_manifest
from cbd_trl.chain.source import Source
from cbd_trl.cli.parsing import parse_sizes
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.shapes.budget import Budget, FlopCount, ParameterCount
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.shapes.solve import solve_anchor
from cbd_trl.shapes.spread import spread_anchors
from cbd_trl.utils.datasets import load_rows
from cbd_trl.utils.files import Results, write_text
from cbd_trl.utils.formatting import format_count

Fields = dict[str, int]


@dataclass(frozen=True)
class AnchorShapes:
    """Anchors of one size and several shapes, below one source.

    Args:
        source: a model folder.
        folder: of all chains.
        dataset: text to distill on.
        args: of every training.
        calibration_tokens: as of `build_chain`.
    """

    source: str
    folder: Path
    dataset: Dataset
    args: DistillConfig
    calibration_tokens: int

    @cached_property
    def architecture(self) -> Architecture:
        """Of the source."""
        return Source(self.source).architecture()

    def chain(self, fields: Fields) -> Chain:
        """Distill an anchor of a shape; the source anchor is that of the chain that was made first."""
        folder = self.folder / "-".join(map(str, fields.values()))
        first = next((path.parent for path in sorted(self.folder.glob(f"*/{MANIFEST}"))), None)
        if first is not None and not (folder / MANIFEST).exists():
            _copy_source(first, folder)
        return build_chain(
            self.source,
            [fields],
            dataset=self.dataset,
            output_dir=folder,
            args=self.args,
            calibration_tokens=self.calibration_tokens,
        )

    def scores(self, chain: Chain, size: float, count: int, budget: type[Budget]) -> list[dict[str, Any]]:
        """Score shapes as a search does, the one without a search first."""
        upper, search = chain.source, ShapeSearch(count, budget=budget)
        architecture, names = upper.architecture(), [upper.name]
        steps = [
            replace(plan_step(architecture, fields, 0, self.args, self.dataset, names), search=search.record(size))
            for fields in spread_anchors(architecture, size, count, budget=budget)
        ]
        text = SearchText.read(upper.config(), self.dataset, self.args, chain.tokenizer(), self.calibration_tokens)
        return score_shapes(self.folder / "scores", upper, steps, search, text, self.args.device, _never)


def _copy_source(first: Path, folder: Path) -> None:
    """Begin a chain with the source anchor of another."""
    manifest = read_manifest(first)
    source = manifest.anchors[:1]
    shutil.copytree(first / source[0].name, folder / source[0].name, dirs_exist_ok=True)
    write_manifest(folder, manifest.model_copy(update={"anchors": source}))


def _never(*args: Any) -> Any:
    raise AssertionError("a search without trainings trains nothing")


def compared_shapes(scores: Sequence[Mapping[str, Any]], others: int) -> dict[str, Fields]:
    """Choose the shapes that are distilled, {role: config fields}.

    Args:
        scores: of `AnchorShapes.scores`.
        others: how many beside the one without a search and the one that it chooses, from the best to the worst of the
            rest in even steps of their ranks.
    """
    chosen = best_shape(scores)
    found = {"without a search" if chosen else "without a search, and chosen": dict(scores[0]["shape"])}
    if chosen:
        found["chosen"] = dict(scores[chosen]["shape"])
    ranks = sorted(range(len(scores)), key=lambda number: scores[number]["score"])
    rest = [(rank, number) for rank, number in enumerate(ranks, 1) if number not in (0, chosen)]
    count = min(others, len(rest))
    steps = [round(i * (len(rest) - 1) / max(count - 1, 1)) for i in range(count)]
    return found | {f"rank {rank}": dict(scores[number]["shape"]) for rank, number in (rest[step] for step in steps)}


def rows_of(
    shapes: AnchorShapes, held_out: HeldOut, scores: Sequence[Mapping[str, Any]], others: int
) -> list[dict[str, Any]]:
    """Distill and measure, a row for each shape, the one without a search first."""
    rows = []
    known = {json.dumps(entry["shape"]): entry["score"] for entry in scores}
    for role, fields in compared_shapes(scores, others).items():
        anchor = shapes.chain(fields).anchors[1]
        measured, architecture = held_out.anchor(anchor), anchor.architecture()
        rows.append({
            "role": role,
            "shape": fields,
            "parameters": architecture.num_parameters,
            "flops": FlopCount.of(architecture),
            "score": known[json.dumps(fields)],
            "tokens": anchor.tokens_seen,
            "losses": measured["loss"],
            "mean": mean_loss(measured),
        })  # fmt: skip
    return rows


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Make the rows a Markdown table, the lowest loss first, and say what the search gained.

    Args:
        title: what the shapes have in common.
        rows: of `rows_of`.
    """
    texts = list(rows[0]["losses"])
    header = [title, "role", "parameters", "FLOPs a token", "tokens", "KL untrained", *texts, "mean loss"]
    lines = [
        [
            describe_shape(row["shape"], short=True),
            row["role"],
            format_count(row["parameters"]),
            format_count(row["flops"]),
            format_count(row["tokens"]),
            f"{row['score']:.3f}",
            *(f"{row['losses'][text]:.3f}" for text in texts),
            f"{row['mean']:.3f}",
        ]
        for row in sorted(rows, key=lambda row: row["mean"])
    ]
    gained = rows[0]["mean"] - next(row["mean"] for row in rows if "chosen" in row["role"])
    correlation = float(spearmanr([row["score"] for row in rows], [row["mean"] for row in rows]).statistic)
    return (
        f"{markdown(header, lines)}\nThe search gained {gained:+.3f} nats on the mean; rank correlation of its score "
        f"and the loss over the {len(rows)} shapes: {correlation:.2f}.\n"
    )


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--size", required=True, help="number of parameters: 62M")
    parser.add_argument("--data", required=True, help="rows to distill on: .jsonl, .txt, ...")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out texts, as of cbd-trl report")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--flops", action="store_true", help="shapes of equal FLOPs a token")
    parser.add_argument("--shapes", type=int, default=16, help="that the search compares")
    parser.add_argument(
        "--others", type=int, default=2, help="shapes distilled beside those without and of the search"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of 256 tokens in a step")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=40, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(flags)
    torch.set_num_threads(options.threads)
    args = arguments(options.steps, options.learning_rate, None, options.seed, not options.fp32, options.batch_size)
    dataset = load_rows(options.data)
    shapes = AnchorShapes(options.source, options.output, dataset, args, options.calibration_tokens)
    [size] = parse_sizes([options.size])
    fields = solve_anchor(shapes.architecture, size)
    budget: type[Budget] = ParameterCount
    if options.flops:
        budget, size = FlopCount, FlopCount.of(cut_architecture(shapes.architecture, fields))
    chain = shapes.chain(fields)
    texts = {
        path.stem: held_out_blocks(chain.tokenizer(), load_rows(str(path)), options.block_length, options.blocks)
        for path in options.text
    }
    held_out = HeldOut(texts, Results(options.output / "results.json"), not options.fp32)
    scores = shapes.scores(chain, size, options.shapes, budget)
    rows = rows_of(shapes, held_out, scores, options.others)
    report = f"{table(f'{format_count(size)} {budget.unit}', rows)}\n{machine(options.threads)}"
    write_text(options.output / f"report-{budget.name}.md", report)
    print(report)


if __name__ == "__main__":
    main()
