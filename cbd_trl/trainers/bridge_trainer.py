"""Off-policy distillation across vocabularies: wiring only, the formulas are in `cbd_trl.bridge`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.objectives.cross_attention import CrossModelAttention
from cbd_trl.bridge.objectives.prefix import PrefixObjective, PrefixTable
from cbd_trl.bridge.objectives.registry import get_mixture, get_objective
from cbd_trl.bridge.objectives.shared_tokens import SharedTokens
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.teachers.local import Batch
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.bridge_data import CHAT, BridgeCollator, check_datasets, holds_chats, prepare_chats
from cbd_trl.trainers.bridge_teacher import (
    BridgeSetup,
    BridgeStepLoss,
    choose_hidden,
    set_up_black_box,
    set_up_bridge_teacher,
)
from cbd_trl.trainers.data import check_scored
from cbd_trl.trainers.distill_trainer import DistillTrainer
from cbd_trl.trainers.hidden_states import LayerPairs, Projectors
from cbd_trl.trainers.model_setup import TeacherModel, TeacherSetup
from cbd_trl.trainers.step_loss import SequenceLevelLoss, StepLoss
from cbd_trl.utils.teacher_rows import teacher_column


class BridgeProjectors(Projectors):
    """The projections of DSKD-CMA, and projectors of layers where there are any.

    Args:
        attention: of the objective.
        layers: of the hidden-state term, shared with it; None where it has none.
    """

    def __init__(self, attention: CrossModelAttention, layers: Projectors | None) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList() if layers is None else layers.layers
        self.attention = attention

    @property
    def names(self) -> list[str]:
        """As in `Projectors`."""
        return [*super().names, *(f"attention.{name}" for name, _ in self.attention.named_parameters())]


class BridgeDistillTrainer(DistillTrainer):
    """Trains a student to predict what a teacher of any architecture and tokenizer predicts of the same text.

    A `DistillTrainer`: the same data formats, arguments and guarantees. The teacher reads the student's texts in its
    own tokens, and the two are compared on groups of tokens of exactly the same bytes, by the objective of `args`.
    The loss is a sum over the scored tokens of the student, a value of a group standing on its first token, over their
    number. The first token of a text is never scored, as in SFT. Logged besides: `unaligned`, the share of scored
    tokens in no group, which are trained by cross-entropy alone; `teacher_ce` is what the groups cost the teacher, per
    token of the student. The teacher reads chats in its own template. With `objective="seqkd"` there is no teacher:
    the loss is the cross-entropy of the data, text that it wrote.

    Args:
        model: as in `DistillTrainer`.
        teacher_model: the teacher: a causal LM, or the path or Hub id of one. None: the one that `args` names.
        args: a `BridgeDistillConfig`.
        train_dataset: as in `DistillTrainer`.
        eval_dataset: likewise.
        processing_class: the student's tokenizer, which makes the data; None for the one it was saved with.
        teacher_processing_class: the teacher's tokenizer; None to look for it where the teacher was loaded from.
        block_map: as in `DistillTrainer`, of the hidden-state term.
        kwargs: as there.

    Raises:
        ValueError: if the two models or tokenizers cannot be compared as requested; the message has a way out.
            During the first step, if the teacher does worse than guessing on its own tokens.
        TypeError: if an argument has the wrong type.
    """

    _tag_names = ["trl", "cbd_trl", "bridge-distill"]
    _name = "BridgeDistill"
    _config = BridgeDistillConfig
    args: BridgeDistillConfig

    def _load_teacher(
        self, named: TeacherModel, student: Any, tokenizer: PreTrainedTokenizerBase | None
    ) -> TeacherSetup:
        if self.args.black_box:
            return set_up_black_box(student, tokenizer)
        return set_up_bridge_teacher(named, student, self.args, self.processing_class, tokenizer)

    def _settle_arguments(self, setup: TeacherSetup) -> dict[str, Any]:
        return {} if self.args.black_box else choose_hidden(self.args, self._student, setup.model, self.optimizer)

    def _make_projectors(self, setup: TeacherSetup, pairs: LayerPairs) -> Projectors | None:
        if "dskd-cma" not in self.args.objectives:
            return pairs.projectors
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "objective='dskd-cma' reads the input embeddings of both models, which FSDP and DeepSpeed shard. Use "
                "another objective, or train with DDP or one process."
            )
        models: Any = (self._student, setup.model)
        ours, theirs = (model.config.get_text_config().hidden_size for model in models)
        return BridgeProjectors(CrossModelAttention(ours, theirs, seed=self.args.seed), pairs.projectors)

    def _make_objective(self, setup: TeacherSetup) -> Any:
        if not isinstance(setup, BridgeSetup):
            return None
        args, weights = self.args, self.args.objectives
        tokenizers = setup.bridge.student.tokenizer, setup.bridge.teacher.tokenizer
        options: dict[str, Any] = {"temperature": args.temperature, "top_k": args.top_k}
        if args.divergence is not None:
            options["divergence"] = get_divergence(args.divergence, **args.divergence_options)
        if "prefix" in weights:
            table = PrefixTable.of(*tokenizers)
            return get_objective("prefix", table=table.to(self.accelerator.device), **options)
        if isinstance(self.projectors, BridgeProjectors):
            return get_objective("dskd-cma", attention=self.projectors.attention, **options)
        if "shared" in weights:
            options["tokens"] = SharedTokens.of(*tokenizers)
        return get_mixture(weights, **options)

    def _make_collator(self, setup: TeacherSetup, datasets: list[Any]) -> Any:
        if not isinstance(setup, BridgeSetup):
            return self.data_collator
        objective = self._objective
        table = objective.table.to(torch.device("cpu")) if isinstance(objective, PrefixObjective) else None
        collator = BridgeCollator(self.data_collator, setup.bridge, self.chat_template, table)
        check_datasets(collator, datasets)
        return collator

    def _loss_class(self) -> type[StepLoss]:
        return SequenceLevelLoss if self.args.black_box else BridgeStepLoss

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if (column := teacher_column(dataset)) is not None:
            raise ValueError(
                f"The {dataset_name} dataset has {column!r}, a prompt for the teacher alone, and a teacher with "
                "tokens of its own reads the student's texts. Use DistillTrainer, whose models share a tokenizer, or "
                "remove the column."
            )
        prepare = super()._prepare_dataset
        if args.black_box or not holds_chats(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def prepare_by(rows: Any, args: Any, packing: bool) -> Any:
            formatting = formatting_func if rows is dataset else None
            return prepare(rows, processing_class, args, packing, formatting, dataset_name)

        rows = prepare_chats(dataset, args, packing, prepare_by)
        check_scored(rows, args, dataset_name)
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if CHAT not in columns:
            columns.append(CHAT)

    def _compute_outputs(self, model: nn.Module, batch: Batch, with_logits: bool = False) -> dict[str, Tensor]:
        outputs = super()._compute_outputs(model, batch, with_logits)
        if isinstance(self._setup, BridgeSetup) and self._setup.watch.waiting:
            self._setup.watch.look(outputs["teacher_ce"].sum(), len(batch.teacher["teacher_plan"].teacher))
        return outputs
