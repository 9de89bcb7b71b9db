"""From what the user named to a teacher that is checked and ready."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.architectures.backbone import check_head, keep_trainable, open_forward
from cbd_trl.cache import TeacherCache
from cbd_trl.cache.reader import CachedTeacher
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import DistillObjective
from cbd_trl.teachers.local import EnsembleTeacher, LocalTeacher, OwnBaseTeacher, Teacher, load_teacher
from cbd_trl.trainers.collators import CachedTeacherCollator
from cbd_trl.trainers.distill_config import DistillConfig
from cbd_trl.trainers.model_card import describe_model
from cbd_trl.utils.datasets import example_rows
from cbd_trl.utils.modeling import check_checkpoint
from cbd_trl.utils.tokenizers import check_vocabularies, vocabulary_rows

logger = logging.get_logger(__name__)

TeacherModel = str | PreTrainedModel | Sequence[str | PreTrainedModel] | None

# Starts of a LoRA that are a part of the base's weights, which keep the rest alone (names of peft).
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher, and what the trainer has to know of it.

    Attributes:
        teacher: to be placed and asked.
        model: the one causal LM it is, or None.
        shared_rows: vocabulary rows that it and the student have.
        text: names it on the card.
    """

    teacher: Teacher
    model: PreTrainedModel | None
    shared_rows: int
    text: str


def check_named_teachers(named: TeacherModel, args: DistillConfig) -> None:
    """Refuse teachers whose files do not hold their weights, before the data is prepared.

    Args:
        named: what `chosen_teacher` returned.
        args: of the run.

    Raises:
        ValueError: see `check_checkpoint`.
    """
    options: Any = args.teacher_model_init_kwargs or {}
    where = {"trust_remote_code": args.trust_remote_code, "revision": args.teacher_model_revision, **options}
    for one in named if isinstance(named, list | tuple) else [named]:
        if isinstance(one, str):
            check_checkpoint(one, role="teacher", adapters=True, **where)


def set_up_teacher(
    named: TeacherModel,
    student: Any,
    args: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> TeacherSetup:
    """Load and check the teacher.

    Args:
        named: what `chosen_teacher` returned.
        student: not wrapped for training; its forward is opened.
        args: of the run.
        tokenizer: makes the training data.
        teacher_tokenizer: the teacher's own, if known.

    Raises:
        ValueError: if student and teacher cannot be compared as asked.
        TypeError: if a teacher is neither a model nor a string.
    """
    base = open_student(student)
    if teacher_tokenizer is not None and (args.teacher_cache or args.self_distillation):
        raise ValueError(
            "teacher_processing_class is compared with the student's tokenizer, but "
            f"{'a teacher_cache knows its own' if args.teacher_cache else 'with self_distillation they are one'}: it "
            "would be ignored. Leave it out."
        )
    if args.teacher_cache:
        return _cached(base, args, tokenizer)
    if args.self_distillation:
        return _own_base(base, student)
    every = [named] if isinstance(named, str) or not isinstance(named, Sequence) else list(named)
    return _loaded(every, student, args, tokenizer, teacher_tokenizer)


def make_objective(args: DistillConfig, shared_rows: int) -> DistillObjective:
    """The terms on logits of two models with one vocabulary.

    Args:
        args: of the run.
        shared_rows: vocabulary rows that both models have.
    """
    divergence = get_divergence(args.divergence, **args.divergence_options)
    return DistillObjective(divergence, args.temperature, args.top_k, shared_rows)


def open_student(student: Any) -> Any:
    """Open a student's forward, as `StepLoss` needs it.

    Args:
        student: not wrapped for training.

    Returns:
        the causal LM itself, without an adapter around it.

    Raises:
        ValueError: if its logits are not a plain head of its last hidden state.
    """
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    open_forward(base)
    keep_trainable(base)
    check_head(base)
    if base is student:
        _say_whether_tied(base)
    return base


def _say_whether_tied(student: Any) -> None:
    """Have the config of a student say whether one table is trained or two: saved, it would be read as another."""
    head, table = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    stated, tied = bool(student.config.tie_word_embeddings), head is table
    if stated != tied and not (head.is_meta or table.is_meta):
        logger.warning(
            f"The config of the student, a {type(student).__name__}, says tie_word_embeddings={stated}, but its head "
            f"and its table of embeddings are {'one' if tied else 'two'}. So they are trained, and so its config says "
            "from now on."
        )
        student.config.tie_word_embeddings = tied


def read_from_cache(teacher: CachedTeacher, collator: Any, datasets: Iterable[Any]) -> Any:
    """A collator that adds to each batch what a cached teacher says, after checking that it knows every row.

    Args:
        teacher: reads the cache.
        collator: of the trainer.
        datasets: prepared ones, to be looked up before training; streams, and rows that a collator of the user's turns
            into tokens, are looked up as they come.

    Returns:
        the collator to use instead.

    Raises:
        ValueError: if rows are not in the cache.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            columns = [name for name in ("input_ids", "seq_lengths") if name in dataset.column_names]
            teacher.cache.check_rows(row for one in dataset.select_columns(columns) for row in example_rows(one))
    return CachedTeacherCollator(collator, teacher.cache)


def _own_base(base: Any, student: Any) -> TeacherSetup:
    if base is student:
        raise ValueError(
            "self_distillation=True learns from the student's base with its adapter switched off, but the student has "
            "no adapter. Pass a `peft_config`, or name a teacher."
        )
    _check_base_stays(student.active_peft_config)
    text = f"its own base, {describe_model(base, getattr(base.config, '_name_or_path', None))}"
    return TeacherSetup(OwnBaseTeacher(student), base, vocabulary_rows(base), text)


def _loaded(
    every: Sequence[Any],
    student: Any,
    args: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> TeacherSetup:
    weights = _ensemble_weights(args, len(every))
    init_kwargs: Any = args.teacher_model_init_kwargs  # a string on the command line, a dict once parsed
    models, rows = [], []
    for one in every:
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
    return TeacherSetup(EnsembleTeacher(members, weights), None, min(rows), text)


def _ensemble_weights(args: DistillConfig, teachers: int) -> list[float]:
    weights = args.teacher_weights
    if weights is not None and len(weights) != teachers:
        raise ValueError(
            f"teacher_weights has {len(weights)} entries for {teachers} teacher{'s' * (teachers != 1)}: give one for "
            "each, or leave it out to weigh all alike. Several teachers are passed as a list, `teacher_model=[a, b]`."
        )
    if teachers > 1 and (args.uses_hidden or args.swap_probability):
        raise ValueError(
            f"hidden_weight and swap_probability compare the layers of one teacher, and there are {teachers}. Set "
            "both to 0, or give one teacher."
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


def _cached(base: Any, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> TeacherSetup:
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
