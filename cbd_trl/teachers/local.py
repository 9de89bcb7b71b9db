"""A teacher that runs in the training processes: loading, checking and placing it."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.teachers.tokenizers import check_same_tokenizer, find_tokenizer, shared_vocabulary

logger = logging.get_logger(__name__)


def load_teacher(
    teacher: PreTrainedModel | str,
    student: nn.Module,
    *,
    init_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The teacher as a frozen model in eval mode.

    A model given in memory is used as it is: its parameters stop asking for gradients and it stays in eval mode.

    Args:
        teacher: a causal LM, or the path or Hub id of one.
        student: the model being trained, which gives the defaults of dtype and attention implementation: equal
            attention keeps packed rows apart in both models alike.
        init_kwargs: of `from_pretrained`, for a path or Hub id.
        revision: of a Hub id.
        trust_remote_code: let a Hub model run its own code.

    Returns:
        the teacher, not yet on a device.

    Raises:
        ValueError: if it is the student or shares parameters with it, or if options for loading come with a model.
        TypeError: if it is neither a model nor a string.
    """
    if isinstance(teacher, str):
        kwargs: dict[str, Any] = {"dtype": student.dtype, "trust_remote_code": trust_remote_code}
        if attention := getattr(student.config, "_attn_implementation", None):
            kwargs["attn_implementation"] = attention
        if revision is not None:
            kwargs["revision"] = revision
        teacher = AutoModelForCausalLM.from_pretrained(teacher, **{**kwargs, **(init_kwargs or {})})
    elif not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher_model is a {type(teacher).__name__}: it must be a causal language model, or the path "
            "or Hub id of one."
        )
    elif init_kwargs or revision:
        raise ValueError(
            "teacher_model_init_kwargs and teacher_model_revision say how to load a teacher, but teacher_model is a "
            "model already: they would be ignored. Leave them out, or give the teacher's path or Hub id."
        )
    owned = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in owned for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher shares parameters with the student: freezing the one would freeze the other. Give a copy, "
            "such as `copy.deepcopy(model)`."
        )
    teacher.eval()
    teacher.requires_grad_(False)
    return teacher


def check_vocabularies(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_name_or_path: str | None = None,
    revision: str | None = None,
) -> int:
    """Check that both models speak the tokenizer of the data.

    Without `teacher_tokenizer` the teacher's is looked for where it was loaded from; for a model given in memory, only
    on this machine. Where none is found, only the number of rows can be checked.

    Args:
        student: the model being trained.
        teacher: the loaded teacher.
        tokenizer: makes the training data.
        teacher_tokenizer: the teacher's own, if known.
        teacher_name_or_path: what the teacher was loaded from; None for a model given in memory.
        revision: of a Hub id.

    Returns:
        the number of vocabulary rows that both models have.

    Raises:
        ValueError: if the tokenizers differ, or a model has too few rows.
    """
    if teacher_tokenizer is None:
        in_memory = teacher_name_or_path is None
        place = getattr(teacher.config, "_name_or_path", None) if in_memory else teacher_name_or_path
        teacher_tokenizer = find_tokenizer(place, revision, local_only=in_memory)
        if teacher_tokenizer is None and not in_memory:
            logger.warning(
                f"No tokenizer was found beside the teacher {teacher_name_or_path}: it is taken to be the student's. "
                "Pass `teacher_processing_class` to have them compared."
            )
    if teacher_tokenizer is not None:
        check_same_tokenizer(tokenizer, teacher_tokenizer)
    highest = max(tokenizer.get_vocab().values()) + 1
    return shared_vocabulary(_vocabulary_rows(student), _vocabulary_rows(teacher), highest)


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Put the teacher where the student is: on its device, sharded alike, under the same mixed precision.

    Args:
        teacher: frozen, in eval mode.
        accelerator: the trainer's.

    Returns:
        the model to call.
    """
    if accelerator.state.deepspeed_plugin is not None:
        from trl.models.utils import prepare_deepspeed

        placed = prepare_deepspeed(teacher, accelerator)
    elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
        from trl.models.utils import prepare_fsdp

        placed = prepare_fsdp(teacher, accelerator)
    else:
        placed = accelerator.prepare_model(teacher, evaluation_mode=True)
    placed.eval()
    return placed


def _vocabulary_rows(model: Any) -> int:
    # Not config.vocab_size: the logits have one column per row of the output embedding.
    return model.get_output_embeddings().weight.shape[0]
