"""Do a student and a teacher read and write the same tokens?"""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Letters with accents, digits, spaces, a newline and another script: what normalisers, pre-tokenizers and merges
# disagree about although the vocabularies are equal.
_PROBE = "Émile's 1,234.5 naïve  tests:\n\tdon't split «déjà vu» – 数学 ok?"


def find_tokenizer(name_or_path: str | None, revision: str | None, local_only: bool) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that belongs to a model, if there is one.

    Args:
        name_or_path: path or Hub id of the model, or what its config says it came from.
        revision: of a Hub id.
        local_only: never ask the Hub.

    Returns:
        the tokenizer, or None if there is none at that place.
    """
    if not name_or_path or name_or_path == "None":
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, local_files_only=local_only)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A folder without a tokenizer fails in as many ways as there are tokenizer classes.
        return None


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose tokens are not the student's.

    The teacher may know further tokens (they are not compared); every token of the student must have the same id in
    the teacher, and both must split a probe text alike.

    Args:
        student: the tokenizer that makes the training data.
        teacher: the tokenizer the teacher was trained with.

    Raises:
        ValueError: if they differ; the message gives an example and names `BridgeDistillTrainer`.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [(token, index) for token, index in ours.items() if theirs.get(token) != index]
    if differing:
        token, index = min(differing, key=lambda pair: pair[1])
        reason = (
            f"{len(differing)} of the student's {len(ours)} tokens have another id in the teacher's vocabulary of "
            f"{len(theirs)}, such as {token!r}: {index} against {theirs.get(token)}"
        )
    else:
        ours_probe = student(_PROBE, add_special_tokens=False)["input_ids"]
        theirs_probe = teacher(_PROBE, add_special_tokens=False)["input_ids"]
        if ours_probe == theirs_probe:
            return
        reason = f"the vocabularies agree but the same text becomes {len(ours_probe)} and {len(theirs_probe)} tokens"
        reason += ", split differently" if len(ours_probe) == len(theirs_probe) else ""
    raise ValueError(
        f"Student and teacher have different tokenizers: {reason}. DistillTrainer compares the two models token by "
        "token, so it needs the same tokenizer on both sides. Use BridgeDistillTrainer to distil across tokenizers, "
        "or pass `teacher_processing_class` if the wrong tokenizer was found for the teacher."
    )


def shared_vocabulary(student_rows: int, teacher_rows: int, tokens: int) -> int:
    """How many logits two models with padded vocabularies share.

    Args:
        student_rows: rows of the student's output embedding.
        teacher_rows: rows of the teacher's output embedding.
        tokens: length of the tokenizer, its highest id plus one.

    Returns:
        min(student_rows, teacher_rows).

    Raises:
        ValueError: if a token of the tokenizer has no row in one of the models.
    """
    shared = min(student_rows, teacher_rows)
    if shared < tokens:
        smaller = "student" if student_rows < teacher_rows else "teacher"
        raise ValueError(
            f"The tokenizer has {tokens} tokens, the student {student_rows} rows and the teacher {teacher_rows}: "
            f"the {smaller} has no logit for some tokens of the data. Only padding rows may differ. Resize the "
            f"{smaller}'s embeddings, pass the tokenizer both models share, or use BridgeDistillTrainer if they have "
            "different ones."
        )
    return shared
