"""What every benchmark of `DistillTrainer` works on: SmolLM2-135M, a student of 16 of its layers, rows of GSM8K.

Token ids are made here, the same for every contestant: "Question: ...\\nAnswer: ..." and the end-of-text token.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cbd_trl.architectures import describe
from cbd_trl.chain.model import build_model
from cbd_trl.surgery.blocks import select_layers, spaced_layers
from cbd_trl.surgery.weights import weights_of

MAX_LENGTH = 512
# Two full packs are about 1k real tokens, and so are six rows of GSM8K (190 tokens each on average).
PACKS_PER_STEP = 2
ROWS_PER_STEP = 6
STUDENT_LAYERS = 16
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Workload:
    """The inputs of a run.

    Args:
        teacher: folder of the teacher and its tokenizer.
        gsm8k: the JSON lines of GSM8K's training set.
        output: folder of everything that is written.
        seed: of the order of the rows.
    """

    teacher: Path
    gsm8k: Path
    output: Path
    seed: int = 0

    @property
    def student(self) -> Path:
        """Folder of the untrained student."""
        return self.output / "student"

    def prepare(self) -> None:
        """Write the student, if it is not there yet."""
        if not (self.student / "config.json").exists():
            student = cut_student(self.teacher)
            student.save_pretrained(self.student)
            self.tokenizer().save_pretrained(self.student)

    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which is the student's too."""
        return AutoTokenizer.from_pretrained(self.teacher)

    def load_teacher(self) -> PreTrainedModel:
        """The teacher, frozen and in eval mode."""
        return load_model(self.teacher).eval().requires_grad_(False)

    def load_student(self) -> PreTrainedModel:
        """The student before training, in train mode."""
        return load_model(self.student).train()

    def token_rows(self, held_out: bool = False) -> list[list[int]]:
        """Token ids of every training row, or of the held-out ones: the last tenth of the file."""
        lines = [json.loads(line) for line in self.gsm8k.read_text(encoding="utf-8").splitlines()]
        cut = len(lines) * 9 // 10
        tokenizer = self.tokenizer()
        texts = [f"Question: {line['question']}\nAnswer: {line['answer']}{tokenizer.eos_token}" for line in lines]
        return tokenizer(texts[cut:] if held_out else texts[:cut], truncation=True, max_length=MAX_LENGTH)["input_ids"]

    def rows_for(self, steps: int) -> Dataset:
        """The first rows of the training set that fill the packs of so many optimizer steps.

        Args:
            steps: of `PACKS_PER_STEP` packs each.

        Returns:
            a dataset with the column input_ids.
        """
        rows = self.token_rows()
        wanted = PACKS_PER_STEP * steps
        count = ROWS_PER_STEP * steps // 2
        while len(packed(rows[:count])) < wanted:
            if count == len(rows):
                raise ValueError(f"{len(rows)} rows of GSM8K do not fill {steps} steps of 1k tokens: ask for fewer.")
            count += 1
        return Dataset.from_dict({"input_ids": rows[:count]})


def load_model(folder: Path) -> PreTrainedModel:
    """A float32 model whose weights are in memory, not mapped from the file, so that they count in full at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def cut_student(teacher: Path) -> PreTrainedModel:
    """A stock model of `STUDENT_LAYERS` of the teacher's layers, evenly spaced."""
    model = load_model(teacher)
    architecture = describe(model.config)
    kept = spaced_layers(architecture.depth, STUDENT_LAYERS)
    weights, smaller = select_layers(weights_of(model, architecture), architecture, kept)
    return build_model(smaller, weights, torch.float32)


def packed(rows: Sequence[Sequence[int]]) -> Dataset:
    """Rows packed as `packing=True` packs them: first fit of the longest, no row split."""
    disable_progress_bars()
    return pack_dataset(Dataset.from_dict({"input_ids": list(rows)}), MAX_LENGTH, "bfd")


def batches(rows: Dataset, tokenizer: Any, size: int, *, padding_free: bool) -> list[dict[str, torch.Tensor]]:
    """Batches as the trainers feed them, for the plain loops.

    Args:
        rows: dataset rows, or packs of them for padding-free batches.
        tokenizer: knows the padding token.
        size: rows or packs of a batch; an incomplete last batch is left out.
        padding_free: end to end with position ids instead of padded.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=padding_free)
    starts = range(0, len(rows) - size + 1, size)
    return [collate([rows[i] for i in range(start, start + size)]) for start in starts]


def trainer_settings(workload: Workload, steps: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Arguments that all trainers share: float32 on the CPU.

    Args:
        workload: of the run.
        steps: optimizer steps.
        micro_batch: rows or packs of one forward pass.
        accumulation: forward passes of an optimizer step.
    """
    return {
        **plain_settings(workload.output / "trainer", steps, micro_batch, accumulation),
        "max_length": MAX_LENGTH,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": workload.seed,
    }


def plain_settings(output: Path, steps: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Arguments of any trainer that is measured: AdamW without decay or clipping, nothing logged or saved.

    Args:
        output: the trainer's folder.
        steps: optimizer steps.
        micro_batch: rows or packs of one forward pass.
        accumulation: forward passes of an optimizer step.
    """
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the flags that make a `Workload`."""
    parser.add_argument("--teacher", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, kept between runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)


def workload_from(options: argparse.Namespace) -> Workload:
    """The workload that the flags of `add_inputs` name."""
    return Workload(options.teacher.resolve(), options.gsm8k.resolve(), options.output.resolve(), options.seed)


def environment(threads: int) -> dict[str, str]:
    """Environment of a child process: offline, so many threads."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
