"""How near the straight line between two anchors do the models between them come?

    python -m benchmarks.merit --chain runs/real/chain --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt \\
        --output runs/merit

Each anchor of the chain is measured with the one above it, as a pair that differs in depth, in width or in both.
`benchmarks.real_text_chain` builds a chain with a pair of the first two kinds, and, with `--one-step`, one with a pair
of the third; its plans name the targets.

eta = sum over targets of (loss_S - loss_t) / (loss_S - loss_L), divided by the sum of (N_t - N_S) / (N_L - N_S): 1 on
the straight line in parameters from the smaller anchor S to the larger one L, 0 where all targets are as good as S.
On held-out text, for each text and for the mean of their losses; the first blocks of it may be skipped, and are what
the calibrated method calibrates on. Further sizes near the smaller anchor (`--shares`) have an eta of their own, and
each size the nats by which it is above the best smaller one, which `expand` would grow to its shape without changing
the function: above 0.01 is too much. Interrupted, it goes on where it stopped; in the folder of
`benchmarks.real_text_chain` it takes what is known there, if as many blocks are held out and none is skipped.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from benchmarks.held_out import MEAN, HeldOut, Measurement, divided, eta_on, loss_on, share_of_way
from benchmarks.real_text_chain import BLOCK_LENGTH, PLANS, RESULTS, RealChain, held_out_texts, real_texts
from benchmarks.tables import machine, markdown
from cbd_trl import Chain, from_chain
from cbd_trl.chain.model import build_model
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import OPERATORS, Plan
from cbd_trl.targets.request import ANCHOR, Request, find_target
from cbd_trl.utils.files import Results, write_text

FROM_LAST, FROM_FIRST, CALIBRATED = "blocks from the last", "blocks from the first", "nested, calibrated"
DEFAULTS = ("nested", CALIBRATED)
METHODS = {
    "depth": ("nested", CALIBRATED, FROM_LAST, FROM_FIRST, "slice", "expand", "linear"),
    "width": ("nested", CALIBRATED, "slice", "expand", "linear"),
    "both": ("nested", CALIBRATED, "slice", "expand", "linear"),
}


def pairs_of(chain: Chain) -> dict[str, Chain]:
    """The chain reduced to each anchor and the one above it, by what they differ in: a key of `METHODS`."""
    pairs = {}
    for upper, lower in itertools.pairwise(chain.anchors):
        above, below = upper.architecture(), lower.architecture()
        kind = "depth" if above.sizes == below.sizes else "width" if above.depth == below.depth else "both"
        pairs[kind] = Chain.from_pretrained(chain.path, verify=False)
        pairs[kind].anchors = [upper.model_copy(update={"parent": None, "blocks": None}), lower]
    return pairs


def boomerang(chain: Chain, fields: Mapping[str, int], first: bool) -> PreTrainedModel:
    """Blocks of the larger anchor in place of the smaller one's layers, in order from one end (arXiv 2510.05064)."""
    pair = load_pair(*chain.anchors)
    target = cut_architecture(pair.upper_architecture, fields)
    missing, swapped = target.depth - pair.lower_architecture.depth, set()
    for i in range(len(pair.blocks)) if first else reversed(range(len(pair.blocks))):
        more = len(pair.blocks[i]) - 1
        if 0 < missing >= more:
            swapped.add(i)
            missing -= more
    weights, architecture = OPERATORS["patch"].make(pair, Plan(target, swapped=swapped))
    return build_model(architecture, weights, torch.float32)


def make(chain: Chain, fields: Mapping[str, int], method: str, calibration: Dataset) -> PreTrainedModel:
    """A target by one of `METHODS`."""
    if method in (FROM_LAST, FROM_FIRST):
        return boomerang(chain, fields, first=method == FROM_FIRST)
    if method == CALIBRATED:
        return from_chain(chain, config=dict(fields), calibration_dataset=calibration)
    return from_chain(chain, config=dict(fields), operator=method)


def measure_pair(
    name: str,
    chain: Chain,
    held_out: HeldOut,
    plan: RealChain,
    methods: Sequence[str],
    calibration: Dataset,
    shares: Sequence[float] = (),
) -> dict[str, Any]:
    """Everything about one pair: anchors, targets by method, eta by method and text.

    Args:
        name: what the anchors differ in, a key of `METHODS`.
        chain: the pair, of `pairs_of`.
        held_out: measures.
        plan: names the targets.
        methods: those of `METHODS` to measure.
        calibration: text for the calibrated method; no held-out row is in it.
        shares: of the way up, of further targets by the methods of `DEFAULTS`; eta is without them.
    """
    large, small = (held_out.anchor(anchor) for anchor in chain.anchors)

    def measured(method: str, fields_of: Sequence[Mapping[str, int]]) -> list[Measurement]:
        parts = [calibration["input_ids"][:]] if method == CALIBRATED else []
        return [
            held_out.target(chain, fields, method, partial(make, chain, fields, method, calibration), *parts)
            for fields in fields_of
        ]

    used = [method for method in METHODS[name] if method in methods]
    rows = {method: measured(method, plan.targets[name]) for method in used}
    further = {method: measured(method, targets_at(chain, shares)) for method in used if method in DEFAULTS}
    merits = {
        method: {text: eta_on(text, small, large, found) for text in (*held_out.texts, MEAN)}
        for method, found in rows.items()
    }
    return {"large": large, "small": small, "targets": rows, "shares": further, "eta": merits}


