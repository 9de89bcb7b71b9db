"""How near the straight line between two anchors do the models between them come?

    python -m benchmarks.merit --chain runs/real/chain --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt \\
        --output runs/merit

Each anchor of the chain is measured with the one above it, as a pair that differs in depth, in width or in both.
`benchmarks.real_text_chain` builds a chain with a pair of the first two kinds, and, with `--one-step`, one with a pair
of the third; its plans name the targets.

eta = sum over targets of (loss_S - loss_t) / (loss_S - loss_L), divided by the sum of (N_t - N_S) / (N_L - N_S): 1 on
the straight line in parameters from the smaller anchor S to the larger one L, 0 where all targets are as good as S.
On held-out text, for each text and for the mean of their losses; the first blocks of it may be skipped, and are what
the calibrated method calibrates on. Interrupted, it goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from benchmarks.real_text_chain import BLOCK_LENGTH, PLANS, RealChain, gsm8k_rows, split, wikitext_rows
from benchmarks.tables import machine, markdown
from cbd_trl import Chain, from_chain
from cbd_trl.chain.model import build_model
from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.report.sweep import fingerprint
from cbd_trl.shapes.cut import cut_architecture
from cbd_trl.targets.from_chain import load_pair
from cbd_trl.targets.operators import OPERATORS, Plan
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.files import Results, write_text

MEAN = "mean"
FROM_LAST, FROM_FIRST, CALIBRATED = "blocks from the last", "blocks from the first", "nested, calibrated"
METHODS = {
    "depth": ("nested", CALIBRATED, FROM_LAST, FROM_FIRST, "slice", "expand", "linear"),
    "width": ("nested", CALIBRATED, "slice", "expand", "linear"),
    "both": ("nested", CALIBRATED, "slice", "expand", "linear"),
}


def eta(smaller: float, larger: float, losses: Sequence[float], sizes: Sequence[float]) -> float:
    """The measure of merit.

    Args:
        smaller, larger: loss of the two anchors, nats per token.
        losses: of the targets.
        sizes: (N_t - N_S) / (N_L - N_S) of the targets, in (0, 1).

    Returns:
        1 on the straight line between the anchors.

    Raises:
        ValueError: the larger anchor is not the better one, so there is no line to be on.
    """
    if not larger < smaller:
        raise ValueError(
            f"The larger anchor's loss is {larger:.3f} and the smaller one's {smaller:.3f}: eta compares with what "
            "the larger one gains. Measure on text that it is better on."
        )
    return sum((smaller - loss) / (smaller - larger) for loss in losses) / sum(sizes)


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


class Merit:
    """Losses of anchors and targets, each measured once.

    Args:
        texts: {name: held-out text}.
        calibration: text for the calibrated method; no held-out row is in it.
        results: what is known already.
        key: of the chain and the texts.
        plan: names the targets.
        methods: those of `METHODS` to measure.
        bf16: whether forward passes run in bf16 mixed precision.
    """

    def __init__(
        self,
        texts: Mapping[str, TokenBlocks],
        calibration: Dataset,
        results: Results,
        key: str,
        plan: RealChain,
        methods: Sequence[str],
        bf16: bool,
    ) -> None:
        self.texts, self.calibration, self.results, self.key = texts, calibration, results, key
        self.plan, self.methods, self.bf16 = plan, methods, bf16

    def losses(self, name: str, build: Any) -> dict[str, Any]:
        """{"size": parameters, text: nats per token, "mean": over the texts}."""
        place = fingerprint(self.key, name)
        if self.results.get(place) is None:
            model = build()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                found = {text: held_out_loss(model, blocks) for text, blocks in self.texts.items()}
            print(name, {text: round(loss, 3) for text, loss in found.items()}, flush=True)
            found[MEAN] = sum(found.values()) / len(found)
            self.results.put(place, {"size": model.num_parameters(), **found})
        return self.results.get(place)

    def pair(self, name: str, chain: Chain) -> dict[str, Any]:
        """Everything about one pair: anchors, targets by method, eta by method and text."""
        large, small = (self.losses(f"anchor {anchor.name}", anchor.load_model) for anchor in chain.anchors)
        rows: dict[str, list[dict[str, Any]]] = {}
        for method in (method for method in METHODS[name] if method in self.methods):
            rows[method] = [
                self.losses(
                    f"{name} {fields} {method}", lambda f=fields, m=method: make(chain, f, m, self.calibration)
                )
                for fields in self.plan.targets[name]
            ]
        merits: dict[str, dict[str, float | None]] = {}
        for method, found in rows.items():
            sizes = [(row["size"] - small["size"]) / (large["size"] - small["size"]) for row in found]
            merits[method] = {
                text: eta(small[text], large[text], [row[text] for row in found], sizes)
                if large[text] < small[text]
                else None
                for text in (*self.texts, MEAN)
            }
        return {"large": large, "small": small, "targets": rows, "eta": merits}


def table(name: str, report: Mapping[str, Any], texts: Sequence[str]) -> str:
    """One pair as Markdown: losses text by text at every size, then eta."""
    sizes = [f"{row['size'] / 1e6:.1f}M" for row in next(iter(report["targets"].values()))]
    small, large = (report[end] for end in ("small", "large"))
    ends = [f"{small['size'] / 1e6:.1f}M (anchor)", f"{large['size'] / 1e6:.1f}M (anchor)"]
    lines = [
        [
            method,
            *(" / ".join(f"{row[text]:.3f}" for text in texts) for row in rows),
            " / ".join("-" if (merit := report["eta"][method][text]) is None else f"{merit:.2f}" for text in texts),
            f"{report['eta'][method][MEAN]:.2f}" if report["eta"][method][MEAN] is not None else "-",
        ]
        for method, rows in report["targets"].items()
    ]
    anchors = ", ".join(
        f"{end}: {' / '.join(f'{of[text]:.3f}' for text in texts)}"
        for end, of in zip(ends, (small, large), strict=True)
    )
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
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if CALIBRATED in options.methods and not options.skip_blocks:
        parser.error(f"{CALIBRATED!r} calibrates on the blocks that --skip-blocks skips: skip some, or leave it out.")
    chain = Chain.from_pretrained(options.chain)
    held_out = {
        "GSM8K": split(gsm8k_rows(options.gsm8k))[1],
        "WikiText-2": split(wikitext_rows(options.wikitext))[1],
    }
    skipped, count = options.skip_blocks, options.skip_blocks + options.held_out_blocks
    blocks = {name: held_out_blocks(chain.tokenizer(), rows, BLOCK_LENGTH, count) for name, rows in held_out.items()}
    texts = {
        name: dataclasses.replace(found, input_ids=found.input_ids[skipped:], labels=found.labels[skipped:])
        for name, found in blocks.items()
    }
    files = [anchor.files for anchor in chain.anchors]
    key = fingerprint(*(text.input_ids for text in texts.values()), files, options.fp32)
    # As much of each text in every part of it. On text that the anchors learned from, the smaller one looks too good.
    mixed = torch.stack([found.input_ids[:skipped] for found in blocks.values()], 1).flatten(0, 1)
    calibration = Dataset.from_dict({"input_ids": mixed.tolist()})
    results = Results(options.output / "results.json")
    merit = Merit(texts, calibration, results, key, PLANS[options.plan], options.methods, not options.fp32)
    reports = {name: merit.pair(name, pair) for name, pair in pairs_of(chain).items()}
    write_text(options.output / "report.json", json.dumps(reports, indent=1))
    text = "\n".join(table(name, report, list(texts)) for name, report in reports.items())
    write_text(options.output / "report.md", f"{text}\n{machine(options.threads)}")
    print(text)


if __name__ == "__main__":
    main()
