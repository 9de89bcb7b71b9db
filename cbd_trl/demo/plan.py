"""What the demo does, as data; the tests run the same code on a plan of seconds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cbd_trl.recipe.estimate import bf16_pays
from cbd_trl.report.sweep import SweepTarget, fingerprint
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.files import Results


@dataclass(frozen=True)
class Plan:
    """Anchors, targets and sizes of a demo.

    Args:
        anchors: config fields of the lower anchors, largest first.
        learning_rates: of each anchor's distillation.
        swap_probabilities: likewise, the share of its steps that have a hybrid beside them.
        targets: the sizes to make.
        saved: which target, counted from 0, is saved as a model folder.
        batch_size: packed rows in a step.
        max_length: tokens in a packed row.
        calibration_tokens: tokens behind each anchor's statistics.
        held_out_blocks: blocks that every loss is measured on.
        held_out_length: tokens in each of them.
        prompt: what every size is asked.
        answer_tokens: the most tokens of an answer.
        corpus_rows: rows of the corpus to use; None for all.
    """

    anchors: tuple[Mapping[str, int], ...]
    learning_rates: tuple[float, ...]
    swap_probabilities: tuple[float, ...]
    targets: tuple[SweepTarget, ...]
    saved: int
    batch_size: int = 4
    max_length: int = 256
    calibration_tokens: int = 8192
    held_out_blocks: int = 10
    held_out_length: int = 256
    prompt: str = "Give me three tips for a good night's sleep."
    answer_tokens: int = 40
    corpus_rows: int | None = None

    @property
    def name(self) -> str:
        """Tells apart plans whose results must not be mixed."""
        return fingerprint(asdict(self))


SMOLLM2 = Plan(
    anchors=(
        {"num_hidden_layers": 16},
        {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024},
    ),
    learning_rates=(4e-4, 6e-4),
    # A hybrid beside a step takes as long again, or longer.
    swap_probabilities=(0.25, 0.5),
    targets=(
        SweepTarget(config={"num_hidden_layers": 28}),
        SweepTarget(config={"num_hidden_layers": 24}),
        SweepTarget(config={"num_hidden_layers": 20}),
        SweepTarget(num_parameters=72e6),
        SweepTarget(num_parameters=60e6),
        SweepTarget(num_parameters=52e6),
    ),
    saved=4,
)


def default_steps(bf16: bool) -> int:
    """Optimiser steps per anchor that keep the demo within its minutes on two cores.

    Args:
        bf16: whether training runs in bf16 mixed precision.
    """
    return 70 if bf16 else 32


def training_args(plan: Plan, anchor: int, output: str, steps: int, seed: int, bf16: bool) -> DistillConfig:
    """The arguments of one anchor's distillation.

    Args:
        plan: the demo's plan.
        anchor: which lower anchor, counted from 0.
        output: the chain's folder.
        steps: optimiser steps.
        seed: of the order of the rows.
        bf16: mixed precision.
    """
    options: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": plan.batch_size,
        "max_length": plan.max_length,
        "packing": True,
        # Full rows: every step has the same number of tokens, and attention stays within 256 of them.
        "packing_strategy": "wrapped",
        "learning_rate": plan.learning_rates[anchor],
        "swap_probability": plan.swap_probabilities[anchor],
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, steps // 2),
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": bf16,
        # Activations fit, and recomputing them would cost a forward pass a step.
        "gradient_checkpointing": False,
        "seed": seed,
        "logging_steps": max(1, min(10, steps // 3)),
        "save_steps": max(10, -(-steps // 3)),
        "save_total_limit": 1,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    }
    return DistillConfig(output, **options)


@dataclass(frozen=True)
class Settings:
    """What the results of a demo depend on, besides its plan.

    Args:
        steps: optimiser steps per anchor.
        seed: of the distillation and of the random models.
        bf16: whether the anchors are distilled in mixed precision.
    """

    steps: int
    seed: int
    bf16: bool


def settle(results: Results, output: Path, plan: Plan, steps: int | None, seed: int | None) -> Settings:
    """The settings of the demo in a folder, or of a new one, which are then kept there.

    Args:
        results: of the demo.
        output: its folder.
        plan: anchors and targets.
        steps: asked for; None for those that are there, or what fits the machine.
        seed: likewise; None is 0 in a new demo.

    Raises:
        ValueError: for less than one step, or if the folder holds a demo with other settings.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: an anchor needs at least one step of distillation. Give 1 or more.")
    known = results.get("settings")
    if known is None:
        bf16 = bf16_pays()
        settings = Settings(default_steps(bf16) if steps is None else steps, seed or 0, bf16)
        results.put("settings", {**vars(settings), "plan": plan.name})
        return settings
    settings = Settings(known["steps"], known["seed"], known["bf16"])
    asked = {"--steps": (steps, settings.steps), "--seed": (seed, settings.seed)}
    changed = [f"{flag} {new} (there: {old})" for flag, (new, old) in asked.items() if new not in (None, old)]
    if known["plan"] != plan.name:
        changed.append("another plan")
    if changed:
        raise ValueError(
            f"{output} holds a demo with other settings than {', '.join(changed)}, and a chain is not built "
            "anew over another one. Choose another --output, or delete that folder."
        )
    return settings
