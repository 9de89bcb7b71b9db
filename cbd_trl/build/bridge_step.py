"""Anchor zero of a chain whose source has another tokenizer: a model distilled across vocabularies."""

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
from cbd_trl.build.source_anchor import SourceAnchor, source_record
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
    """Start a chain from a source with another tokenizer or architecture (see `build_chain`).

    `BridgeDistillTrainer` distills the source into `model`, which becomes the largest anchor, "anchor zero". Its
    tokenizer is that of the whole chain.

    Args:
        model: anchor zero before training, of a supported family: a model, a path or a Hub id. A new model, or one
            with a transplanted vocabulary; it is not changed. To resume an interrupted run it must be the same each
            time: saved, or made with a seed.
        processing_class: its tokenizer; by default the one it was saved with. Of a transplanted vocabulary that of
            `carry_over_special_tokens`.
        args: arguments of the training, among them `model_init_kwargs` to load `model` with; by default those of
            `BridgeDistillConfig`.
        dataset: text to train and calibrate it on; by default the chain's.
    """

    model: str | Path | PreTrainedModel
    processing_class: PreTrainedTokenizerBase | None = None
    args: BridgeDistillConfig | None = None
    dataset: Dataset | IterableDataset | None = None


@dataclass(frozen=True)
class _Models:
    """The teacher and the student of the bridge, with their tokenizers."""

    teacher: Source
    teacher_tokenizer: PreTrainedTokenizerBase
    # Its `from_pretrained` arguments.
    teacher_options: dict[str, Any] | str | None
    student: Source
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens


def plan_bridged_anchor(
    step: BridgeStep,
    origin: Source,
    source_tokenizer: PreTrainedTokenizerBase | None,
    chain_args: DistillConfig,
    dataset: Any,
    eval_dataset: Any,
    output_dir: Path,
    special: SpecialTokens,
) -> SourceAnchor:
    """Plan and check anchor zero.

    Args:
        step: the bridge requested.
        origin: the source.
        source_tokenizer: the one passed for the source, if any.
        chain_args: of the chain; its `model_init_kwargs` load the source.
        dataset: of the chain.
        eval_dataset: evaluated after training, if any.
        output_dir: the chain's folder.
        special: special tokens that trainings of the chain set.

    Raises:
        ValueError: the two models or tokenizers cannot be bridged, or need no bridge; or the arguments name a teacher.
        TypeError: an argument has the wrong type.
    """
    args = _checked_args(step, output_dir)
    student = Source(step.model, token=origin.token, role="model of the bridge")
    config, architecture = origin.config(), student.architecture()
    models = _Models(
        teacher=origin,
        teacher_tokenizer=origin.tokenizer_or(source_tokenizer),
        teacher_options=chain_args.model_init_kwargs,
        student=student,
        tokenizer=special.tokenizer(student.tokenizer_or(step.processing_class)),
        special=special,
    )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None:
        check_rows("source", rows, models.teacher_tokenizer, "processing_class")
    check_rows(student.role, architecture.sizes["vocab"], models.tokenizer, "processing_class")
    _check_apart(models)
    known = student.record()
    bridge_record = {
        "student": known["source"],
        "student_weights_sha256": known["weights_sha256"],
        "source_tokenizer_sha256": tokenizer_hash(models.teacher_tokenizer),
        ARGUMENTS: training_record(args),
    }
    record = {**source_record(origin, chain_args, special), "bridge": bridge_record}
    text = dataset if step.dataset is None else sft_dataset(step.dataset, "dataset of the bridge", args)
    settings = {**record, "tokenizer": tokenizer_hash(models.tokenizer), "shape": architecture.shape}
    name = anchor_name(architecture.num_parameters)
    return SourceAnchor(
        architecture=architecture,
        tokenizer=models.tokenizer,
        special=special,
        args=args,
        dataset=text,
        record=record,
        sources=[models.student, origin],
        description=f"distilling {name} from the source, across tokenizers: {architecture.shape}",
        make=lambda label: _distil(work_folder(output_dir, name, settings), models, args, text, eval_dataset, label),
    )


def _checked_args(step: Any, output_dir: Path) -> BridgeDistillConfig:
    if not isinstance(step, BridgeStep):
        raise TypeError(
            f"bridge is a {type(step).__name__}, but must be a BridgeStep with the model that the source teaches. "
            "Give bridge=BridgeStep(model, processing_class=tokenizer)."
        )
    args = BridgeDistillConfig(output_dir=str(output_dir)) if step.args is None else step.args
    if not isinstance(args, BridgeDistillConfig):
        raise TypeError(
            f"The args of the bridge are a {type(args).__name__}: a BridgeDistillConfig is needed, since the two "
            "models have tokens of their own. Give BridgeStep(model, args=BridgeDistillConfig(...))."
        )
    check_chain_arguments(args, "the bridge", "the teacher of its model is the source")
    return args


def _check_apart(models: _Models) -> None:
    """Check that the two tokenizers differ and can be aligned."""
    one, other, names = models.tokenizer, models.teacher_tokenizer, ("the student's", "the source's")
    if tokenizer_difference(one, other, names=names, further_tokens="neither") is None:
        raise ValueError(
            f"The source and the model of the bridge have one tokenizer ({len(one)} tokens), so there is nothing to "
            "bridge. Leave `bridge` out: plain anchors are cut from the source. For a model of another family with "
            "this tokenizer use DistillTrainer, which compares every logit, and give what it trained as `source`."
        )
    Bridge(one, other)


def _distil(
    work: Path, models: _Models, args: BridgeDistillConfig, dataset: Any, eval_dataset: Any, label: str
) -> Trained:
    args = copy.deepcopy(args)
    args.output_dir = str(work)
    student: Any = models.student.model(args.model_init_kwargs)
    if not isinstance(models.student.place, str | Path):
        student = copy.deepcopy(student)
    if is_tied(student):
        # Two equal tables would be trained separately.
        student.get_output_embeddings().weight = student.get_input_embeddings().weight
    models.special.follow(student, models.tokenizer)
    # The chain's tokenizer has the template already.
    args.chat_template_path = None
    # "seqkd" needs only the text that the source wrote, not the source.
    needs_teacher = not args.black_box
    with _restored(models.teacher.model(models.teacher_options)) if needs_teacher else nullcontext() as teacher:
        trainer = BridgeDistillTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=models.tokenizer,
            teacher_processing_class=models.teacher_tokenizer if needs_teacher else None,
        )
        return train(trainer, student, last_checkpoint(work), label)


@contextmanager
def _restored(model: Any) -> Iterator[PreTrainedModel]:
    """Restore a teacher afterwards: the trainer moves, freezes and patches it, and it may be the caller's."""
    training, learning = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, spread, attributes = model.device, is_spread(model), dict(vars(model))
    try:
        yield model
    finally:
        if not spread:
            # Hooks of `teacher_offload` hold the parameters.
            remove_hook_from_module(model, recurse=True)
            model.to(device)
        # The trainer patches the forward; accelerate wraps it and marks the model as prepared.
        vars(model).clear()
        vars(model).update(attributes)
        model.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
