"""The part of a trainer that keeps its checkpoints fit to go on from, whenever it is killed."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cbd_trl.trainers.projector_trainer import ProjectorTrainer
from cbd_trl.utils.files import flush, writing


def last_checkpoint(folder: str | Path | None) -> str | None:
    """The newest whole checkpoint of a run; one that a killed process left half written is passed over.

    Args:
        folder: where a trainer saved; it need not exist.

    Returns:
        path of the checkpoint, or None.
    """
    found = Path(folder or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(path.name.rpartition("-")[2]): path for path in found if path.name.rpartition("-")[2].isdigit()}
    return next((str(steps[step]) for step in sorted(steps, reverse=True) if _is_whole(steps[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer's state is the last file written: a checkpoint has all others if it has this one, whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class CheckpointTrainer(ProjectorTrainer):
    """A trainer whose newest whole checkpoint is good: of finite weights, with the files of every process.

    `train(resume_from_checkpoint=True)` goes on from that one.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer.

        Args:
            resume_from_checkpoint: as there; True passes over a checkpoint that is not whole.
            args: as there.
            kwargs: as there.

        Raises:
            ValueError: there is no checkpoint; the loss or a weight is no longer finite.
            OSError: a checkpoint cannot be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no whole checkpoint in {self.args.output_dir} to go on from. Leave "
                    "resume_from_checkpoint out to begin at the first step."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _kept(self) -> str:
        """What a run that cannot go on leaves behind, as a sentence."""
        found = last_checkpoint(self.args.output_dir)
        return f"The last good checkpoint is {found}." if found else "No checkpoint had been written yet."

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing(folder, self._kept()):
            if self.args.should_save:
                # What an earlier run left under this name is not whole from here on.
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state of the Trainer comes next, and says that every process has written its part.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            flush(Path(output_dir))

    def _check_weights(self) -> None:
        """A checkpoint of weights that are no numbers would be the one to go on from."""
        model: Any = self.model
        wrong = [name for name, tensor in model.named_parameters() if tensor.requires_grad and not _finite(tensor)]
        count = torch.tensor(len(wrong), device=self.accelerator.device)
        if int(self.accelerator.reduce(count, "sum")):
            raise ValueError(
                f"After step {self.state.global_step} {len(wrong)} of the trained tensors are not finite"
                f"{f' ({wrong[0]} first)' if wrong else ''}: no checkpoint of them was written. {self._lost()}"
            )

    def _lost(self) -> str:
        """What is left of a run whose weights or loss are no longer finite, and what to do."""
        args = self.args
        return (
            f"{self._kept()} Train with a lower learning_rate (it is {args.learning_rate}) or max_grad_norm "
            f"({args.max_grad_norm}; 0 does not clip), or in bf16 or float32 if this is fp16."
        )


def _finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(local.detach().isfinite().all())
