"""The part of a trainer that evaluates: every number is a mean over tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from cbd_trl.losses.objective import TERMS, TermWeights, combine
from cbd_trl.losses.reduction import normalize, sums_per_row
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.callbacks import TokenMeter
from cbd_trl.trainers.checkpointing import CheckpointTrainer


class EvaluationTrainer(CheckpointTrainer):
    """A trainer whose evaluation does not depend on how the rows are batched, packed or spread over processes."""

    _eval_meter: TokenMeter

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, in all processes."""
        raise NotImplementedError

    @property
    def _weights(self) -> TermWeights:
        raise NotImplementedError

    def _run(self, model: nn.Module, batch: Batch, with_logits: bool = False) -> dict[str, Tensor]:
        """Every term per token, and the logits if asked for; see `StepLoss`."""
        raise NotImplementedError

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One evaluation batch: its rows are added to the meter that `evaluation_loop` reads.

        Args:
            model: the student.
            inputs: as in `compute_loss`.
            prediction_loss_only: leave out logits and labels.
            ignore_keys: unused; logits are the only output.

        Returns:
            mean loss of the batch in nats, logits (B, T, V) or None, labels (B, T) or None.
        """
        batch = Batch.split(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._run(model, batch, with_logits=not prediction_loss_only)
        terms = {name: outputs[name] for name in TERMS if name in outputs}
        loss_N = combine(terms, self._weights)
        terms = {"loss": loss_N, **terms, "tokens": torch.ones_like(loss_N)}
        labels, lengths = batch.labels_BT, batch.row_lengths_R
        rows_RK = torch.stack([sums_per_row(term, labels, lengths) for term in terms.values()], dim=1)
        # Row by row, because the last batch is filled up with rows already seen, and gathering drops those.
        totals = dict(zip(terms, self.accelerator.gather_for_metrics(rows_RK).sum(0), strict=True))
        self._eval_meter.add(totals, totals.pop("tokens"))
        others = (None, None) if prediction_loss_only else (outputs["logits"], labels)
        return normalize(loss_N.sum(), loss_N.numel(), None), *others

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop, with every loss as a mean over tokens instead of a mean of batch means.

        Args:
            dataloader: of the evaluation set.
            description: shown while it runs.
            prediction_loss_only: leave out predictions.
            ignore_keys: unused.
            metric_key_prefix: put before every metric.

        Returns:
            predictions and metrics.
        """
        self._eval_meter = TokenMeter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not sharded:
            # accelerate 1.15 takes a model it evaluated for one that is wrapped already: training it afterwards would
            # be without DDP, each process on its own.
            vars(self.model).pop("_is_accelerate_prepared", None)
        metrics: Any = output.metrics
        for name, value in self._eval_meter.means().items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        metrics[f"{metric_key_prefix}_num_tokens"] = self.tokens_seen
        return output
