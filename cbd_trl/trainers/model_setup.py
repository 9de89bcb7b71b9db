"""From a trainer's arguments to a student and a teacher that are loaded, checked and comparable."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.architectures import is_tied
from cbd_trl.architectures.backbone import check_head, keep_trainable, open_forward
from cbd_trl.cache import TeacherCache
from cbd_trl.cache.reader import CachedTeacher
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import DistillObjective
from cbd_trl.teachers.local import (
    EnsembleTeacher,
    LocalTeacher,
    OwnBaseTeacher,
    Teacher,
    causal_lm_of,
    load_teacher,
)
from cbd_trl.trainers.checks import check_arguments, check_best_metric
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.model_card import describe_model
from cbd_trl.utils.datasets import sft_dataset, sft_datasets
from cbd_trl.utils.model_folders import name_remote_code
from cbd_trl.utils.modeling import check_checkpoint, check_writes, is_multimodal, load_causal_lm
from cbd_trl.utils.tokenizers import check_vocabularies, vocabulary_rows

logger = logging.get_logger(__name__)

TeacherModel = str | PreTrainedModel | Sequence[str | PreTrainedModel] | None

# Starts of a LoRA that are a part of the base's weights, which keep the rest alone (names of peft).
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Where every process holds a whole model, "auto" would spread each over all devices.
_ONE_EACH = ("MULTI_GPU", "DEEPSPEED")


@dataclass(frozen=True)
class RunArguments:
    """The arguments of a trainer, resolved as far as they can be before there is an accelerator.

    Attributes:
        model: the student, loaded.
        name: path or Hub id the student is from, or None.
        loaded: whether the student was given by name.
        teacher: a model, path or Hub id, a list of them, or None where the config has another source.
        train_dataset: in a format of `trl.SFTTrainer`, or None.
        eval_dataset: likewise, or a dict of them.
        processing_class: the student's tokenizer; None where SFTTrainer is to look for it.
        others: further arguments of `trl.SFTTrainer`.
    """

    model: Any
    name: str | None
    loaded: bool
    teacher: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    others: dict[str, Any]


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher, and what the trainer has to know of it.

    Attributes:
        teacher: yet to be placed.
        model: the one causal LM it is, or None.
        shared_rows: vocabulary rows that it and the student have.
        description: names it on the model card.
    """

    teacher: Teacher
    model: PreTrainedModel | None
    shared_rows: int
    description: str


def resolve_arguments(
    args: DistillConfig,
    config: type[DistillConfig],
    *,
    model: Any,
    teacher_model: TeacherModel,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    others: Mapping[str, Any],
) -> RunArguments:
    """Check a trainer's arguments, and load the student once nothing speaks against it.

    Args:
        args: of the run.
        config: the trainer's kind of it.
        model: the trainer's argument; so are the following.
        teacher_model: the teacher is checked here and not loaded.
        train_dataset: any dataset format of `trl.SFTTrainer`.
        eval_dataset: likewise, or a dict of them.
        processing_class: the student's tokenizer.
        others: further arguments for `trl.SFTTrainer`.

    Raises:
        ValueError: for arguments that contradict each other or name files that do not hold a model.
        TypeError: if an argument has the wrong type.
    """
    others = dict(others)
    check_arguments(args, config, others)
    check_best_metric(args, eval_dataset, others.get("compute_metrics"))
    teacher = _choose_teacher(teacher_model, args)
    formatted = others.get("formatting_func") is not None
    if train_dataset is not None:
        train_dataset = sft_dataset(train_dataset, "train_dataset", args, formatted=formatted)
    eval_dataset = sft_datasets(eval_dataset, "eval_dataset", args, formatted=formatted)
    _check_teacher_files(teacher, args)
    loaded = isinstance(model, str)
    if loaded:
        name, model = model, load_student(model, args, others.pop("quantization_config", None))
    else:
        name = getattr(model.config, "_name_or_path", None)
        check_writes(model, "student")
    if processing_class is None:
        processing_class = find_student_tokenizer(model, args, loaded)
    return RunArguments(model, name, loaded, teacher, train_dataset, eval_dataset, processing_class, others)


