"""Checkpoints that a run can resume from, whenever it is killed: whole, of finite weights, with learned projectors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cbd_trl.trainers.hidden_states import Projectors, save_projectors
from cbd_trl.utils.files import writing


def last_checkpoint(folder: str | Path | None) -> str | None:
    """Find the newest whole checkpoint of a run; one that a killed process left half written is passed over.

    Args:
        folder: where a trainer saved; it need not exist.

    Returns:
        path of the checkpoint, or None.
    """
    found = Path(folder or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(path.name.rpartition("-")[2]): path for path in found if path.name.rpartition("-")[2].isdigit()}
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if _is_whole(steps[step])), None)


def checkpoint_to_resume(folder: str | Path | None) -> str:
    """Find the newest whole checkpoint of a run, which has to have one.

    Args:
        folder: where a trainer saved.

    Raises:
        ValueError: it has none.
    """
    found = last_checkpoint(folder)
    if found is None:
        raise ValueError(
            f"There is no whole checkpoint in {folder} to resume from. Leave resume_from_checkpoint out to begin at "
            "the first step."
        )
    return found


@contextmanager
def writing_checkpoint(folder: Path, args: TrainingArguments, projectors: Projectors | None) -> Iterator[None]:
    """Within it the Trainer writes a checkpoint, which counts as whole only once all of it is there.

    Args:
        folder: of the checkpoint.
        args: of the run.
        projectors: to be kept in a file beside the student; None where there are none, or the student's own files
            hold them.

    Raises:
        OSError: it cannot be written; the message names the checkpoint that is left.
    """
    with writing(folder, _describe_last(args)):
        if args.should_save:
            # What an earlier run left under this name is not whole from here on.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if projectors is not None:
                # Before the rest: the Trainer also uploads the checkpoint and removes old ones.
                save_projectors(projectors, folder)
        yield


def check_weights_finite(model: nn.Module, accelerator: Accelerator, args: TrainingArguments, step: int) -> None:
    """Check the trained weights before they become the checkpoint that a run resumes from.

    Args:
        model: the student, possibly sharded.
        accelerator: of the run; all its processes have to call this.
        args: of the run.
        step: optimizer steps done.

    Raises:
        ValueError: a weight is not finite, in whichever process.
    """
    wrong = [name for name, tensor in model.named_parameters() if tensor.requires_grad and not _is_finite(tensor)]
    count: Any = accelerator.reduce(torch.tensor(len(wrong), device=accelerator.device), "sum")
    if int(count):
        raise ValueError(
            f"After step {step} {len(wrong)} of the trained tensors are not finite"
            f"{f' ({wrong[0]} first)' if wrong else ''}: no checkpoint of them was written. {after_divergence(args)}"
        )


def after_divergence(args: TrainingArguments) -> str:
    """Describe what is left of a run whose weights or loss are no longer finite, and what to change.

    Args:
        args: of the run.
    """
    return (
        f"{_describe_last(args)} Train with a lower learning_rate (it is {args.learning_rate}) or max_grad_norm "
        f"({args.max_grad_norm}; 0 does not clip), or in bf16 or float32 if this is fp16."
    )


def check_optimizer(optimizer: torch.optim.Optimizer | None, projectors: Projectors | None) -> None:
    """Check that an optimizer which is there already trains the projectors.

    Args:
        optimizer: of the trainer; None where `train` makes it.
        projectors: None where there are none, or where FSDP or DeepSpeed has replaced their parameters.

    Raises:
        ValueError: it does not have them.
    """
    if optimizer is None or projectors is None:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in trained for parameter in projectors.parameters()):
        raise ValueError(
            "The trainer has an optimizer already, which does not hold the projectors: they would never be "
            "trained. Let `train` make it (set trainer.optimizer to None), of the class given as "
            "`optimizer_cls_and_kwargs`."
        )


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer's state is the last file written: a checkpoint has all others if it has this one, whole.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _describe_last(args: TrainingArguments) -> str:
    found = last_checkpoint(args.output_dir)
    return f"The last good checkpoint is {found}." if found else "No checkpoint had been written yet."


def _is_finite(tensor: Any) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(local.detach().isfinite().all())
