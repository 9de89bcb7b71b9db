"""A chain whose source has another tokenizer: SmolLM2-135M teaches a GPT-2 of 30M, and models below are made of it.

    python -m benchmarks.bridge_real_chain --teacher DIR --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt \\
        --output runs/bridge-chain

Tokenizer, texts and the bridge's training are those of `benchmarks.bridge_real_text`; below it are an anchor of fewer
layers and one of fewer channels, and a few sizes between, untrained. Resumes when run again.
"""

import argparse
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.bridge_real_text import BODY, Benchmark, add_arguments, make_student, measure_texts
from benchmarks.tables import machine, markdown
from cbd_trl import BridgeStep, Chain, DistillConfig, build_chain, from_chain
from cbd_trl.utils.files import write_text

ANCHORS: list[dict[str, Any]] = [
    {"n_layer": 5},
    {"n_layer": 5, "n_embd": 384, "n_head": 6},
]
TARGETS: list[dict[str, Any]] = [{"n_layer": 7}, {"n_layer": 6}, {"n_layer": 5, "n_embd": 448, "n_head": 7}]


def build(benchmark: Benchmark, seed: int) -> Chain:
    """The chain, bridge first."""
    options = benchmark.options
    student = options.output / "student"
    if not (student / "config.json").exists():
        make_student(benchmark.tokenizer, seed).save_pretrained(student)
        benchmark.tokenizer.save_pretrained(student)
    settings = dict(benchmark.settings(seed), save_strategy="steps", save_steps=100, save_total_limit=1)
    return build_chain(
        str(options.teacher),
        anchors=ANCHORS,
        dataset=benchmark.dataset("default", seed),
        output_dir=options.output / "chain",
        args=DistillConfig(
            **{**settings, "max_steps": options.anchor_steps, "ce_weight": options.ce_weight},
            model_init_kwargs={"dtype": "bfloat16"},
        ),
        bridge=BridgeStep(
            student, args=benchmark.args("default", seed, {"save_strategy": "steps", "save_steps": 100})
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--anchor-steps", type=int, default=300, help="of each anchor below the bridge")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    chain = build(benchmark, seed=0)
    lines, rows = [], []

    def measure(what: str, model: PreTrainedModel) -> None:
        found = measure_texts(model, benchmark.tokenizer, benchmark.texts)
        size = model.num_parameters()
        rows.append({"model": what, "parameters": size, "bits_per_byte": found})
        lines.append([what, f"{size / 1e6:.1f}M", *(f"{value:.3f}" for value in found.values())])
        print(*lines[-1], flush=True)

    for anchor in chain.anchors:
        measure(f"anchor {anchor.name}", anchor.load_model())
    for fields in TARGETS:
        shape = {"n_layer": BODY["n_layer"], "n_embd": BODY["n_embd"], **fields}
        measure(f"target {shape['n_layer']} x {shape['n_embd']}", from_chain(chain, config=fields))
    text = markdown(["bits per byte", "parameters", *benchmark.texts, "mean"], lines)
    write_text(options.output / "report.md", f"{text}\n{machine(options.threads)}\n")
    write_text(options.output / "report.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
