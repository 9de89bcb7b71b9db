"""What a start is worth for further training: a 56M model begun in seven ways, its held-out loss against tokens.

    python -m benchmarks.start_for_training --chain runs/real/chain --gsm8k gsm8k_train.jsonl
    --wikitext wikitext2_valid.txt --output runs/start

The chain is that of `benchmarks.real_text_chain`, the text and its held-out tenth are the same. Six starts recover by
plain SFTTrainer (cross-entropy); `direct` is distilled from the source for as many tokens instead. After 10 warm-up
steps the learning rate is constant, so every point of a run is one to stop at. One rate for all that have learned
something, not tuned for any of them; one for scratch, which needs a larger one; one for `direct`, that of the chain's
first anchor. FLOPs: `benchmarks.flops`. Run again, it goes on at the first start that is not finished.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import SaveStrategy, SchedulerType

from benchmarks import flops
from benchmarks.curves import Point, mean_loss, measured_curve
from benchmarks.held_out import HeldOut
from benchmarks.real_text_chain import (
    BLOCK_LENGTH,
    arguments,
    held_out_texts,
    real_texts,
    training_dataset,
)
from benchmarks.start_report import (
    LABELS,
    MEAN,
    family_costs,
    family_table,
    loss_table,
    plot_curves,
    scratch_needs,
    scratch_table,
)
from benchmarks.starts import DIRECT, SCRATCH, STARTS, TARGET, make_start, own_trainer, sft_trainer
from benchmarks.tables import machine
from cbd_trl import Chain, DistillConfig
from cbd_trl.architectures.registry import describe_shape
from cbd_trl.report.sweep import fingerprint
from cbd_trl.utils.blocks import token_blocks
from cbd_trl.utils.files import Results, write_text

LONG = ("nested", SCRATCH)
POINTS = (0, 10_000, 25_000, 50_000, 75_000, 100_000, 150_000, 200_000, 300_000)
STEP_TOKENS = 4 * BLOCK_LENGTH


def point_steps(tokens: int) -> list[int]:
    """The optimizer steps after which a run of so many tokens is measured; the last one ends it."""
    return [round(point / STEP_TOKENS) for point in (*(point for point in POINTS if point < tokens), tokens)]


class Benchmark:
    """What all starts share: the chain, the text, the settings.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.chain = Chain.from_pretrained(options.chain)
        self.tokenizer = self.chain.tokenizer()
        self.dataset: Dataset = training_dataset(options, options.seed)
        self.texts = held_out_texts(real_texts(options), self.tokenizer, options.held_out_blocks)
        self.results = Results(options.output / "results.json")
        self.measure = HeldOut(self.texts, self.results, not options.fp32)

    def steps(self, name: str) -> list[int]:
        return point_steps(self.options.long_tokens if name in LONG else self.options.tokens)

    def learning_rate(self, name: str) -> float:
        own = {SCRATCH: self.options.scratch_learning_rate, DIRECT: self.options.direct_learning_rate}
        return own.get(name, self.options.learning_rate)

    def key(self, name: str) -> str:
        """Names everything that a start's curve depends on."""
        settings = [self.steps(name), self.learning_rate(name), self.options.seed, self.options.fp32, TARGET]
        files = [anchor.files for anchor in self.chain.anchors]
        return fingerprint(*(text.input_ids for text in self.texts.values()), files, name, settings)

    def args(self, name: str) -> DistillConfig:
        args = arguments(self.steps(name)[-1], self.learning_rate(name), 0.0, self.options.seed, not self.options.fp32)
        args.output_dir = str(self.options.output / "trainer" / self.key(name))
        args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.CONSTANT_WITH_WARMUP, {}
        args.save_strategy = SaveStrategy.NO
        return args

    def run(self, name: str) -> None:
        """Make one start, train it, keep its curve."""
        started, args = time.perf_counter(), self.args(name)
        trainer: Any
        if name == DIRECT:
            calibration = token_blocks(self.dataset, self.tokenizer, flops.CALIBRATION_TOKENS).input_ids
            trainer = own_trainer(self.chain.source, TARGET, args, self.dataset, self.tokenizer, calibration)
        else:
            model = make_start(name, self.chain, self.options.seed)
            trainer = sft_trainer(model, args, self.dataset, self.tokenizer)
        print(f"{LABELS[name]}: {trainer.model.num_parameters():,} parameters", flush=True)
        curve = measured_curve(trainer, self.steps(name), self.measure)
        seconds = round(time.perf_counter() - started, 1)
        self.results.put(self.key(name), {"start": name, "seconds": seconds, "curve": curve})

    def curves(self) -> dict[str, list[Point]]:
        """Of the starts that are finished."""
        found = {name: self.results.get(self.key(name)) for name in STARTS}
        return {name: value["curve"] for name, value in found.items() if value is not None}