def load_student(name: str, args: DistillConfig, quantization_config: Any = None) -> PreTrainedModel:
    """Load the student, in float32 and on the accelerator unless `args.model_init_kwargs` has it otherwise.

    Args:
        name: path or Hub id.
        args: of the run.
        quantization_config: the trainer's argument.

    Raises:
        ValueError: weights are missing, unknown, of another shape or in no safetensors; two quantizations are given.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}  # type: ignore[arg-type]  # a string on the command line, a dict once parsed
    if options["trust_remote_code"]:
        name_remote_code(name, options.get("revision"))
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "quantization_config was given as an argument of the trainer and in model_init_kwargs: there can be "
                "one. Give the trainer's argument alone."
            )
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in _ONE_EACH:
        options["device_map"] = None
    else:
        options.setdefault("device_map", None if args.device.type in ("cpu", "mps") else "auto")
    return load_causal_lm(name, role="student", **options)


@contextmanager
def arguments_for_sft(model: Any, args: DistillConfig, loaded: bool) -> Iterator[None]:
    """Within it the arguments are as SFTTrainer has to see them for a student that is loaded already.

    Args:
        model: the student.
        args: loses `model_init_kwargs`, which were used, and gets them back. What stays: a multimodal student's towers
            get no gradient from text, so DDP has to look for them.
        loaded: whether the student was given by name.
    """
    options = args.model_init_kwargs
    if loaded:
        args.model_init_kwargs = None
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")  # type: ignore[union-attr]
    if is_multimodal(model) and args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True
    try:
        yield
    finally:
        args.model_init_kwargs = options


def find_student_tokenizer(model: Any, args: DistillConfig, loaded: bool) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that a student was saved with, also where a processor for images goes around it.

    Args:
        model: the student.
        args: of the run.
        loaded: whether the student was given by name, of the revision in `args`.

    Returns:
        None for a text model in memory, where SFTTrainer looks itself.
    """
    if not loaded and not is_multimodal(model):
        return None
    options: Any = (args.model_init_kwargs or {}) if loaded else {}
    where = {key: options[key] for key in ("revision", "token") if key in options}
    return AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=args.trust_remote_code, **where)


