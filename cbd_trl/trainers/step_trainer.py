"""The part of a trainer that counts: the loss of a micro-batch as a share of its step, and what is logged of it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cbd_trl.losses.objective import TERMS, TermWeights
from cbd_trl.losses.reduction import count_scored, normalize
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.callbacks import TokenCounter, TokenMeter
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.evaluation_trainer import EvaluationTrainer


class StepTrainer(EvaluationTrainer):
    """A trainer whose loss is a mean over the scored tokens of an optimiser step, and so is what it logs.

    Neither depends on how the step is cut into micro-batches, packed or spread over processes.

    Args:
        args: as in `trl.SFTTrainer`.
        kwargs: as there.
    """

    args: DistillConfig
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer must count the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self._eval_meter = TokenMeter()
        self.add_callback(TokenCounter())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer.

        Args:
            args: as there.
            kwargs: as there.
        """
        self._seen.begin()
        return super().train(*args, **kwargs)

    @property
    def _weights(self) -> TermWeights:
        return self.args.weights(self.state.global_step / max(self.state.max_steps, 1))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimiser step, and how many tokens of them are scored.

        Counted here, because the stock count includes the first token of each row for models whose class name does not
        tell that they shift their labels (GPT-2), which would make the loss depend on packing.

        Args:
            epoch_iterator: of micro-batches.
            num_batches: how many to take.
            device: of the count.

        Returns:
            micro-batches, and the number of scored tokens that `compute_loss` divides by; none after the last step.
        """
        if self.state.global_step >= self.state.max_steps:
            # Resumed at the end: the Trainer would take one step more before it looks.
            self.control.should_training_stop = True
            return [], None
        batches, stock_count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or stock_count is None:
            return batches, stock_count
        count = count_scored(batches).to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, "sum") // self.get_tp_size()
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, as a share of its optimiser step.

        Args:
            model: the student, as wrapped for training.
            inputs: input_ids, labels, and attention_mask or position_ids; (B, T) each.
            return_outputs: also return the student's outputs.
            num_items_in_batch: scored tokens of the optimiser step; None for those of this micro-batch.

        Returns:
            scalar loss in nats, or (loss, outputs).
        """
        batch = Batch.split(inputs)
        outputs = self._run(model, batch, with_logits=return_outputs)
        scored = outputs["ce"].numel()
        if self.model.training:
            sums = {name: outputs[name].sum() for name in (*TERMS, "hybrid") if name in outputs}
            self._seen.terms.add(sums, torch.tensor(float(scored), device=outputs["ce"].device))
            self._seen.tokens += self.accelerator.reduce(batch.count_tokens(), "sum") // self.get_tp_size()
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        processes = self.accelerator.num_processes // self.get_tp_size() if shared else 1
        loss = normalize(outputs["total"], scored, num_items_in_batch, processes)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer. A loss that is not finite ends the run before the step changes a weight.

        One number an optimiser step is read from the device for it; the Trainer reads one a micro-batch, to leave such
        losses out of its logs (`logging_nan_inf_filter`).

        Args:
            args: as there.
            kwargs: as there.

        Raises:
            ValueError: the loss of the step is not finite, in whichever process.
        """
        loss = super().training_step(*args, **kwargs)
        total = self._seen.loss = self._seen.loss + loss
        if self.accelerator.sync_gradients:
            self._seen.loss = 0.0
            if not math.isfinite(value := self.accelerator.reduce(total, "sum").item()):
                raise ValueError(self._not_finite(value))
        return loss

    def _not_finite(self, loss: float) -> str:
        means = self._means_since_log()
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        teacher = " The teacher's own loss (teacher_ce) is not finite either: look at its weights and dtype first."
        return (
            f"The loss of step {self.state.global_step + 1} is {loss} (not finite: {', '.join(wrong) or 'the sum'}). "
            f"Training stopped there, since every later step would be lost.{teacher if 'teacher_ce' in wrong else ''} "
            f"{self._lost()}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms since the last training log.

        Args:
            logs: what the Trainer logs.
            start_time: of the training, in seconds.
        """
        # At the end of a training those of the steps since the last log, as in SFT.
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._means_since_log())
            logs["num_tokens"] = self.tokens_seen
        if "loss" in logs:
            logs.update(self._scheduled_weights())
        super().log(logs, start_time)

    def _means_since_log(self) -> dict[str, float]:
        return self._seen.terms.means(lambda sums: self.accelerator.reduce(sums, "sum"))

    def _scheduled_weights(self) -> dict[str, float]:
        # Logged once the step is counted: its own weights, so that they explain its loss.
        weights = self.args.weights((self.state.global_step - 1) / max(self.state.max_steps, 1))
        schedules = self.args.schedules().items()
        return {f"{term}_weight": getattr(weights, term) for term, how in schedules if how.shape != "constant"}

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, in all processes; of a resumed run, those before its checkpoint too."""
        return int(self._seen.tokens)

    @property
    def _seen(self) -> TokenCounter:
        # Looked up, because the Trainer may replace its callbacks by restored ones.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, TokenCounter))