def targets_at(chain: Chain, shares: Sequence[float]) -> list[dict[str, int]]:
    """The shapes of a pair nearest to some shares of the way from the smaller anchor to the larger one, each once.

    Args:
        chain: the pair.
        shares: in parameters, 0 to 1.
    """
    large, small = (anchor.num_parameters for anchor in chain.anchors)
    found = []
    for share in shares:
        size = small + share * (large - small)
        target = find_target(chain, Request(size, tolerance=0.5 * (large - small) / size))
        if target.operator != ANCHOR and target.architecture.shape not in found:
            found.append(target.architecture.shape)
    return found


def excesses(small: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """By how much the mean loss of each model is above that of the best smaller one, which `expand` would grow to its
    shape without changing the function.

    Args:
        small: the smaller anchor.
        rows: models between the anchors, smallest first.
    """
    losses = [loss_on(measured, MEAN) for measured in (small, *rows)]
    return [loss - min(losses[: i + 1]) for i, loss in enumerate(losses[1:])]


def table_by_size(name: str, report: Mapping[str, Any], texts: Sequence[str]) -> str:
    """The default's models of one pair as Markdown, smallest first: eta of each, and `excesses`."""
    small, large = report["small"], report["large"]
    lines = []
    for method in (method for method in DEFAULTS if method in report["targets"]):
        rows = [*report["targets"][method], *report["shares"][method]]
        rows = sorted(rows, key=lambda row: row["num_parameters"])
        for row, excess in zip(rows, excesses(small, rows), strict=True):
            size = [f"{row['num_parameters'] / 1e6:.1f}M", f"{share_of_way(small, large, row):.2f}"]
            merits = [
                "-" if (e := eta_on(text, small, large, [row])) is None else f"{e:.2f}" for text in (*texts, MEAN)
            ]
            lines.append([method, *size, f"{loss_on(row, MEAN):.3f}", *merits, f"{excess:+.3f}"])
    etas = (f"eta, {text}" for text in (*texts, MEAN))
    return markdown([name, "parameters", "of the way", "mean loss", *etas, "above the best smaller one"], lines)


def table(name: str, report: Mapping[str, Any], texts: Sequence[str]) -> str:
    """One pair as Markdown: losses text by text at every size, then eta."""

    def losses(measured: Mapping[str, Any]) -> str:
        return " / ".join(f"{loss_on(measured, text):.3f}" for text in texts)

    def merit(method: str, text: str) -> str:
        return "-" if (value := report["eta"][method][text]) is None else f"{value:.2f}"

    sizes = [f"{row['num_parameters'] / 1e6:.1f}M" for row in next(iter(report["targets"].values()))]
    lines = [
        [method, *map(losses, rows), " / ".join(merit(method, text) for text in texts), merit(method, MEAN)]
        for method, rows in report["targets"].items()
    ]
    ends = [report[end] for end in ("small", "large")]
    anchors = ", ".join(f"{end['num_parameters'] / 1e6:.1f}M (anchor): {losses(end)}" for end in ends)
    header = [f"{name}: {' / '.join(texts)}", *sizes, "eta", "eta of the mean"]
    return f"{markdown(header, lines)}\n{anchors}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, default="smollm2-135m", help="of `benchmarks.real_text_chain`")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out-blocks", type=int, default=40, help=f"of {BLOCK_LENGTH} tokens, of each text")
    parser.add_argument("--skip-blocks", type=int, default=0, help="the first ones, on which a recipe was chosen")
    parser.add_argument("--methods", nargs="+", choices=METHODS["depth"], default=METHODS["depth"], metavar="METHOD")
    parser.add_argument(
        "--shares", nargs="*", type=float, default=[0.05, 0.1, 0.2], help="of the way up: further sizes, without eta"
    )
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if CALIBRATED in options.methods and not options.skip_blocks:
        parser.error(f"{CALIBRATED!r} calibrates on the blocks that --skip-blocks skips: skip some, or leave it out.")
    chain = Chain.from_pretrained(options.chain)
    skipped = options.skip_blocks
    blocks = held_out_texts(real_texts(options), chain.tokenizer(), skipped + options.held_out_blocks)
    first, texts = divided(blocks, skipped)
    # As much of each text in every part of it. On text that the anchors learned from, the smaller one looks too good.
    mixed = torch.stack([found.input_ids for found in first.values()], 1).flatten(0, 1)
    calibration = Dataset.from_dict({"input_ids": mixed.tolist()})
    held_out, plan = HeldOut(texts, Results(options.output / RESULTS), not options.fp32), PLANS[options.plan]
    reports = {
        name: measure_pair(name, pair, held_out, plan, options.methods, calibration, options.shares)
        for name, pair in pairs_of(chain).items()
    }
    write_text(options.output / "merit.json", json.dumps(reports, indent=1))
    text = "\n".join(
        f"{table(name, report, list(texts))}\n{table_by_size(name, report, list(texts))}"
        for name, report in reports.items()
    )
    write_text(options.output / "merit.md", f"{text}\n{machine(options.threads)}")
    print(text)


if __name__ == "__main__":
    main()
