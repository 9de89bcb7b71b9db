"""A model of another family and vocabulary, taught by SmolLM2-135M in every way, on equal tokens of real text.

    python -m benchmarks.bridge_real_text --teacher DIR --gsm8k gsm8k_train.jsonl --wikitext wikitext2_valid.txt \\
        --completions completions.jsonl --output runs/bridge

The student is a GPT-2 of 30M, untrained, with a byte-level BPE of 8192 tokens trained on the training text. Each run
sees as many of its own tokens, in batches of as many; learning rate and schedule are the same for all. Measured is the
held-out text of `benchmarks.real_text_chain`, in bits per byte, since two vocabularies cut it differently. `same-kd`
and `same-sft` train the same body with the teacher's vocabulary: what distillation gains where no bridge is needed.
Run again, it goes on at the first run that is not finished.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from benchmarks.real_text_chain import BLOCK_LENGTH, real_texts, split, training_dataset
from benchmarks.starts import WholeHead
from benchmarks.tables import machine, markdown
from cbd_trl import BridgeDistillConfig, BridgeDistillTrainer, DistillConfig, DistillTrainer
from cbd_trl.report.sweep import fingerprint
from cbd_trl.utils.files import Results, write_text

END = "<|endoftext|>"
VOCABULARY = 8192
# No row is seen twice, so nothing is dropped.
BODY = {
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": 512,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
# What a run is trained by: arguments of BridgeDistillConfig; None where there is no teacher. Each objective is alone
# but for the cross-entropy; "default" is what is used where no objective is given: "prefix", and the layers beside it.
OBJECTIVES = ("uld", "alm", "shared", "dskd-cma", "prefix")
RUNS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "seqkd": None,
    **{name: {"objective": name, "hidden_weight": 0.0} for name in OBJECTIVES},
    "default": {},
}
SAME = ("same-sft", "same-kd")


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE as GPT-2 has it, with a token for each digit as SmolLM2 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def make_student(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Untrained, one for each seed."""
    set_seed(seed)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **BODY)
    )


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 8
) -> float:
    """What the texts cost, each behind an end-of-text token.

    Args:
        model: on any device; put in eval mode.
        tokenizer: of the model.
        texts: no longer than the model's context.

    Returns:
        bits per byte of UTF-8, over all texts.
    """
    model.eval()
    nats, size = 0.0, sum(len(text.encode()) for text in texts)
    rows = [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    rows.sort(key=len)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[tokenizer.eos_token_id] * (longest - len(row))] for row in batch])
        labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in batch])
        mask = (torch.arange(longest) < torch.tensor([len(row) for row in batch])[:, None]).long()
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
        nats += cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(model.device), reduction="sum"
        ).item()
    return nats / size / math.log(2)


def measure_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]]
) -> dict[str, float]:
    """`bits_per_byte` of each of the texts, and their mean."""
    found = {name: bits_per_byte(model, tokenizer, rows) for name, rows in texts.items()}
    return {**found, "mean": sum(found.values()) / len(found)}


