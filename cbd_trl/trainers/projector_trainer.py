"""The part of a trainer that keeps learned projectors with the student while it trains, and out of it elsewhere."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from cbd_trl.trainers.hidden_states import (
    NAME,
    Projectors,
    attached,
    load_projectors,
    save_projectors,
    without_projectors,
)


class ProjectorTrainer(SFTTrainer):
    """An SFTTrainer that may have projectors.

    While it trains they are a submodule of the student: the optimiser, DDP and FSDP treat them as its parameters.
    Checkpoints hold them in a file of their own (those of FSDP and DeepSpeed in their own format), and no saved
    student does.
    """

    projectors: Projectors | None = None

    def _with_projectors(self) -> AbstractContextManager:
        student: Any = self.accelerator.unwrap_model(self.model)
        base = student.get_base_model() if hasattr(student, "get_base_model") else student
        if self.projectors is None or hasattr(base, NAME):
            return nullcontext()
        return attached(student, self.projectors)

    @property
    def _own_file(self) -> bool:
        return self.projectors is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer.

        Args:
            args: as there.
            kwargs: as there.

        Raises:
            ValueError: for an optimizer that does not know the projectors.
        """
        with self._with_projectors():
            self._check_optimizer()
            return super().train(*args, **kwargs)

    def _check_optimizer(self) -> None:
        # FSDP and DeepSpeed replace parameters: there is no telling which one is which.
        if self.optimizer is None or not self._own_file:
            return
        assert self.projectors is not None
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in trained for parameter in self.projectors.parameters()):
            raise ValueError(
                "The trainer has an optimizer already, which does not hold the projectors: they would never be "
                "trained. Let `train` make it (set trainer.optimizer to None), of the class given as "
                "`optimizer_cls_and_kwargs`."
            )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer: the student alone.

        Args:
            args: as there.
            kwargs: as there.
        """
        # FSDP has flattened them together with the student, and finds its parameters by name.
        with self._with_projectors():
            super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, None if state_dict is None else without_projectors(state_dict))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._own_file and self.args.should_save:
            assert self.projectors is not None
            # Before the rest: the stock method also uploads the checkpoint and removes old ones.
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_projectors(self.projectors, os.path.join(self._get_output_dir(trial=trial), checkpoint))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._own_file:
            assert self.projectors is not None
            load_projectors(self.projectors, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._own_file:
            assert self.projectors is not None and self.state.best_model_checkpoint is not None
            load_projectors(self.projectors, self.state.best_model_checkpoint)
