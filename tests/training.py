"""One optimizer step of a `DistillTrainer` on tiny models, and what it did."""

import os
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from cbd_trl import DistillConfig, DistillTrainer
from tests.tiny import own_names, tiny_model
from tests.tokenizer import tiny_tokenizer

LENGTHS = (3, 9, 5, 12)
# The Trainer makes its folder even if nothing is saved in it. Each of pytest-xdist's workers has its own.
OUTPUT = os.path.join(tempfile.gettempdir(), "cbd-trl-tests", os.environ.get("PYTEST_XDIST_WORKER", "alone"))


def text_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Dataset:
    """Rows of random words (an eos is added in training).

    Args:
        lengths: words of each row.
        seed: of the words.
    """
    generator = random.Random(seed)
    return Dataset.from_dict({"text": [" ".join(f"w{generator.randrange(54)}" for _ in range(n)) for n in lengths]})


def make_config(**overrides: Any) -> DistillConfig:
    """Float32 on the CPU, quiet, one step over four rows.

    Args:
        overrides: fields of `DistillConfig`; `output_dir` among them where anything is saved.
    """
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    step = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    defaults = {**quiet, **step, "output_dir": OUTPUT, "learning_rate": 1e-2, "max_length": 32}
    return DistillConfig(**{**defaults, **overrides})


def make_trainer(
    family: str = "llama", *, student: Any = None, teacher: Any = None, **overrides: Any
) -> DistillTrainer:
    """A student of 2 layers and a teacher of 4.

    Args:
        family: of both.
        student: instead of the tiny one.
        teacher: instead of the tiny one, which there is unless `overrides` name another teacher.
        overrides: fields of `DistillConfig`, or arguments of `DistillTrainer`.
    """
    depth = own_names(family, num_hidden_layers=2)
    names = (
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "block_map",
        "block_costs",
        "hybrid",
        "peft_config",
        "compute_metrics",
    )
    arguments: dict[str, Any] = {"train_dataset": text_rows(), "processing_class": tiny_tokenizer()}
    arguments |= {name: overrides.pop(name) for name in names if name in overrides}
    if teacher is None and not (overrides.get("self_distillation") or overrides.get("teacher_cache")):
        teacher = tiny_model(family, seed=2)
    return DistillTrainer(
        tiny_model(family, seed=1, **depth) if student is None else student,
        teacher,
        make_config(**overrides),
        **arguments,
    )


class _Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(trainer: DistillTrainer) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train for the configured steps.

    Returns:
        the first training log, and the gradients of the last step.
    """
    recorder = _Gradients()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer.state.log_history[0], {n.removeprefix("module."): g for n, g in recorder.grads.items()}


def assert_same_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Compare gradients by their norm: single elements near zero carry rounding noise alone."""
    assert ours.keys() == theirs.keys() and ours
    one, other = (torch.cat([g.flatten().double() for _, g in sorted(x.items())]) for x in (ours, theirs))
    assert (one - other).norm() <= rtol * other.norm(), ((one - other).norm() / other.norm()).item()
