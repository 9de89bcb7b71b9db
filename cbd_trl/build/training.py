"""One training of a build, resumable, in a work folder of its own."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import PreTrainedModel
from transformers.integrations import TensorBoardCallback, WandbCallback

from cbd_trl.architectures import architecture_of
from cbd_trl.build.arguments import changed_arguments, then_and_now
from cbd_trl.chain.cards import VALUES
from cbd_trl.chain.model import stock_model
from cbd_trl.trainers.callbacks import show_progress
from cbd_trl.trainers.checkpointing import last_checkpoint
from cbd_trl.utils.files import TEMPORARY, write_text, writing

# Folder of what is not finished, in the chain's.
WORK = ".work"
# Key of the training arguments among the settings of a training.
ARGUMENTS = "arguments"
# Version of a work folder's settings.
_FORMAT = 3
_LOGGED = ("loss", "kd", "ce", "hidden", "teacher_ce")
# Ends of the names of what an evaluation measures and chain.json records.
EVALUATED = ("loss", "_kd", "_ce", "_hidden")


@dataclass(frozen=True)
class Trained:
    """A model that is to be an anchor.

    Args:
        model: a stock causal LM.
        tokens_seen: tokens it was trained on here.
        losses: as an `Anchor` has them.
    """

    model: PreTrainedModel
    tokens_seen: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def work_folder(output_dir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Prepare the folder of an anchor's checkpoints. Checkpoints of other settings are never resumed.

    Args:
        output_dir: the chain's folder.
        name: of the anchor.
        settings: everything that decides the training, as JSON values; its arguments under "arguments" (see
            `training_record`).

    Raises:
        ValueError: there are checkpoints of other settings, which may be days of work.
    """
    work = output_dir / WORK / name
    state, file, settings = PartialState(), work / "settings.json", {"format": _FORMAT, **settings}
    there = _read_settings(file)
    # Through JSON and back: tuples are lists there.
    changed = _changed_settings(there, json.loads(json.dumps(settings)))
    if changed and (checkpoint := last_checkpoint(work)):
        values = [{**record, **(record.get(ARGUMENTS) or {}).get(VALUES, {})} for record in (there or {}, settings)]
        raise ValueError(
            f"{output_dir} holds an unfinished training of the anchor {name} ({Path(checkpoint).name}), begun with "
            f"other settings than those requested now; changed: {changed}{then_and_now(changed, *values)}. Request "
            f"those again to resume it; or delete {work} to train this anchor anew (finished ones stay); or "
            "choose another output_dir."
        )
    state.wait_for_everyone()
    if changed and state.is_main_process:
        with writing(work, "What was finished before stands."):
            _remove(work)
            work.mkdir(parents=True)
            write_text(file, json.dumps(settings))
    state.wait_for_everyone()
    return work


def begun_trainings(output_dir: Path) -> list[dict[str, Any]]:
    """Read the settings of the trainings in a chain's folder that are not finished."""
    found = [_read_settings(file) for file in sorted((output_dir / WORK).glob("*/settings.json"))]
    return [settings for settings in found if settings is not None]


def _read_settings(file: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        # Earlier versions recorded fewer settings.
        return found if isinstance(found, dict) and found.get("format") == _FORMAT else None
    return None


def _changed_settings(there: Any, now: Any) -> list[str]:
    """Names of settings that differ; nested ones as `outer.inner`."""
    if not isinstance(there, dict):
        return ["everything: the earlier settings are not recorded, or not all of them"]
    names = []
    for key in now.keys() | there.keys():
        one, other = there.get(key), now.get(key)
        if key == ARGUMENTS and isinstance(one, dict) and isinstance(other, dict):
            names += changed_arguments(one, other)
        elif isinstance(one, dict) and isinstance(other, dict):
            names += [f"{key}.{name}" for name in _changed_settings(one, other)]
        elif one != other:
            names.append(key)
    return sorted(names)


def remove_work_folder(output_dir: Path, name: str) -> None:
    """Remove an anchor's work folder, if there is one, once the anchor is stored."""
    work = output_dir / WORK / name
    if PartialState().is_main_process:
        _remove(work)
        with suppress(OSError):
            work.parent.rmdir()


def _remove(work: Path) -> None:
    """Rename, then delete, so that a work folder is whole or absent; leftovers of a killed run go too."""
    trash = work.parent / f"{TEMPORARY}{work.name}"
    shutil.rmtree(trash, ignore_errors=True)
    if work.exists():
        work.replace(trash)
        shutil.rmtree(trash, ignore_errors=True)


def train(
    trainer: Any,
    student: PreTrainedModel,
    checkpoint: str | None,
    label: str,
) -> Trained:
    """Train to the end, and evaluate where there is text for it.

    Args:
        trainer: a `DistillTrainer`.
        student: the model that it was given.
        checkpoint: to resume from; None to start.
        label: of the progress line.

    Returns:
        the trained model in eval mode, on the CPU, independent of the trainer.
    """
    architecture, dtype = architecture_of(student), student.dtype
    show_progress(trainer, label)
    work = Path(trainer.args.output_dir)
    with separate_run(trainer, work.name, work.parents[1]):
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = _last_losses(trainer.state.log_history)
        if trainer.eval_dataset is not None:
            losses |= {key: value for key, value in trainer.evaluate().items() if key.endswith(EVALUATED)}
    state = _whole_weights(trainer, architecture.state_shapes, dtype)
    model: Any = stock_model(architecture.config, state, dtype)
    model.generation_config = student.generation_config
    # Sorted by name: the log of a resumed run has them in another order.
    return Trained(model, trainer.tokens_seen, dict(sorted(losses.items())))


def _whole_weights(trainer: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The trained weights, on the CPU of every process."""
    accelerator = trainer.accelerator
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    if not sharded or accelerator.num_processes == 1:
        return {name: state[name].detach().cpu() for name in shapes}
    # Sharded weights are gathered in the main process alone.
    whole = {}
    for name, shape in shapes.items():
        if accelerator.is_main_process:
            tensor = state[name].detach().to(accelerator.device, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=accelerator.device)
        whole[name] = broadcast(tensor).cpu()
    return whole


def _last_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The latest value of each logged term."""
    losses: dict[str, float] = {}
    for entry in history:
        if "loss" not in entry:
            continue
        losses |= {key: value for key, value in entry.items() if key in _LOGGED}
    return losses


@contextmanager
def separate_run(trainer: Any, anchor: str, folder: Path) -> Iterator[None]:
    """Log one training as a run of its own.

    The run is named `run_name` (of the arguments) plus the anchor. TensorBoard files are kept beside the anchors
    unless TENSORBOARD_LOGGING_DIR is set, because the work folder is removed. A Weights & Biases run, which the
    Trainer leaves open, is finished here unless the caller had started it.

    Args:
        trainer: a `DistillTrainer` with arguments of its own.
        anchor: its name.
        folder: of the chain.
    """
    trainer.args.run_name = " ".join(filter(None, (trainer.args.run_name, anchor)))
    begun = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "runs" / anchor)
        if isinstance(callback, WandbCallback) and callback._wandb.run is None:
            begun.append(callback._wandb)
    code = 1
    try:
        yield
        code = 0
    finally:
        for wandb in begun:
            if wandb.run is not None:
                wandb.finish(exit_code=code)
