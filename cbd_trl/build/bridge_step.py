"""The first step of a chain whose source has another tokenizer: anchor zero, distilled across vocabularies."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.hooks import remove_hook_from_module
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures import is_tied
from cbd_trl.bridge.bridge import Bridge
from cbd_trl.build.arguments import check_chain_arguments, training_record
from cbd_trl.build.source_anchor import Head, head_record
from cbd_trl.build.special_tokens import SpecialTokens
from cbd_trl.build.training import ARGUMENTS, Trained, train, work_folder
from cbd_trl.chain.source import Source
from cbd_trl.trainers.bridge_config import BridgeDistillConfig
from cbd_trl.trainers.bridge_trainer import BridgeDistillTrainer
from cbd_trl.trainers.checkpointing import last_checkpoint
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.utils.datasets import sft_dataset
from cbd_trl.utils.formatting import anchor_name
from cbd_trl.utils.modeling import is_spread
from cbd_trl.utils.tokenizers import check_rows, tokenizer_difference, tokenizer_hash


@dataclass(frozen=True)
class BridgeStep:
    """How a chain comes from a source of another tokenizer, and of any architecture (see `build_chain`).

    The source teaches `model` by `BridgeDistillTrainer`. What it becomes is the largest anchor, "anchor zero", and its
    tokenizer is that of the whole chain.

    Args:
        model: anchor zero before it is trained, of a family that chains are built from: a model, a path or a Hub id.
            A new one, or one with a transplanted vocabulary; it is not changed. Where a run may be interrupted it is
            the same each time: saved, or made with a seed.
        processing_class: its tokenizer; by default the one it was saved with. Of a transplanted vocabulary that of
            `carry_over_special_tokens`.
        args: arguments of the training, among them `model_init_kwargs` to load `model` with; by default those of
            `BridgeDistillConfig`.
        dataset: text of its own, which calibrates it too; by default the chain's.
    """

    model: str | Path | PreTrainedModel
    processing_class: PreTrainedTokenizerBase | None = None
    args: BridgeDistillConfig | None = None
    dataset: Dataset | IterableDataset | None = None


@dataclass(frozen=True)
class _Sides:
    """Who learns from whom."""

    teacher: Source
    teacher_tokenizer: PreTrainedTokenizerBase
    # How it is loaded.
    teacher_options: dict[str, Any] | str | None
    student: Source
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens


def bridged_head(
    step: BridgeStep,
    origin: Source,
    source_tokenizer: PreTrainedTokenizerBase | None,
    chain_args: DistillConfig,
    dataset: Any,
    eval_dataset: Any,
    output_dir: Path,
    special: SpecialTokens,
) -> Head:
    """Anchor zero as it is to be made, checked.

    Args:
        step: what was asked for.
        origin: the source.
        source_tokenizer: the one given for the source.
        chain_args: of the chain; its `model_init_kwargs` load the source.
        dataset: of the chain.
        eval_dataset: evaluated on after training, if any.
        output_dir: the chain's folder.
        special: what the trainings of the chain make of its tokenizer.

    Raises:
        ValueError: the two models or tokenizers cannot be bridged, or need no bridge; the arguments name a teacher.
        TypeError: something is of the wrong type.
    """
    args = _checked_args(step, output_dir)
    student = Source(step.model, token=origin.token, role="model of the bridge")
    config, architecture = origin.config(), student.architecture()
    sides = _Sides(
        teacher=origin,
        teacher_tokenizer=origin.tokenizer_or(source_tokenizer),
        teacher_options=chain_args.model_init_kwargs,
        student=student,
        tokenizer=special.tokenizer(student.tokenizer_or(step.processing_class)),
        special=special,
    )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None:
        check_rows("source", rows, sides.teacher_tokenizer, "processing_class")
    check_rows(student.role, architecture.sizes["vocab"], sides.tokenizer, "processing_class")
    _check_apart(sides)
    known = student.record()
    told = {
        "student": known["source"],
        "student_weights_sha256": known["weights_sha256"],
        "source_tokenizer_sha256": tokenizer_hash(sides.teacher_tokenizer),
        ARGUMENTS: training_record(args),
    }
    record = {**head_record(origin, chain_args, special), "bridge": told}
    text = dataset if step.dataset is None else sft_dataset(step.dataset, "dataset of the bridge", args)
    settings = {**record, "tokenizer": tokenizer_hash(sides.tokenizer), "shape": architecture.shape}
    name = anchor_name(architecture.num_parameters)
    return Head(
        architecture=architecture,
        tokenizer=sides.tokenizer,
        special=special,
        args=args,
        dataset=text,
        record=record,
        sources=[sides.student, origin],
        doing=f"distilling {name} from the source, across tokenizers: {architecture.shape}",
        make=lambda label: _distil(work_folder(output_dir, name, settings), sides, args, text, eval_dataset, label),
    )


def _checked_args(step: Any, output_dir: Path) -> BridgeDistillConfig:
    if not isinstance(step, BridgeStep):
        raise TypeError(
            f"bridge is a {type(step).__name__}: a BridgeStep is needed, which says what the source teaches. Give "
            "bridge=BridgeStep(model, processing_class=tokenizer)."
        )
    args = BridgeDistillConfig(output_dir=str(output_dir)) if step.args is None else step.args
    if not isinstance(args, BridgeDistillConfig):
        raise TypeError(
            f"The args of the bridge are a {type(args).__name__}: a BridgeDistillConfig is needed, since the two "
            "models have tokens of their own. Give BridgeStep(model, args=BridgeDistillConfig(...))."
        )
    check_chain_arguments(args, "the bridge", "the teacher of its model is the source")
    return args


def _check_apart(sides: _Sides) -> None:
    """Refuse one tokenizer on both sides, and two that cannot be aligned."""
    one, other, names = sides.tokenizer, sides.teacher_tokenizer, ("the student's", "the source's")
    if tokenizer_difference(one, other, names=names, further_tokens="neither") is None:
        raise ValueError(
            f"The source and the model of the bridge have one tokenizer ({len(one)} tokens), so there is nothing to "
            "bridge. Leave `bridge` out: plain anchors are cut from the source. For a model of another family with "
            "this tokenizer use DistillTrainer, which compares every logit, and give what it trained as `source`."
        )
    Bridge(one, other)


def _distil(
    work: Path, sides: _Sides, args: BridgeDistillConfig, dataset: Any, eval_dataset: Any, label: str
) -> Trained:
    args = copy.deepcopy(args)
    args.output_dir = str(work)
    student: Any = sides.student.model(args.model_init_kwargs)
    if not isinstance(sides.student.place, str | Path):
        student = copy.deepcopy(student)
    if is_tied(student):
        # Two equal tables would be trained apart.
        student.get_output_embeddings().weight = student.get_input_embeddings().weight
    sides.special.follow(student, sides.tokenizer)
    # The tokenizer has it.
    args.chat_template_path = None
    # Text that the source wrote is all that "seqkd" asks of it.
    asked = not args.black_box
    with _left_as_it_is(sides.teacher.model(sides.teacher_options)) if asked else nullcontext() as teacher:
        trainer = BridgeDistillTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=sides.tokenizer,
            teacher_processing_class=sides.teacher_tokenizer if asked else None,
        )
        return train(trainer, student, last_checkpoint(work), label)


@contextmanager
def _left_as_it_is(model: Any) -> Iterator[PreTrainedModel]:
    """A teacher is placed, frozen and in eval mode; a model in memory is the caller's, who may go on training it."""
    training, learning = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, spread, attributes = model.device, is_spread(model), dict(vars(model))
    try:
        yield model
    finally:
        if not spread:
            # Of `teacher_offload`, which keeps the parameters in its hooks.
            remove_hook_from_module(model, recurse=True)
            model.to(device)
        # The trainer opens the forward, the accelerator casts in it and marks the model as prepared.
        vars(model).clear()
        vars(model).update(attributes)
        model.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