def report(benchmark: Benchmark) -> None:
    """Write report.json, report.md and curves.png of what is measured so far."""
    options, anchors, curves = benchmark.options, benchmark.chain.anchors, benchmark.curves()
    parameters = [flops.counted_parameters(anchor.architecture()) for anchor in anchors]
    tokens = [anchor.tokens_seen for anchor in anchors]
    hybrids = [anchor.arguments.get("swap_probability", 0.0) for anchor in anchors]
    title = f"{describe_shape(TARGET)}: held-out loss against recovery tokens"
    names = ("tokens", "long_tokens", "held_out_blocks", "seed", "fp32")
    settings = {name: getattr(options, name) for name in names}
    settings["learning_rate"] = {name: benchmark.learning_rate(name) for name in curves}
    values: dict[str, Any] = {"target": TARGET, "settings": settings, "curves": curves}
    parts = [f"# {title}", machine(torch.get_num_threads()), f"Settings: `{json.dumps(settings)}`"]
    parts += [loss_table(curves, text) for text in (*benchmark.texts, MEAN)]
    if SCRATCH in curves:
        values["scratch_needs"] = scratch_needs(curves)
        parts += ["## Tokens that scratch needs (mean of the texts)", scratch_table(curves)]
    if "nested" in curves:
        last = [
            point for point in curves["nested"] if point["tokens"] <= point_steps(options.tokens)[-1] * STEP_TOKENS
        ]
        levels = {"`nested` untrained": last[0], f"`nested` after {last[-1]['tokens']:,} tokens": last[-1]}
        parts += [f"## FLOPs of a family\n\n{flops.__doc__}"]
        for what, point in levels.items():
            costs = family_costs(curves, mean_loss(point), parameters, tokens, hybrids)
            values.setdefault("family", {})[what] = costs
            parts += [f"To the mean loss of {what}, {mean_loss(point):.3f} nats:", family_table(costs)]
    write_text(options.output / "report.json", json.dumps(values, indent=1) + "\n")
    write_text(options.output / "report.md", "\n".join(f"{part.strip()}\n" for part in parts))
    plot_curves(curves, options.output / "curves.png", title)
    print((options.output / "report.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, required=True, help="folder of the built chain")
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="of recovery, of every start")
    parser.add_argument("--long-tokens", type=int, default=300_000, help=f"instead, of {' and '.join(LONG)}")
    parser.add_argument("--held-out-blocks", type=int, default=8, help=f"of {BLOCK_LENGTH} tokens, of each text")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--scratch-learning-rate", type=float, default=1e-3)
    parser.add_argument("--direct-learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=1, help="another one than the chain's, or it sees its order again")
    parser.add_argument("--only", nargs="+", choices=STARTS, default=STARTS, metavar="START", help=", ".join(STARTS))
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    for name in options.only:
        if benchmark.results.get(benchmark.key(name)) is None:
            benchmark.run(name)
    report(benchmark)


if __name__ == "__main__":
    main()
