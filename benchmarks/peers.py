"""The contestants of `distill_speed`: each trains the same student on the same rows for some optimizer steps.

ours            `DistillTrainer`: packing, forward KL + 0.5 cross-entropy.
trl-gkd         TRL's experimental `GKDTrainer(lmbda=0, beta=0)`: forward KL alone. It cannot pack: padded rows, dense
                logits. It is given the tokenized rows and TRL's own padding collator, so that it scores the same
                tokens as ours: all of them but the first of each row.
boomerang-loop  our re-implementation of the loop that arXiv 2510.05064 describes: CE + 0.1 KL + 2/L x the sum of the
                layers' cosine distances; dense logits, every hidden state of both models, padded rows, plain PyTorch.
ours-all-terms  `DistillTrainer` with these three terms.
bound           teacher forward with head (dropped), student forward with head and cross-entropy, backward, AdamW:
                nothing else, on the packs of ours.
sft             `trl.SFTTrainer` with packing: no teacher.
ours-cached     ours from a cache, no teacher in memory.

A step is 2 packs of at most 512 tokens, or 6 padded rows (`--rows-per-step`): about 1k real tokens. All take the same
rows in the same order, step by step the same packs or the same padded rows; 6 rows are a little more than 2 packs, so
that the padded contestants see the first rows again in their last steps, and with fewer `--rows` all do. Each runs
both ways, a step as `-1` forward pass and as `-2` of half of it (less padding, smaller masks), and the faster one
counts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.meter import Meter, real_tokens, train_metered
from benchmarks.workload import (
    LEARNING_RATE,
    PACKS_PER_STEP,
    ROWS_PER_STEP,
    Workload,
    batches,
    packed,
    trainer_settings,
)
from cbd_trl import DistillConfig, DistillTrainer
from cbd_trl.surgery.blocks import spaced_layers

BOOMERANG_KD_WEIGHT = 0.1
BOOMERANG_HIDDEN_WEIGHT = 2.0


@dataclass(frozen=True)
class Run:
    """The settings of a contestant.

    Args:
        workload: models and rows.
        warm_up: optimizer steps before timing begins.
        timed: optimizer steps after that.
        cache: folder of the teacher's cache, for the contestant that reads it.
        micro_batches: forward passes of an optimizer step: 1 or 2.
        rows: how many rows of GSM8K there are, gone over again; None for as many as the packs of all steps take.
        rows_per_step: of the padded contestants.
    """

    workload: Workload
    warm_up: int
    timed: int
    cache: Path | None = None
    micro_batches: int = 1
    rows: int | None = None
    rows_per_step: int = ROWS_PER_STEP

    def dataset(self) -> Dataset:
        """The rows that are trained on, as token ids."""
        if self.rows is None:
            return self.workload.rows_for(self.steps)
        return Dataset.from_dict({"input_ids": self.workload.token_rows()[: self.rows]})

    @property
    def steps(self) -> int:
        """All optimizer steps."""
        return self.warm_up + self.timed

    def settings(self, per_step: int) -> dict[str, Any]:
        """Of a trainer whose step is `per_step` rows or packs, taken in their order."""
        settings = trainer_settings(self.workload, self.steps, per_step // self.micro_batches, self.micro_batches)
        return {**settings, "train_sampling_strategy": "sequential"}


def _train_ours(run: Run, teacher: PreTrainedModel | None, **options: Any) -> dict[str, Any]:
    trainer = DistillTrainer(
        run.workload.load_student(),
        teacher,
        DistillConfig(**run.settings(PACKS_PER_STEP), packing=True, **options),
        run.dataset(),
        processing_class=run.workload.tokenizer(),
    )
    return train_metered(trainer, Meter(run.warm_up))


def ours(run: Run) -> dict[str, Any]:
    """Forward KL and cross-entropy with a local teacher."""
    return _train_ours(run, run.workload.load_teacher(), kd_weight=1.0, ce_weight=0.5)


def ours_all_terms(run: Run) -> dict[str, Any]:
    """The three terms of the Boomerang loop."""
    weights = {"kd_weight": BOOMERANG_KD_WEIGHT, "ce_weight": 1.0, "hidden_weight": BOOMERANG_HIDDEN_WEIGHT}
    return _train_ours(run, run.workload.load_teacher(), **weights)


def ours_cached(run: Run) -> dict[str, Any]:
    """As `ours`, from a cache."""
    return _train_ours(run, None, kd_weight=1.0, ce_weight=0.5, teacher_cache=str(run.cache))


def sft(run: Run) -> dict[str, Any]:
    """Plain SFT as TRL does it."""
    trainer = SFTTrainer(
        run.workload.load_student(),
        SFTConfig(**run.settings(PACKS_PER_STEP), packing=True),
        train_dataset=run.dataset(),
        processing_class=run.workload.tokenizer(),
    )
    return train_metered(trainer, Meter(run.warm_up))


def trl_gkd(run: Run) -> dict[str, Any]:
    """TRL's trainer for the same objective on a dataset."""
    tokenizer = run.workload.tokenizer()
    rows = run.dataset()
    # Whole steps alone: the last one of a pass would be smaller, and a pass has a step less than with packing.
    rows = rows.select(range(len(rows) // run.rows_per_step * run.rows_per_step))
    trainer = GKDTrainer(
        run.workload.load_student(),
        run.workload.load_teacher(),
        GKDConfig(**run.settings(run.rows_per_step), lmbda=0.0, beta=0.0, temperature=1.0),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
        train_dataset=rows.add_column("labels", rows["input_ids"][:]),
        processing_class=tokenizer,
    )
    return train_metered(trainer, Meter(run.warm_up))


def _plain_loop(
    run: Run,
    steps: list[list[dict[str, Tensor]]],
    loss_of: Callable[[PreTrainedModel, PreTrainedModel, dict[str, Tensor]], Tensor],
) -> dict[str, Any]:
    """AdamW over micro-batches; `loss_of` gives the sum over the scored tokens."""
    student, teacher = run.workload.load_student(), run.workload.load_teacher()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    meter = Meter(run.warm_up)
    meter.begin()
    for micro_batches in steps:
        scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            (loss_of(student, teacher, batch) / scored).backward()
            meter.tokens += real_tokens(batch)
        optimizer.step()
        optimizer.zero_grad()
        meter.step_done()
    return meter.result(student)


def _grouped(all_batches: list[Any], size: int, steps: int) -> list[list[Any]]:
    """Micro-batches of each step, going round again where a pass over the rows has fewer."""
    return [[all_batches[(step * size + i) % len(all_batches)] for i in range(size)] for step in range(steps)]


def _bound_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        teacher(**inputs, use_cache=False)
    logits_TV = student(**inputs, use_cache=False).logits[0]
    return F.cross_entropy(logits_TV[:-1], batch["labels"][0, 1:], reduction="sum")


def bound(run: Run) -> dict[str, Any]:
    """The least that distillation has to compute."""
    rows = packed(run.dataset()["input_ids"][:])
    found = batches(rows, run.workload.tokenizer(), PACKS_PER_STEP // run.micro_batches, padding_free=True)
    return _plain_loop(run, _grouped(found, run.micro_batches, run.steps), _bound_loss)


def _boomerang_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        taught = teacher(**inputs, use_cache=False, output_hidden_states=True)
    outputs = student(**inputs, use_cache=False, output_hidden_states=True)
    labels, scored = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    logits = outputs.logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    student_log, teacher_log = F.log_softmax(logits, -1), F.log_softmax(taught.logits[:, :-1], -1)
    kl = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    loss = loss + BOOMERANG_KD_WEIGHT * kl[scored].sum()
    layers = len(outputs.hidden_states) - 1
    cosines: Iterable[Tensor] = (
        # Entry 0 is the embedding, so layer i is entry i + 1 of either model.
        1 - F.cosine_similarity(outputs.hidden_states[i + 1], taught.hidden_states[kept + 1], dim=-1)[:, :-1][scored]
        for i, kept in enumerate(spaced_layers(len(taught.hidden_states) - 1, layers))
    )
    return loss + BOOMERANG_HIDDEN_WEIGHT / layers * torch.stack([cosine.sum() for cosine in cosines]).sum()


def boomerang_loop(run: Run) -> dict[str, Any]:
    """Our re-implementation of the loop that Boomerang distillation describes."""
    rows = run.dataset()
    micro_batch = run.rows_per_step // run.micro_batches
    found = batches(rows, run.workload.tokenizer(), micro_batch, padding_free=False)
    return _plain_loop(run, _grouped(found, run.micro_batches, run.steps), _boomerang_loss)


BOTH_WAYS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "ours": ours,
    "ours-all-terms": ours_all_terms,
    "ours-cached": ours_cached,
    "sft": sft,
    "trl-gkd": trl_gkd,
    "boomerang-loop": boomerang_loop,
    "bound": bound,
}
# With one forward pass of a step and with two.
CONTESTANTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    f"{name}-{passes}": lambda run, train=train, passes=passes: train(replace(run, micro_batches=passes))
    for name, train in BOTH_WAYS.items()
    for passes in (1, 2)
}
CACHED = ("ours-cached-1", "ours-cached-2")
