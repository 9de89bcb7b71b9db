"""Checkpoints that a crash left behind, and losses and weights that are no numbers."""

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from cbd_trl import DistillTrainer
from cbd_trl.trainers.checkpointing import last_checkpoint
from tests.tiny import tiny_model
from tests.trainers.bridge_runs import make_bridge
from tests.training import make_trainer, text_rows

SAVED = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def trainer(folder: Path, steps: int = 3, **options: Any) -> DistillTrainer:
    """A run of few steps, a checkpoint after each, in the middle of an epoch at its end."""
    rows = text_rows((3, 9, 5, 12) * 5)
    return make_trainer(train_dataset=rows, output_dir=str(folder), max_steps=steps, **{**SAVED, **options})


def parameters(run: DistillTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    (tmp_path / "checkpoint-4").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, parameters(resumed), parameters(whole)))
    assert resumed.state.log_history[:3] == whole.state.log_history[:3]


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* Leave resume_from_checkpoint out to begin"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resumed_at_the_end_no_step_is_taken(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    resumed = trainer(tmp_path)
    resumed.add_callback(Steps())
    resumed.train(resume_from_checkpoint=True)
    assert steps == [] and resumed.state.global_step == 3
    assert all(map(torch.equal, parameters(resumed), parameters(whole)))


def test_the_state_is_written_when_all_else_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that a checkpoint is whole, and an old one of the same name may not say it of a new one."""
    trainer(tmp_path, steps=1).train()
    checkpoint, flushed = tmp_path / "checkpoint-1", []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not (checkpoint / "trainer_state.json").exists()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    names = {file.name for file in checkpoint.iterdir()}
    trainer(tmp_path, steps=1).train()
    assert {*flushed} == names - {"trainer_state.json"} and {"model.safetensors", "optimizer.pt"} <= {*flushed}


class _Spoil(TrainerCallback):
    """Makes a number of the student NaN when a step begins."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[:] = self.value


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bridged", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run(bridged: bool, accumulation: int, tmp_path: Path) -> None:
    options = {**SAVED, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    if bridged:
        run: Any = make_bridge(output_dir=str(tmp_path), max_steps=4, **options)
    else:
        run = trainer(tmp_path, 4, **options)
    run.add_callback(_Spoil(2))
    message = r"loss of step 3 is nan \(not finite: .*kd.*\)\. Training stopped there.* last good checkpoint is "
    with pytest.raises(
        ValueError, match=message + r".*checkpoint-2\. Train with a lower learning_rate \(it is 0.01\)"
    ):
        run.train()
    assert run.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


class _OwnLoss(DistillTrainer):
    """A loss of the user's own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.sum() * math.nan


class _SpoiledLoss(DistillTrainer):
    """The trainer's loss, made into something else."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * math.nan


@pytest.mark.parametrize("kind", [_OwnLoss, _SpoiledLoss])
def test_the_loss_of_a_subclass_is_watched_too(kind: type[DistillTrainer], tmp_path: Path) -> None:
    run = trainer(tmp_path, 2, save_strategy="no")
    run.__class__ = kind
    with pytest.raises(ValueError, match=r"loss of step 1 is nan"):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_the_callbacks_can_be_pickled(tmp_path: Path) -> None:
    assert pickle.dumps(trainer(tmp_path).callback_handler.callbacks)


def test_a_teacher_that_is_not_finite_is_named(tmp_path: Path) -> None:
    teacher: Any = tiny_model("llama", seed=2)
    run = trainer(tmp_path, teacher=teacher)
    with torch.no_grad():
        teacher.model.norm.weight[0] = math.nan
    message = r"loss of step 1 is nan.*teacher's own loss \(teacher_ce\) is not finite either.*No checkpoint had been"
    with pytest.raises(ValueError, match=message):
        run.train()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM computes is not finite .* Load it from a good copy"):
        trainer(tmp_path, teacher=teacher)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A gradient may overflow where the loss did not: that step must not become the one to go on from."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                next(model.parameters()).grad[0, 0] = math.inf

    run = trainer(tmp_path)
    run.add_callback(Overflow())
    message = (
        r"After step 2 1 of the trained tensors are not finite \(.*embed_tokens.* first\).*good checkpoint is .*-1\."
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
