"""The chains of the model cards on real text, and the sizes between their anchors: of SmolLM2-135M 135M -> 85M (16
layers) -> 44M (384 wide), and those of `PLANS`.

    python -m benchmarks.real_text_chain --source DIR --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt
    --output runs/real

Builds the chain (resumes when run again), then measures every operator at every target on held-out text: the last
tenth of each of the two texts, which no anchor and no calibration saw. `benchmarks.merit` measures eta of its pairs.
`--plan gemma-270m --batch-size 2 --depth-steps 400 --width-steps 400` sees 204,800 tokens an anchor, and `--plan
qwen2.5-coder-0.5b --batch-size 2 --depth-steps 200 --optim adafactor` 102,400.
"""

import argparse
import itertools
import json
import lzma
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from benchmarks.held_out import HeldOut
from cbd_trl import Chain, DistillConfig, build_chain, from_chain
from cbd_trl.chain.measurements import measurements_table
from cbd_trl.report.measure import held_out_blocks
from cbd_trl.report.plots import plot_sweep
from cbd_trl.report.sweep import RANDOM, REPORTED, random_model
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.files import Results, write_text

BLOCK_LENGTH = 256
RESULTS = "results.json"
Fields = dict[str, int]


def _deep(*depths: int) -> list[Fields]:
    return [{"num_hidden_layers": depth} for depth in depths]


def _wide(*sizes: tuple[int, int], **fields: int) -> list[Fields]:
    """Targets of these widths and FFN widths."""
    return [{"hidden_size": width, "intermediate_size": ffn, **fields} for width, ffn in sizes]


@dataclass(frozen=True)
class RealChain:
    """The chain of a source: config fields of its anchors and of the targets between them.

    Args:
        title: the source, in the titles of pictures.
        anchors: the first differs from the source in depth, the second, if there is one, from the first in width.
        targets: {"depth", "width" and "both" (the last anchor straight from the source): largest first}.
        drawn: further ones, in the picture alone.
    """

    title: str
    anchors: list[Fields]
    targets: dict[str, list[Fields]]
    drawn: dict[str, list[Fields]] = field(default_factory=dict)


