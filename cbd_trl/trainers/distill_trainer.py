"""Off-policy distillation on SFT-shaped data: wiring only, the formulas are in `cbd_trl.losses`."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from cbd_trl.architectures.base import learned_positions
from cbd_trl.cache.reader import CachedTeacher
from cbd_trl.cards.card import save_card
from cbd_trl.cards.origin import Origin, origin_of
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.checks import (
    check_arguments,
    check_best_metric,
    check_hybrid,
    check_places,
    check_run,
    chosen_teacher,
)
from cbd_trl.trainers.collators import RowLengthsCollator
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.hidden_states import LayerPairs
from cbd_trl.trainers.hybrid import Hybrid, Pass
from cbd_trl.trainers.model_card import describe_model, describe_results, distillation_card
from cbd_trl.trainers.packing import attention_by_row, check_rows_apart
from cbd_trl.trainers.row_checks import check_end_token, check_ids, check_lengths, check_scored
from cbd_trl.trainers.step_loss import StepLoss
from cbd_trl.trainers.step_trainer import StepTrainer
from cbd_trl.trainers.student import find_student_tokenizer, load_student, student_loaded
from cbd_trl.trainers.teacher_setup import (
    TeacherModel,
    TeacherSetup,
    check_named_teachers,
    make_objective,
    read_from_cache,
    set_up_teacher,
)
from cbd_trl.utils.datasets import sft_dataset, sft_datasets, template_reads
from cbd_trl.utils.modeling import check_writes
from cbd_trl.utils.tokenizers import text_tokenizer, vocabulary_rows


class DistillTrainer(StepTrainer):
    """Trains a student on a dataset to predict what a teacher predicts.

    The loss is kd_weight x divergence + ce_weight x cross-entropy + hidden_weight x mean distance of the layers, each
    a mean over the scored tokens of the optimiser step: gradient accumulation, packing and the number of processes do
    not change it. The logits of a whole batch are never in memory. Logged at every log event, as means over the tokens
    since the last one: `kd`, `ce`, `hidden` (where weighted) and `teacher_ce` of the student; as in SFT, its `entropy`
    and `mean_token_accuracy`; where there are hybrids, `hybrid`, their whole loss, which is in `loss` too; the
    weights, where they have a schedule; and `num_tokens`, the tokens seen so far, each once and without padding.
    Evaluation reports the same of the student alone, prefixed `eval_`, as means over the tokens of the whole
    evaluation set.

    Args:
        model: the student: a causal LM, or the path or Hub id of one.
        teacher_model: the teacher, likewise, or a list of teachers. Given as a model it is frozen and put in eval
            mode.
            None: what `args` names: `teacher_model_name_or_path`, `teacher_cache` or `self_distillation`.
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
        hybrid: what is trained beside the student on hybrid steps; it draws them itself, on that share of the steps
            that `swap_probability` says. None: the student with blocks of the teacher.
        kwargs: everything else `trl.SFTTrainer` takes, `peft_config` among it, except `compute_loss_func`.

    Raises:
        ValueError: if the two models cannot be compared as asked; the message says what can be done.
        TypeError: if an argument has the wrong type.
    """

    _tag_names = ["trl", "cbd_trl", "distill"]
    _name = "Distill"
    _config: type[DistillConfig] = DistillConfig
    _step_loss: type[StepLoss] = StepLoss
    processing_class: Any

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
        check_places(
            type(self).__name__,
            model=model,
            teacher_model=teacher_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            teacher_processing_class=teacher_processing_class,
        )
        # Filled in below, and the same config may be used for another pair of models.
        args = self._config("distilled") if args is None else copy.copy(args)
        check_arguments(args, self._config, kwargs)
        check_best_metric(args, eval_dataset, kwargs.get("compute_metrics"))
        teacher_model = chosen_teacher(teacher_model, args)
        formatted = kwargs.get("formatting_func") is not None
        if train_dataset is not None:
            train_dataset = sft_dataset(train_dataset, "train_dataset", args, formatted=formatted)
        eval_dataset = sft_datasets(eval_dataset, "eval_dataset", args, formatted=formatted)
        check_named_teachers(teacher_model, args)
        student_name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        named = isinstance(model, str)
        if isinstance(model, str):
            model = load_student(model, args, kwargs.pop("quantization_config", None))
        else:
            check_writes(model, "student")
        if processing_class is None:
            processing_class = find_student_tokenizer(model, args, named)
        with student_loaded(model, args, named):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=text_tokenizer(processing_class),
                **kwargs,
            )
        check_run(self)
        check_hybrid(self, hybrid)
        student: Any = self.accelerator.unwrap_model(self.model)
        setup = self._set_up_teacher(teacher_model, student, text_tokenizer(teacher_processing_class))
        self._student = student.get_base_model() if hasattr(student, "get_base_model") else student
        self._pairs = LayerPairs(student, setup.model, block_map, block_costs, args, hybrid)
        if self._pairs.projectors is not None:
            self.projectors = self._pairs.projectors.to(self.accelerator.device)
        self._student_name, self._teacher_text = student_name, setup.text
        self._objective = self._make_objective(setup)
        self.teacher_model = setup.model
        self._teacher = setup.teacher
        self._teacher.place(self.accelerator, args.teacher_offload)

        if self.padding_free:
            self.data_collator = RowLengthsCollator(**vars(self.data_collator))
            self._check_rows_apart()
        evaluation = self.eval_dataset
        evaluated = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        datasets = {"train": self.train_dataset, **evaluated}
        for name, dataset in datasets.items():
            self._check_rows(dataset, name)
        self.data_collator = self._collator(setup, [*datasets.values()])

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        check_end_token(dataset, processing_class, args, dataset_name)
        own = formatting_func is not None
        with nullcontext() if own else template_reads(dataset, processing_class, args, f"the {dataset_name} dataset"):
            prepared = super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        check_scored(prepared, args, dataset_name)
        return prepared

    def _check_rows(self, dataset: Any, name: str) -> None:
        check_ids(dataset, vocabulary_rows(self._student), f"the student ({type(self._student).__name__})", name)
        for role, model in [("student", self._student), *(("teacher", one) for one in self._teacher.models)]:
            described = f"the {role} ({type(model).__name__})"
            check_lengths(dataset, learned_positions(model), self.args, self.padding_free, described, name)

    def _set_up_teacher(
        self, named: TeacherModel, student: Any, tokenizer: PreTrainedTokenizerBase | None
    ) -> TeacherSetup:
        return set_up_teacher(named, student, self.args, self.processing_class, tokenizer)

    def _make_objective(self, setup: TeacherSetup) -> Any:
        """What `_step_loss` compares the two models by."""
        return make_objective(self.args, setup.shared_rows)

    def _collator(self, setup: TeacherSetup, datasets: list[Any]) -> Any:
        """What makes the batches, from what SFT uses."""
        if not isinstance(setup.teacher, CachedTeacher):
            return self.data_collator
        return read_from_cache(setup.teacher, self.data_collator, datasets)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer.

        Args:
            args: as there.
            kwargs: as there.
        """
        with self._attention():
            return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `trl.SFTTrainer`, on the formats and with the checks of the trainer's own data sets.

        Args:
            eval_dataset: as there.
            args: as there.
            kwargs: as there.
        """
        formatted = self._formatting_func is not None
        eval_dataset = sft_datasets(eval_dataset, "eval_dataset", self.args, formatted=formatted)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `StepTrainer`.

        Args:
            dataloader: as there.
            args: as there.
            kwargs: as there.
        """
        dataset = getattr(dataloader, "dataset", None)
        if isinstance(dataset, Dataset):
            self._check_rows(dataset, "evaluation")
        with self._attention():
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _check_rows_apart(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # no model can be asked outside of a training step
        with self._attention():
            for model in (self._student, *self._teacher.models):
                check_rows_apart(model)

    def _attention(self) -> AbstractContextManager:
        # Elsewhere FlashAttention is there for packed rows, and a compiled graph would break at every row.
        if not self.padding_free or self.accelerator.device.type != "cpu" or self.args.torch_compile:
            return nullcontext()
        return attention_by_row([self._student, *self._teacher.models])

    def _run(self, model: nn.Module, batch: Batch, with_logits: bool = False) -> dict[str, Tensor]:
        """What `StepLoss` returns for a batch; on a step with a hybrid its loss is in the total, and is "hybrid"."""
        pairs = self._pairs
        with torch.no_grad(), pairs.teacher_outputs.recording() as teacher_states:
            signal = self._teacher.predict(batch, model)

        def forward(through: Pass, with_logits: bool) -> dict[str, Tensor]:
            with pairs.student_outputs.recording() as student_states:
                step_loss = self._step_loss(
                    student=through.model,
                    labels_BT=batch.labels_BT,
                    teacher=signal,
                    objective=self._objective,
                    weights=self._weights,
                    pairs=pairs,
                    student_states=student_states,
                    teacher_states=teacher_states,
                    chunk=self.args.loss_chunk_size,
                    with_logits=with_logits,
                )
                return through.run(**batch.inputs, inside=step_loss)

        student = Pass(self._student, model)
        if not self.model.training or pairs.hybrid is None:
            return forward(student, with_logits)
        # The student itself comes last: DDP takes the last pass for the one that says which parameters are used.
        beside = torch.zeros((), device=batch.labels_BT.device)
        with pairs.hybrid.at(self.state.global_step, student) as hybrid:
            if hybrid is not None:
                # A model that the accelerator has not prepared would run in its own dtype.
                with self.accelerator.autocast():
                    beside = forward(hybrid, False)["total"]
        outputs = forward(student, with_logits)
        return {**outputs, "total": outputs["total"] + beside, "hybrid": beside.detach()}

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the distilled model to the output folder, unless one that somebody edited is there.

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
            teacher=self._teacher_text,
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
