"""Off-policy distillation on SFT-shaped data: wiring only, the formulas are in `cbd_trl.losses`.

A subclass overrides the hooks, methods that return what `__init__` keeps: `_load_teacher`, `_settle_arguments`,
`_make_projectors`, `_make_objective`, `_make_collator`, `_loss_class`, `_student_pass` and `_models`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from cbd_trl.architectures.base import check_positions, learned_positions
from cbd_trl.cache.reader import CachedTeacher
from cbd_trl.cards.card import save_card
from cbd_trl.cards.origin import Origin, origin_of
from cbd_trl.losses.objective import TermWeights
from cbd_trl.losses.reduction import Scored, count_scored, normalize
from cbd_trl.teachers.local import Batch, causal_lm_of
from cbd_trl.trainers.callbacks import EvaluationMeter, TokenCounter
from cbd_trl.trainers.checkpointing import (
    check_optimizer,
    check_weights_finite,
    checkpoint_to_resume,
    writing_checkpoint,
)
from cbd_trl.trainers.checks import check_argument_types, check_best_metric, check_hybrid, check_run
from cbd_trl.trainers.data import (
    ScoredCollator,
    TeacherRowsCollator,
    check_end_token,
    check_ids,
    check_lengths,
    check_scored,
    read_from_cache,
)
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import (
    NAME,
    LayerPairs,
    Projectors,
    attached,
    load_projectors,
    without_projectors,
)
from cbd_trl.trainers.hybrid import Hybrid, Pass
from cbd_trl.trainers.model_card import describe_model, describe_results, distillation_card
from cbd_trl.trainers.model_setup import (
    TeacherModel,
    TeacherSetup,
    arguments_for_sft,
    make_objective,
    resolve_arguments,
    set_up_teacher,
)
from cbd_trl.trainers.packing import (
    PackingCollator,
    attention_within_rows,
    check_rows_apart,
    warn_of_dense_masks,
)
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.utils.datasets import sft_datasets, template_reads
from cbd_trl.utils.files import flush
from cbd_trl.utils.teacher_rows import (
    PLACES,
    READ,
    check_teacher_column,
    longest_teacher_row,
    prepare_for_both,
    teacher_column,
)
from cbd_trl.utils.tokenizers import text_tokenizer, vocabulary_rows


class DistillTrainer(SFTTrainer):
    """Trains a student on a dataset to predict what a teacher predicts.

    The loss is kd_weight x divergence + ce_weight x cross-entropy + hidden_weight x mean distance of the layers, each
    a mean over the scored tokens of the optimizer step: gradient accumulation, packing and the number of processes do
    not change it. The logits of a whole batch are never in memory. Logged at every log event, as means over the tokens
    since the last one: `kd`, `ce`, `hidden` (where weighted) and `teacher_ce` of the student; as in SFT, its `entropy`
    and `mean_token_accuracy`; where there are hybrids, `hybrid`, their whole loss, which is in `loss` too; the
    weights, where they have a schedule; and `num_tokens`, the tokens seen so far, each once and without padding.
    Evaluation reports the same of the student alone, prefixed `eval_`, as means over the tokens of the whole
    evaluation set.

    Args:
        model: the student: a causal LM, or the path or Hub id of one.
        teacher_model: the teacher, likewise, or a list of teachers, of whom the first one's layers are compared and
            swapped in. Given as a model it is frozen and put in eval mode. None: the one in `args`:
            `teacher_model_name_or_path`, `teacher_cache` or `self_distillation`.
        args: a `DistillConfig`.
        train_dataset: any dataset format of `trl.SFTTrainer`.
        eval_dataset: likewise, or a dict of them.
        processing_class: the tokenizer; None for the student's.
        teacher_processing_class: the teacher's tokenizer, only compared with the student's; None to look for it where
            the teacher was loaded from.
        block_map: for each student layer the consecutive teacher layers it stands for, used by the hidden-state term
            and hybrids. None: blocks as even as possible.
        block_costs: for each student layer what it costs that it stands for its block, in nats per token: in hybrids
            the costliest are swapped. None: the last ones.
        hybrid: what is trained beside the student on a share `swap_probability` of the steps, which it draws itself.
            None: the student with blocks of the teacher.
        kwargs: everything else `trl.SFTTrainer` takes, `peft_config` among it, except `compute_loss_func`.

    Raises:
        ValueError: if the two models cannot be compared as requested; the message has a way out.
        TypeError: if an argument has the wrong type.
    """

    _tag_names = ["trl", "cbd_trl", "distill"]
    _name = "Distill"
    _config: type[DistillConfig] = DistillConfig
    args: DistillConfig
    model: Any
    processing_class: Any
    projectors: Projectors | None = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: TeacherModel = None,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        block_map: list[list[int]] | None = None,
        block_costs: Sequence[float] | None = None,
        hybrid: Hybrid | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            "model": model,
            "teacher_model": teacher_model,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        check_argument_types(
            type(self).__name__, args=args, teacher_processing_class=teacher_processing_class, **given
        )
        # Filled in below, and the same config may be used for another pair of models.
        args = self._config("distilled") if args is None else copy.copy(args)
        run = resolve_arguments(args, self._config, others=kwargs, **given)
        with arguments_for_sft(run.model, args, run.loaded):
            super().__init__(
                model=run.model,
                args=args,
                train_dataset=run.train_dataset,
                eval_dataset=run.eval_dataset,
                processing_class=text_tokenizer(run.processing_class),
                **run.others,
            )
        # The Trainer must count the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.add_callback(TokenCounter())
        self._evaluation = EvaluationMeter()
        self._collated: tuple[Tensor, int, Scored] | None = None
        check_run(self)
        check_hybrid(self, hybrid)

        student: Any = self.accelerator.unwrap_model(self.model)
        self._student, self._student_name = causal_lm_of(student), run.name
        setup = self._load_teacher(run.teacher, student, text_tokenizer(teacher_processing_class))
        for argument, value in self._settle_arguments(setup).items():
            setattr(self.args, argument, value)
        check_best_metric(self.args, self.eval_dataset, self.compute_metrics)
        self._setup, self._teacher, self.teacher_model = setup, setup.teacher, setup.model
        self._pairs = LayerPairs(student, setup.model, block_map, block_costs, self.args, hybrid)
        projectors = self._make_projectors(setup, self._pairs)
        self.projectors = None if projectors is None else projectors.to(self.accelerator.device)
        self._objective = self._make_objective(setup)
        self._teacher.place(self.accelerator, self.args.teacher_offload)

        if self.padding_free:
            self._prepare_packing()
        datasets = self._datasets()
        for name, dataset in datasets.items():
            self._check_rows(dataset, name)
        self.data_collator = ScoredCollator(self._make_collator(setup, [*datasets.values()]))
        # Each process reads its own batches, as SFT has it for streams: accelerate cannot join or cut what is in them.
        self.accelerator.dataloader_config.dispatch_batches = False

    # Hooks

    def _load_teacher(
        self, named: TeacherModel, student: Any, tokenizer: PreTrainedTokenizerBase | None
    ) -> TeacherSetup:
        """Load and check the teacher; `tokenizer` is its own, where one was given."""
        return set_up_teacher(named, student, self.args, self.processing_class, tokenizer)

    def _settle_arguments(self, setup: TeacherSetup) -> dict[str, Any]:
        """Choose the values of arguments that were left open until both models are there."""
        return {}

    def _make_projectors(self, setup: TeacherSetup, pairs: LayerPairs) -> Projectors | None:
        """Make the maps that are trained beside the student, if there are any."""
        return pairs.projectors

    def _make_objective(self, setup: TeacherSetup) -> Any:
        """Make the loss terms on logits."""
        return make_objective(self.args, setup.shared_rows)

    def _make_collator(self, setup: TeacherSetup, datasets: list[Any]) -> Any:
        """Make the collator, around the one of SFT."""
        if isinstance(setup.teacher, CachedTeacher):
            return read_from_cache(setup.teacher, self.data_collator, datasets)
        return TeacherRowsCollator(self.data_collator)

    def _loss_class(self) -> type[StepLoss]:
        """Choose the loss that runs inside the student's forward."""
        return StepLoss

    def _student_pass(self, model: nn.Module) -> Pass:
        """Choose what a micro-batch runs through; `model` is the student as it is wrapped for training."""
        return Pass(self._student, model)

    @property
    def _models(self) -> list[Any]:
        """All models that read the rows, not wrapped."""
        return [self._student, *self._teacher.models]

    # Rows

    def _datasets(self) -> dict[str, Any]:
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        return {"train": self.train_dataset, **evaluated}

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        check_end_token(dataset, processing_class, args, dataset_name)
        own, name = formatting_func is not None, f"the {dataset_name} dataset"

        def prepare(rows: Any, args: Any, packing: bool) -> Any:
            return with_trl(rows, processing_class, args, packing, formatting_func, dataset_name)

        with_trl = super()._prepare_dataset
        with nullcontext() if own else template_reads(dataset, processing_class, args, name):
            if READ in get_dataset_column_names(dataset):
                prepared = dataset  # evaluated once more
            elif teacher_column(dataset) is None:
                prepared = prepare(dataset, args, packing)
            else:
                check_teacher_column(dataset, args, name, own, self.completion_only_loss)
                prepared = prepare_for_both(dataset, args, packing, prepare, processing_class, name)
        check_scored(prepared, args, dataset_name)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (READ, PLACES) if name not in columns]

    def _check_rows(self, dataset: Any, name: str) -> None:
        own_prompts = dataset is not None and READ in get_dataset_column_names(dataset)
        if (column := teacher_column(dataset)) is not None and not own_prompts:
            raise ValueError(
                f"The {name} dataset has {column!r} and is not prepared (skip_prepare_dataset): the teacher would not "
                "read it. Leave skip_prepare_dataset out, or remove the column."
            )
        check_ids(dataset, vocabulary_rows(self._student), f"the student ({type(self._student).__name__})", name)
        # A student that teaches itself is no model beside it.
        teachers = self._teacher.models or [one for one in (self._setup.model,) if own_prompts and one is not None]
        for role, model in [("student", self._student), *(("teacher", one) for one in teachers)]:
            described, positions = f"the {role} ({type(model).__name__})", learned_positions(model)
            if role == "student" or not own_prompts:
                check_lengths(dataset, positions, self.args, self.padding_free, described, name)
            elif positions is not None:
                row = f"What the teacher reads of a row of the {name} dataset"
                check_positions(longest_teacher_row(dataset), positions, row, described, "Shorten its prompts.")

    def _prepare_packing(self) -> None:
        self.data_collator = PackingCollator(**vars(self.data_collator), with_bounds=not self.args.torch_compile)
        warn_of_dense_masks(self._models, self.args.torch_compile)
        self._check_rows_apart()

    def _check_rows_apart(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # sharded models run within a training step alone
        with self._attention(), self.accelerator.autocast():
            for model in self._models:
                check_rows_apart(model)

    def _attention(self) -> AbstractContextManager:
        if not self.padding_free or self.args.torch_compile:  # a graph would be compiled for each pack's rows
            return nullcontext()
        return attention_within_rows(self._models)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: as there; True passes over a checkpoint that is not whole.
            args: as there.
            kwargs: as there.

        Raises:
            ValueError: there is no checkpoint; an optimizer that is there already does not have the projectors; the
                loss or a weight is no longer finite.
            OSError: a checkpoint cannot be written.
        """
        self._counter.begin()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir)
        with self._attention(), self._with_projectors():
            check_optimizer(self.optimizer, self._own_projectors)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Take the micro-batches of one optimizer step, and count their scored tokens.

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
            count = self._sum(count) // self.get_tp_size()
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch; `TokenCounter` watches its loss, which a subclass may compute in another way.

        Args:
            args: as in the Trainer.
            kwargs: as there.
        """
        loss = super().training_step(*args, **kwargs)
        self._counter.loss = self._counter.loss + loss.detach()
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # A subclass that changes rows or labels in compute_loss finds tensors alone.
        inputs = super()._prepare_inputs(inputs)
        if "scored" in inputs:
            self._collated = inputs["labels"], inputs["labels"]._version, inputs.pop("scored")
        return inputs

    def _with_scored(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add the scored positions that the collator found, if the labels are still those that it found them in."""
        if self._collated is None:
            return inputs
        labels, version, scored = self._collated
        return {**inputs, "scored": scored} if inputs["labels"] is labels and labels._version == version else inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch, as a share of its optimizer step.

        Args:
            model: the student, as wrapped for training.
            inputs: input_ids, labels, and attention_mask or position_ids; (B, T) each.
            return_outputs: also return the student's outputs.
            num_items_in_batch: scored tokens of the optimizer step; None for those of this micro-batch.

        Returns:
            scalar loss in nats, or (loss, outputs).
        """
        batch = Batch.split(self._with_scored(inputs))
        outputs = self._compute_outputs(model, batch, with_logits=return_outputs)
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        processes = self.accelerator.num_processes // self.get_tp_size() if shared else 1
        loss = normalize(outputs["total"], outputs["ce"].numel(), num_items_in_batch, processes)
        if self.model.training:
            self._counter.add(outputs, self._sum(batch.count_tokens()) // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _compute_outputs(self, model: nn.Module, batch: Batch, with_logits: bool = False) -> dict[str, Tensor]:
        """Compute the terms of a batch (see `StepLoss`); the loss of a hybrid is in "total", and apart in "hybrid"."""
        pairs, device = self._pairs, batch.labels_BT.device
        with torch.no_grad(), pairs.teacher_outputs.recording(device) as teacher_states:
            predicted = self._teacher.predict(batch, model)

        def forward(through: Pass, with_logits: bool) -> dict[str, Tensor]:
            with pairs.student_outputs.recording(device) as student_states:
                step_loss = self._loss_class()(
                    student=through.model,
                    labels_BT=batch.labels_BT,
                    scored=batch.scored,
                    teacher_scored=batch.for_teacher.scored,
                    teacher=predicted,
                    objective=self._objective,
                    weights=self._weights,
                    pairs=pairs,
                    student_states=student_states,
                    teacher_states=teacher_states,
                    chunk=self.args.loss_chunk_size,
                    with_logits=with_logits,
                )
                return through.run(**batch.inputs, inside=step_loss)

        student = self._student_pass(model)
        if not self.model.training or pairs.hybrid is None:
            return forward(student, with_logits)
        # The student itself comes last: DDP takes the parameters of the last pass for those that are used.
        beside = torch.zeros((), device=device)
        with pairs.hybrid.at(self.state.global_step, student) as hybrid:
            if hybrid is not None:
                # A model that the accelerator has not prepared would run in its own dtype.
                with self.accelerator.autocast():
                    beside = forward(hybrid, False)["total"]
        outputs = forward(student, with_logits)
        return {**outputs, "total": outputs["total"] + beside, "hybrid": beside.detach()}

    @property
    def _weights(self) -> TermWeights:
        return self.args.weights(self.state.global_step / max(self.state.max_steps, 1))

    def _sum(self, tensor: Tensor) -> Any:
        return self.accelerator.reduce(tensor, "sum")

    # Logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms since the last training log.

        Args:
            logs: what the Trainer logs.
            start_time: of the training, in seconds.
        """
        # At the end of a training those of the steps since the last log, as in SFT.
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._counter.terms.means(self._sum))
            logs["num_tokens"] = self.tokens_seen
        if "loss" in logs:
            # Logged once the step is counted: its own weights, so that they explain its loss.
            progress = (self.state.global_step - 1) / max(self.state.max_steps, 1)
            logs.update(self.args.scheduled_weights(progress))
        super().log(logs, start_time)

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, in all processes; of a resumed run, those before its checkpoint too."""
        return int(self._counter.tokens)

    @property
    def _counter(self) -> TokenCounter:
        # Looked up, because the Trainer may replace its callbacks by restored ones.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, TokenCounter))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `trl.SFTTrainer` does, on the formats and with the checks of the trainer's own datasets.

        Args:
            eval_dataset: as there.
            args: as there.
            kwargs: as there.
        """
        formatted = self._formatting_func is not None
        eval_dataset = sft_datasets(eval_dataset, "eval_dataset", self.args, formatted=formatted)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the stock loop, with every loss as a mean over tokens instead of a mean of batch means.

        Args:
            dataloader: of the evaluation set.
            description: shown while it runs.
            prediction_loss_only: leave out predictions.
            ignore_keys: unused.
            metric_key_prefix: put before every metric.

        Returns:
            predictions and metrics.
        """
        dataset = getattr(dataloader, "dataset", None)
        if isinstance(dataset, Dataset):
            self._check_rows(dataset, "evaluation")
        self._evaluation = EvaluationMeter()
        with self._attention():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not sharded:
            # accelerate 1.15 takes a model it evaluated for one that is wrapped already: training it afterwards would
            # be without DDP, each process on its own.
            vars(self.model).pop("_is_accelerate_prepared", None)
        metrics: Any = output.metrics
        metrics.update(self._evaluation.metrics(metric_key_prefix))
        metrics[f"{metric_key_prefix}_num_tokens"] = self.tokens_seen
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Evaluate one batch, whose rows are added to the means of `evaluation_loop`.

        Args:
            model: the student.
            inputs: as in `compute_loss`.
            prediction_loss_only: leave out logits and labels.
            ignore_keys: unused; logits are the only output.

        Returns:
            mean loss of the batch in nats, logits (B, T, V) or None, labels (B, T) or None.
        """
        batch = Batch.split(self._with_scored(self._prepare_inputs(inputs)))
        # A student that was not trained yet is not prepared: it would run in its own dtype.
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            outputs = self._compute_outputs(model, batch, with_logits=not prediction_loss_only)
        loss_N = self._evaluation.add(outputs, batch, self._weights, self.accelerator.gather_for_metrics)
        others = (None, None) if prediction_loss_only else (outputs["logits"], batch.labels_BT)
        return normalize(loss_N.sum(), loss_N.numel(), None), *others

    # Saving: projectors are a submodule of the student while it trains, so that the optimizer, DDP and FSDP treat them
    # as its parameters, and no part of it once it is saved.

    def _with_projectors(self) -> AbstractContextManager:
        student: Any = self.accelerator.unwrap_model(self.model)
        if self.projectors is None or hasattr(causal_lm_of(student), NAME):
            return nullcontext()
        return attached(student, self.projectors)

    @property
    def _own_projectors(self) -> Projectors | None:
        """The projectors, where checkpoints hold them in a file of ours; FSDP and DeepSpeed hold them in theirs."""
        return None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.projectors

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the student alone, as the Trainer does.

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
        check_weights_finite(self.model, self.accelerator, self.args, self.state.global_step)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_checkpoint(folder, self.args, self._own_projectors):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state of the Trainer comes next, and stands for every process having written its part.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            flush(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._own_projectors is not None:
            load_projectors(self._own_projectors, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._own_projectors is not None:
            assert self.state.best_model_checkpoint is not None
            load_projectors(self._own_projectors, self.state.best_model_checkpoint)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the distilled model to the output folder, unless somebody has edited the one there.

        Args:
            model_name: title of the card; None for the name of the output folder.
            dataset_name: Hub id of the training data.
            tags: added to those of the trainer.
        """
        if not self.is_world_process_zero():
            return
        name, output_dir = self._student_name, str(self.args.output_dir)
        own = ["generated_from_trainer", *self._tag_names]
        best_step = self.state.best_global_step if self.args.load_best_model_at_end else None
        card = distillation_card(
            trainer=self._config.trainer,
            title=model_name or Path(output_dir).resolve().name,
            hub_model_id=self.hub_model_id,
            dataset=dataset_name,
            student=describe_model(self.model, name),
            teacher=self._setup.description,
            origin=self._student_origin,
            is_adapter=self._student is not self.accelerator.unwrap_model(self.model),
            args=self.args,
            tokens=self.tokens_seen,
            # An upload hands over the tags of the model, which are the trainer's once more.
            tags=[*dict.fromkeys(own + ([tags] if isinstance(tags, str) else list(tags or [])))],
            results=describe_results(self.state.log_history, best_step),
        )
        save_card(Path(output_dir), card)

    @cached_property
    def _student_origin(self) -> Origin:
        """Looked up once: a card is written at every checkpoint."""
        return origin_of(self._student_name)
