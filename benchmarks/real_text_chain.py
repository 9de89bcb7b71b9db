"""The chain of the model card: SmolLM2-135M on real text, 135M -> 85M (16 layers) -> 44M (384 wide), and the sizes
between.

    python benchmarks/real_text_chain.py --source DIR --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt
    --output runs/real

Builds the chain (resumes when run again), then measures every operator at every target on held-out text: the last
tenth of each of the two texts, which no anchor and no calibration saw.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from datasets import Dataset

from cbd_trl import DistillConfig, build_chain

ANCHORS = (
    {"num_hidden_layers": 16},
    {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024},
)


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


def training_dataset(gsm8k: list[str], wikitext: list[str], seed: int) -> Dataset:
    rows = Dataset.from_dict({"text": gsm8k + wikitext})
    return rows.shuffle(seed=seed)


def arguments(steps: int, learning_rate: float, seed: int, bf16: bool) -> DistillConfig:
    return DistillConfig(
        output_dir="unused",
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=10,
        adam_beta2=0.95,
        weight_decay=0.0,
        per_device_train_batch_size=4,
        max_length=256,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--depth-steps", type=int, default=250)
    parser.add_argument("--width-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="train in float32 instead of bf16 mixed precision")
    options = parser.parse_args()

    gsm8k, _ = split(gsm8k_rows(options.gsm8k))
    wikitext, _ = split(wikitext_rows(options.wikitext))
    steps = (options.depth_steps, options.width_steps)
    args = [arguments(n, rate, options.seed, not options.fp32) for n, rate in zip(steps, (4e-4, 6e-4), strict=True)]
    start = time.perf_counter()
    build_chain(
        options.source,
        [{**anchor, "args": one} for anchor, one in zip(ANCHORS, args, strict=True)],
        dataset=training_dataset(gsm8k, wikitext, options.seed),
        output_dir=options.output / "chain",
        args=args[0],
    )
    print(f"chain built in {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