class Benchmark:
    """Texts, teacher and settings of all runs.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        texts = {name: split(rows) for name, rows in real_texts(options).items()}
        self.tokenizer = train_tokenizer([row for train, _ in texts.values() for row in train], VOCABULARY)
        self.teacher_tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        held_out, count = {name: rows for name, (_, rows) in texts.items()}, options.held_out_rows
        self.texts = {name: [row[:600] for row in rows[:count]] for name, rows in held_out.items()}
        # No setting was chosen by these.
        self.untouched = {name: [row[:600] for row in rows[count : 2 * count]] for name, rows in held_out.items()}
        self.results = Results(options.output / "results.json")

    def settings(self, seed: int) -> dict[str, Any]:
        """Arguments that all runs share."""
        return {
            "output_dir": str(self.options.output / "trainer"),
            "max_steps": self.options.steps,
            "learning_rate": self.options.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 10,
            "adam_beta2": 0.95,
            "per_device_train_batch_size": self.options.batch_size,
            "max_length": BLOCK_LENGTH,
            "packing": True,
            "packing_strategy": "wrapped",
            "gradient_checkpointing": False,
            "bf16": not self.options.fp32,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
        }

    def args(self, name: str, seed: int, objective: dict[str, Any] | None) -> Any:
        common = self.settings(seed)
        if name == "same-kd":
            return DistillConfig(**common, ce_weight=self.options.ce_weight)
        if objective is None:
            return DistillConfig(**common)
        return BridgeDistillConfig(**{"ce_weight": self.options.ce_weight, **common, **objective})

    def dataset(self, name: str, seed: int) -> Dataset:
        if name != "seqkd":
            return training_dataset(self.options, seed)
        rows = load_dataset("json", data_files=str(self.options.completions), split="train")
        texts = [row["prompt"] + row["completion"] for row in rows]
        return Dataset.from_dict({"text": texts}).shuffle(seed=seed)

    def train(self, name: str, seed: int, objective: dict[str, Any] | None) -> dict[str, Any]:
        same = name in SAME
        tokenizer = self.teacher_tokenizer if same else self.tokenizer
        student, dataset, args = (
            make_student(tokenizer, seed),
            self.dataset(name, seed),
            self.args(name, seed, objective),
        )
        shared: dict[str, Any] = {"args": args, "train_dataset": dataset, "processing_class": tokenizer}
        if name == "same-kd":
            trainer: Any = DistillTrainer(student, self.teacher(), **shared)
        elif objective is None:
            trainer = WholeHead(student, **shared)
        else:
            teacher_tokenizer = {"teacher_processing_class": self.teacher_tokenizer}
            trainer = BridgeDistillTrainer(student, self.teacher(), **teacher_tokenizer, **shared)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        texts = {"bits_per_byte": self.texts, "untouched": self.untouched}
        measured = {part: measure_texts(trainer.model, tokenizer, rows) for part, rows in texts.items()}
        if self.options.save:
            trainer.save_model(str(self.options.output / f"{name}-{seed}"))
        return {
            "run": name,
            "seed": seed,
            "seconds": seconds,
            **measured,
            "log": trainer.state.log_history,
        }

    def teacher(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.options.teacher, dtype=torch.bfloat16)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One run, or what is known of it."""
        objective = RUNS.get(name)
        names = ("steps", "batch_size", "learning_rate", "ce_weight", "fp32", "held_out_rows")
        settings = {each: getattr(self.options, each) for each in names}
        key = fingerprint(name, seed, objective, settings, "untouched")
        if self.results.get(key) is None:
            self.results.put(key, self.train(name, seed, objective))
        found = self.results.get(key)
        print(name, seed, {text: round(value, 4) for text, value in found["bits_per_byte"].items()},
              f"{found['seconds']:.0f} s", flush=True)  # fmt: skip
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `Benchmark`."""
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of batch-size rows")
    parser.add_argument("--batch-size", type=int, default=1, help=f"rows of {BLOCK_LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--ce-weight", type=float, default=1.0, help="of all runs with a teacher")
    parser.add_argument("--held-out-rows", type=int, default=100, help="of each text")
    parser.add_argument("--fp32", action="store_true", help="float32 instead of bf16 mixed precision")
    parser.add_argument("--threads", type=int, default=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--completions", type=Path, help="what `cbd-trl generate` wrote, for seqkd")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, *SAME], default=[*RUNS, *SAME], metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--save", action="store_true", help="keep the trained students")
    options = parser.parse_args()
    if "seqkd" in options.only and options.completions is None:
        parser.error("seqkd trains on text of the teacher: name it with --completions, or leave seqkd out of --only.")
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    found = [benchmark.run(name, seed) for seed in options.seeds for name in options.only]
    text = ""
    for part, title in (
        ("bits_per_byte", "held out"),
        ("untouched", "rows behind these, by which nothing was chosen"),
    ):
        lines = []
        for name in options.only:
            runs = [each[part] for each in found if each["run"] == name]
            numbers = (" / ".join(f"{run[text]:.3f}" for run in runs) for text in (*benchmark.texts, "mean"))
            lines.append([name, *numbers])
        text += f"{markdown([f'bits per byte, by seed: {title}', *benchmark.texts, 'mean'], lines)}\n"
    text += f"{machine(options.threads)}\n"
    write_text(options.output / "report.md", text)
    write_text(options.output / "report.json", json.dumps(found, indent=1))
    print(text)


if __name__ == "__main__":
    main()