def set_up_teacher(
    named: TeacherModel,
    student: Any,
    args: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> TeacherSetup:
    """Load and check the teacher.

    Args:
        named: a model, path or Hub id, or a list of them; None where `args` has another source.
        student: not wrapped for training; its forward is opened.
        args: of the run.
        tokenizer: makes the training data.
        teacher_tokenizer: the teacher's own, if known.

    Raises:
        ValueError: if student and teacher cannot be compared as requested.
        TypeError: if a teacher is neither a model nor a string.
    """
    open_student(student)
    base = causal_lm_of(student)
    if teacher_tokenizer is not None and (args.teacher_cache or args.self_distillation):
        raise ValueError(
            "teacher_processing_class is compared with the student's tokenizer, but "
            f"{'a teacher_cache knows its own' if args.teacher_cache else 'with self_distillation they are one'}: it "
            "would be ignored. Leave it out."
        )
    if args.teacher_cache:
        return _open_cache(base, args, tokenizer)
    if args.self_distillation:
        return _use_own_base(base, student)
    teachers = [named] if isinstance(named, str) or not isinstance(named, Sequence) else list(named)
    return _load_teachers(teachers, student, args, tokenizer, teacher_tokenizer)


def make_objective(args: DistillConfig, shared_rows: int) -> DistillObjective:
    """Make the loss terms on logits of two models with one vocabulary.

    Args:
        args: of the run.
        shared_rows: vocabulary rows that both models have.
    """
    divergence = get_divergence(args.divergence, **args.divergence_options)
    return DistillObjective(divergence, args.temperature, args.top_k, shared_rows)


def open_student(student: Any) -> None:
    """Open a student's forward, as `StepLoss` needs it, and have its config agree with its weights.

    A config that has tied embeddings where two tables are trained, or the reverse, would have the saved student read
    as another model.

    Args:
        student: not wrapped for training.

    Raises:
        ValueError: if its logits are not a plain head of its last hidden state.
    """
    base = causal_lm_of(student)
    open_forward(base)
    keep_trainable(base)
    check_head(base)
    stated, tied = bool(base.config.tie_word_embeddings), is_tied(base, one_tensor=True)
    if base is student and stated != tied:
        logger.warning(
            f"The config of the student, a {type(student).__name__}, has tie_word_embeddings={stated}, but its head "
            f"and its table of embeddings are {'one tensor' if tied else 'two'}. So they are trained, and its config "
            f"has tie_word_embeddings={tied} from now on."
        )
        base.config.tie_word_embeddings = tied


def _choose_teacher(teacher: Any, args: DistillConfig) -> Any:
    """Find the teacher in the trainer's argument or in its config.

    Args:
        teacher: the trainer's `teacher_model`.
        args: of the run.

    Returns:
        a model, path or Hub id, a list of them, or None where `args` has another source.

    Raises:
        ValueError: if there is none, or two.
    """
    named = args.teacher_model_name_or_path
    elsewhere = args.teacher_source
    if teacher is not None and (named is not None or elsewhere):
        other = elsewhere or "teacher_model_name_or_path"
        raise ValueError(
            f"A teacher was given as `teacher_model` of the trainer, and {other} in the {type(args).__name__}: both "
            "were given, and there can be one. Give one of them."
        )
    chosen = named if teacher is None else teacher
    if (chosen is None and not elsewhere) or (isinstance(chosen, list | tuple) and not chosen):
        raise ValueError(
            "A teacher is needed: neither was `teacher_model` of the trainer given nor, in the "
            f"{type(args).__name__}, {' or '.join(f'`{name}`' for name in args.teacher_arguments)}. Give one of them."
        )
    return chosen


def _check_teacher_files(named: TeacherModel, args: DistillConfig) -> None:
    """Check that the files of teachers given by name hold their weights, before the data is prepared."""
    options: Any = args.teacher_model_init_kwargs or {}
    where = {"trust_remote_code": args.trust_remote_code, "revision": args.teacher_model_revision, **options}
    for one in named if isinstance(named, list | tuple) else [named]:
        if isinstance(one, str):
            check_checkpoint(one, role="teacher", adapters=True, **where)


def _use_own_base(base: Any, student: Any) -> TeacherSetup:
    if base is student:
        raise ValueError(
            "self_distillation=True learns from the student's base with its adapter switched off, but the student has "
            "no adapter. Pass a `peft_config`, or name a teacher."
        )
    _check_base_stays(student.active_peft_config)
    text = f"its own base, {describe_model(base, getattr(base.config, '_name_or_path', None))}"
    return TeacherSetup(OwnBaseTeacher(student), base, vocabulary_rows(base), text)


def _load_teachers(
    teachers: Sequence[Any],
    student: Any,
    args: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> TeacherSetup:
    weights = _ensemble_weights(args, len(teachers))
    init_kwargs: Any = args.teacher_model_init_kwargs  # a string on the command line, a dict once parsed
    models, rows = [], []
    for one in teachers:
        model = load_teacher(
            one,
            student,
            init_kwargs=init_kwargs,
            revision=args.teacher_model_revision,
            trust_remote_code=args.trust_remote_code,
        )
        shared_rows = check_vocabularies(
            student,
            model,
            tokenizer,
            teacher_tokenizer=teacher_tokenizer,
            teacher_name_or_path=one if isinstance(one, str) else None,
            revision=args.teacher_model_revision,
        )
        models.append(model)
        rows.append(shared_rows)
    members = [LocalTeacher(model) for model in models]
    texts = [describe_model(model, getattr(model.config, "_name_or_path", None)) for model in models]
    if len(members) == 1:
        return TeacherSetup(members[0], models[0], rows[0], texts[0])
    text = " + ".join(f"{weight:.3g} x {text}" for weight, text in zip(weights, texts, strict=True))
    return TeacherSetup(EnsembleTeacher(members, weights), models[0], min(rows), text)


def _ensemble_weights(args: DistillConfig, teachers: int) -> list[float]:
    weights = args.teacher_weights
    if weights is not None and len(weights) != teachers:
        raise ValueError(
            f"teacher_weights has {len(weights)} entries for {teachers} teacher{'s' * (teachers != 1)}: give one for "
            "each, or leave it out for equal weights. Several teachers are passed as a list, `teacher_model=[a, b]`."
        )
    weights = [1.0] * teachers if weights is None else weights
    return [weight / sum(weights) for weight in weights]


def _check_base_stays(adapter: Any) -> None:
    bias, start = getattr(adapter, "bias", "none"), getattr(adapter, "init_lora_weights", True)
    changing = f"bias={bias!r} trains the base's biases" if bias != "none" else None
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        changing = f"init_lora_weights={start!r} takes a part out of the base's weights"
    if changing:
        raise ValueError(
            f"self_distillation=True learns from the student's base with its adapter switched off, but {changing}: "
            "the teacher would not be the model that was given. Leave it out of the peft_config, or give that model "
            "as the teacher."
        )


def _open_cache(base: Any, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> TeacherSetup:
    assert args.teacher_cache is not None
    cache = TeacherCache.open(args.teacher_cache)
    settings = cache.manifest.settings
    cache.check(vocabulary_rows=vocabulary_rows(base), tokenizer=tokenizer)
    if settings.kind != "hidden" and settings.temperature != args.temperature:
        raise ValueError(
            f"temperature={args.temperature}, but the cache {args.teacher_cache} holds probabilities at temperature "
            f"{settings.temperature}, and only the whole distribution could be tempered anew. Set temperature="
            f"{settings.temperature}, or write a cache with --temperature {args.temperature} (or --kind hidden)."
        )
    if settings.kind == "sampled" and (args.divergence != "forward_kl" or args.top_k):
        raise ValueError(
            f"The cache {args.teacher_cache} holds random draws, from which only the whole forward KL can be "
            f"estimated without bias, not divergence={args.divergence!r} with top_k={args.top_k}. Set "
            "divergence='forward_kl' and no top_k, or write a cache with --kind top_k."
        )
    if args.top_k and settings.k is not None and args.top_k > settings.k:
        raise ValueError(
            f"top_k={args.top_k}, but the cache {args.teacher_cache} holds {settings.k} tokens at each position. "
            f"Lower top_k, or write a cache with --k {args.top_k}."
        )
    rows = min(vocabulary_rows(base), settings.vocabulary_rows)
    held = {"top_k": f"top {settings.k} and tail", "sampled": f"{settings.k} draws", "hidden": "hidden states"}
    name = f"`{settings.teacher}`" if settings.teacher else "a model made in memory"
    return TeacherSetup(CachedTeacher(cache), None, rows, f"{name}, from a cache ({held[settings.kind]})")