_SMOLLM2_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
PLANS = {
    # Widths are multiples of the 9 heads, which transformers requires of a Llama.
    "smollm2-135m": RealChain(
        "SmolLM2-135M",
        [
            {"num_hidden_layers": 16},
            {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024},
        ],
        {
            "depth": _deep(28, 24, 20, 18),
            "width": _wide((549, 1472), (504, 1344), (477, 1280), (432, 1152), **_SMOLLM2_HEADS),
            "both": [
                {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": ffn, **_SMOLLM2_HEADS}
                for depth, width, ffn in ((27, 540, 1440), (24, 504, 1344), (21, 468, 1248), (18, 423, 1120))
            ],
        },
        {"depth": _deep(26), "width": _wide((531, 1408), **_SMOLLM2_HEADS)},
    ),
    # 12 layers keep the pattern of layer types that llama.cpp counts on.
    "gemma-270m": RealChain(
        "Gemma 3 270M",
        [{"num_hidden_layers": 12}, {"hidden_size": 448, "intermediate_size": 1408}],
        {
            "depth": _deep(17, 16, 15, 14, 13),
            "width": _wide((608, 1920), (576, 1792), (544, 1664), (512, 1536), (480, 1472)),
        },
    ),
    "qwen2.5-coder-0.5b": RealChain(
        "Qwen2.5-Coder-0.5B",
        [{"num_hidden_layers": 16}],
        {"depth": _deep(23, 22, 20, 18, 17)},
    ),
}


def targets(plan: RealChain, one_step: bool) -> list[Fields]:
    """Config fields of the targets of a chain, with what they take over from its anchors, largest first."""
    if one_step:
        return plan.targets["both"]
    found = []
    for kind, inherited in (("depth", {}), ("width", plan.anchors[0])):
        of_kind = [{**inherited, **each} for each in (*plan.targets.get(kind, ()), *plan.drawn.get(kind, ()))]
        found += sorted(of_kind, key=lambda each: [-size for size in each.values()])
    return found


def gsm8k_rows(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def wikitext_rows(path: Path) -> list[str]:
    text = path.read_text()
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([,.])", r"\1", text)
    return [line.strip() for line in text.split("\n") if len(line) > 200]


def split(rows: list[str]) -> tuple[list[str], list[str]]:
    """Training rows and held-out ones: the last tenth."""
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def prose_rows(path: Path) -> list[str]:
    """The texts of JSON lines, also compressed with xz."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        return [json.loads(line)["text"] for line in file]


def real_texts(options: argparse.Namespace) -> dict[str, list[str]]:
    """All rows of the two texts; `options` has their files."""
    return {"GSM8K": gsm8k_rows(options.gsm8k), "WikiText-2": wikitext_rows(options.wikitext)}


def training_dataset(options: argparse.Namespace, seed: int) -> Dataset:
    """As many characters of each text, in an order of its own for each seed, without the held-out rows."""
    texts = [split(rows)[0] for rows in real_texts(options).values()]
    size = min(sum(map(len, rows)) for rows in texts)
    rows = [row for text in texts for row in _first_characters(text, size, seed)]
    return Dataset.from_dict({"text": rows}).shuffle(seed=seed)


def _first_characters(rows: list[str], size: int, seed: int) -> list[str]:
    """Rows in random order, up to `size` characters."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    ends = itertools.accumulate(map(len, shuffled))
    return [row for row, end in zip(shuffled, ends, strict=True) if end <= size]


def arguments(
    steps: int,
    learning_rate: float,
    swap: float | None,
    seed: int,
    bf16: bool,
    batch_size: int = 4,
    optim: str = "adamw_torch_fused",
) -> DistillConfig:
    return DistillConfig(
        output_dir="unused",
        max_steps=steps,
        learning_rate=learning_rate,
        swap_probability=swap,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=10,
        adam_beta2=0.95,
        weight_decay=0.0,
        optim=optim,
        per_device_train_batch_size=batch_size,
        max_length=BLOCK_LENGTH,
        packing=True,
        packing_strategy="wrapped",
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        seed=seed,
    )


def make_target(chain: Chain, fields: dict[str, int], operator: str) -> PreTrainedModel:
    if operator == RANDOM:
        return random_model(from_chain(chain, config=fields, operator="expand"))
    return from_chain(chain, config=fields, operator=operator)


def held_out_texts(texts: Mapping[str, list[str]], tokenizer: Any, count: int) -> dict[str, TokenBlocks]:
    """The first blocks of the held-out tenth of each text.

    Args:
        texts: {name: all its rows}.
        tokenizer: of the chain.
        count: of each text.
    """
    return {name: held_out_blocks(tokenizer, split(rows)[1], BLOCK_LENGTH, count) for name, rows in texts.items()}


def measure(chain: Chain, fields_of: list[dict[str, int]], held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """Every anchor and every operator at every target, on every text: `{text: report}` as `plot_sweep` takes it."""
    reports: dict[str, dict[str, Any]] = {name: {"anchors": [], "targets": []} for name in held_out.texts}
    for anchor in chain.anchors:
        found = held_out.anchor(anchor)
        entry = {"name": anchor.name, "shape": anchor.shape, "num_parameters": found["num_parameters"]}
        for text, report in reports.items():
            report["anchors"].append({**entry, "loss": found["loss"][text]})
    for fields in fields_of:
        made = {
            operator: held_out.target(chain, fields, operator, partial(make_target, chain, fields, operator))
            for operator in (*REPORTED, RANDOM)
        }
        first = made[REPORTED[0]]
        entry = {"num_parameters": first["num_parameters"], "shape": fields, "seconds": first["seconds"]}
        for text, report in reports.items():
            losses = {operator: found["loss"][text] for operator, found in made.items()}
            report["targets"].append({**entry, "loss": losses})
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="smollm2-135m", help="shapes of the chain of a source")
    parser.add_argument("--source", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--depth-steps", type=int, default=200)
    parser.add_argument("--width-steps", type=int, default=200)
    parser.add_argument("--depth-learning-rate", type=float, default=4e-4)
    parser.add_argument("--width-learning-rate", type=float, default=6e-4)
    parser.add_argument("--batch-size", type=int, default=4, help=f"rows of {BLOCK_LENGTH} tokens in a step")
    parser.add_argument("--optim", default="adamw_torch_fused", help="adafactor needs less memory")
    parser.add_argument("--plain", action="store_true", help="no hybrids, for comparison")
    parser.add_argument("--one-step", action="store_true", help="the narrower anchor straight from the source")
    parser.add_argument("--held-out-blocks", type=int, default=20, help=f"of {BLOCK_LENGTH} tokens, of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    if options.one_step and "both" not in plan.targets:
        parser.error(f"--one-step: the plan of {options.plan} has no targets that differ from the source in both.")

    anchors = [{**plan.anchors[0], **plan.anchors[1]}] if options.one_step else plan.anchors
    settings = [
        (options.depth_steps, options.depth_learning_rate),
        (options.width_steps, options.width_learning_rate),
    ]
    args = [
        arguments(
            steps, rate, 0.0 if options.plain else None, options.seed, not options.fp32, options.batch_size,
            options.optim,
        )
        for steps, rate in settings[-1 if options.one_step else 0 :][: len(anchors)]
    ]  # fmt: skip
    start = time.perf_counter()
    chain = build_chain(
        options.source,
        [{**anchor, "args": one} for anchor, one in zip(anchors, args, strict=True)],
        dataset=training_dataset(options, options.seed),
        output_dir=options.output / "chain",
        args=args[0],
    )
    print(f"chain built in {(time.perf_counter() - start) / 60:.1f} minutes")

    texts = held_out_texts(real_texts(options), chain.tokenizer(), options.held_out_blocks)
    held_out = HeldOut(texts, Results(options.output / RESULTS), not options.fp32)
    reports = measure(chain, targets(plan, options.one_step), held_out)
    write_text(options.output / "report.json", json.dumps(reports, indent=1))
    for name, report in reports.items():
        stem = options.output / name.lower().replace("-", "")
        plot_sweep(report, stem.with_suffix(".png"), title=f"{plan.title} chain, held-out {name}", formats=("png",))
        write_text(stem.with_suffix(".md"), measurements_table(report))
        print(f"{name}\n{measurements_table(report)}")


if __name__ == "__main__":
    main()
