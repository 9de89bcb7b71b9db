"""Which tokenizers are the same: `tokenizer_difference` of two in memory, `tokenizer_hash` for one on disk."""

import copy
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.model_folders import read_object
from cbd_trl.utils.untrusted import reading

logger = logging.get_logger(__name__)


# Letters with accents, digits, spaces, a newline and another script: what normalizers, pre-tokenizers and merges
# disagree about although the vocabularies are equal.
_PROBE = "Émile's 1,234.5 naïve  tests:\n\tdon't split «déjà vu» – 数学 ok?"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def find_tokenizer(
    name_or_path: str | None, revision: str | None, local_only: bool, token: str | None = None
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that belongs to a model, if there is one.

    Args:
        name_or_path: path or Hub id of the model, or what its config names as its origin.
        revision, token: of a Hub id.
        local_only: never look on the Hub.

    Returns:
        the tokenizer, or None if there is none at that place.
    """
    if name_or_path is None or lacks_tokenizer(name_or_path):
        return None
    try:
        # Given, because transformers asks at the keyboard where it is not.
        return AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, local_files_only=local_only, token=token, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A folder without a tokenizer fails in as many ways as there are tokenizer classes.
        return None


def text_tokenizer(given: Any) -> Any:
    """Take the tokenizer out of a processor for text and images; a tokenizer is returned as it is.

    Args:
        given: a tokenizer, a processor or None.

    Returns:
        the tokenizer, with the processor's chat template where it has none; anything else as it is.

    Raises:
        TypeError: it is a processor without a tokenizer.
    """
    if not isinstance(given, ProcessorMixin):
        return given
    tokenizer = getattr(given, "tokenizer", None)
    if tokenizer is None:
        raise TypeError(
            f"The processing class is a {type(given).__name__}, which has no tokenizer, and text is read here. Pass a "
            "tokenizer, or a processor that has one."
        )
    if tokenizer.chat_template is None and given.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = given.chat_template
    return tokenizer


def lacks_tokenizer(name_or_path: str) -> bool:
    """Tell whether this is not a name, or a folder without a tokenizer, of which transformers would make an empty one
    for some families.

    Args:
        name_or_path: path or Hub id of a model.
    """
    if not name_or_path or name_or_path == "None":
        return True
    folder = Path(name_or_path)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def tokenizer_difference(
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    names: tuple[str, str],
    further_tokens: Literal["neither", "other", "either"] = "other",
) -> str | None:
    """Explain why two tokenizers do not read the same tokens; None where they do.

    This is the rule for tokenizers in memory: every token of the first has the same id in the other, and both split a
    probe text in the same way. On disk the rule is `tokenizer_hash`, which is stricter.

    Args:
        one, other: the tokenizers.
        names: what to call them, as in "the student's".
        further_tokens: which of them may have tokens that the one it is compared with lacks, such as one for padding.
    """
    reason = _difference(one, other, names)
    if further_tokens == "neither":
        return reason or _difference(other, one, names[::-1])
    if further_tokens == "either" and reason is not None and _difference(other, one, names[::-1]) is None:
        return None
    return reason


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: tuple[str, str]) -> str | None:
    ours, theirs = one.get_vocab(), other.get_vocab()
    differing = [(token, index) for token, index in ours.items() if theirs.get(token) != index]
    if differing:
        token, index = min(differing, key=lambda pair: pair[1])
        return (
            f"{len(differing)} of {names[0]} {len(ours)} tokens have another id in {names[1]} vocabulary of "
            f"{len(theirs)}, such as {token!r}: {index} against {theirs.get(token)}"
        )
    ours_probe = one(_PROBE, add_special_tokens=False)["input_ids"]
    theirs_probe = other(_PROBE, add_special_tokens=False)["input_ids"]
    if ours_probe == theirs_probe:
        return None
    reason = f"the vocabularies agree but the same text becomes {len(ours_probe)} and {len(theirs_probe)} tokens"
    return reason + (", split differently" if len(ours_probe) == len(theirs_probe) else "")


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that a teacher's tokens are the student's (see `tokenizer_difference`).

    Args:
        student: the tokenizer that makes the training data.
        teacher: the tokenizer the teacher was trained with.

    Raises:
        ValueError: if they differ; the message gives an example and names `BridgeDistillTrainer`.
    """
    reason = tokenizer_difference(student, teacher, names=("the student's", "the teacher's"))
    if reason is None:
        return
    raise ValueError(
        f"Student and teacher have different tokenizers: {reason}. DistillTrainer compares the two models token by "
        "token, so it needs the same tokenizer on both sides. Use BridgeDistillTrainer to distill across tokenizers, "
        "or pass `teacher_processing_class` if the wrong tokenizer was found for the teacher."
    )


def shared_vocabulary(student_rows: int, teacher_rows: int, tokens: int) -> int:
    """Count the logits that two models with padded vocabularies share.

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


def check_vocabularies(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_name_or_path: str | None = None,
    revision: str | None = None,
) -> int:
    """Check that both models have the tokenizer of the data.

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
    return shared_vocabulary(vocabulary_rows(student), vocabulary_rows(teacher), highest)


def check_rows(role: str, rows: int, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """Check that a model has a vocabulary row for each token.

    Args:
        role: what to call the model, such as "teacher".
        rows: of its vocabulary.
        tokenizer: the one given for it.
        argument: by which it is given.

    Raises:
        ValueError: if the tokenizer has more ids than there are rows.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    if rows < tokens:
        raise ValueError(
            f"The {role} has {rows} vocabulary rows, and the tokenizer given for it, {tokenizer_name(tokenizer)}, has "
            f"{tokens} tokens: it is another model's. Pass the {role}'s own as `{argument}`, or resize the embeddings."
        )


def check_token(tokenizer: PreTrainedTokenizerBase, argument: str, token: str) -> str:
    """Check that a token is in a vocabulary.

    Args:
        tokenizer: of the vocabulary.
        argument: by which the token is given, such as "eos_token".
        token: its text.

    Returns:
        the token.

    Raises:
        ValueError: it is not.
    """
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"{argument}={token!r} is not in the vocabulary of the tokenizer {tokenizer_name(tokenizer)}, so no model "
            f"could learn it. Name one of its tokens, leave {argument} out, or add the token to the model first."
        )
    return token


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name a tokenizer for a reader: where it is from, else its class, and how many tokens it has."""
    name = readable_name(tokenizer.name_or_path or None)
    return f"{name or type(tokenizer).__name__} ({len(tokenizer)} tokens)"


def vocabulary_rows(model: Any) -> int:
    """Count the logits of a model per position: rows of its output embedding, which config.vocab_size need not be."""
    weight = model.get_output_embeddings().weight
    # ZeRO-3 leaves an empty parameter behind, and its shape beside it.
    return getattr(weight, "ds_shape", weight.shape)[0]


# Not those of padding and end: training may give a tokenizer its own (`pad_token`, `eos_token`), and no id changes.
_ROLES = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What a tokenizer was last called with, and the version of the format.
_NO_RULES = ("padding", "truncation", "version")
# Of tokenizers that have no tokenizer.json.
_RULE_FILES = ("vocab*", "merges*", "added_tokens*", "*.model", "tekken*")
# A vocabulary of a million tokens is far smaller.
_LARGEST_BYTES = 2**28


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides which ids a text becomes, and which text ids are.

    Vocabulary, merges, rules for splitting, normalizing and decoding, added tokens, and which tokens stand for the
    begin of a text, for what is unknown, and the like. Chat templates, and which tokens pad and end, are left out.

    Args:
        tokenizer: any that can be saved.

    Returns:
        64 hexadecimal digits, those of `stored_tokenizer_hash` once it is saved.

    Raises:
        ValueError: it saves no file with its tokens.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = stored_tokenizer_hash(Path(folder))
    if found is None:
        raise ValueError(
            f"A {type(tokenizer).__name__} saves no file with its tokens (tokenizer.json, or a "
            "vocabulary), so it cannot be told from another one. Pass a tokenizer as AutoTokenizer loads it."
        )
    return found


def stored_tokenizer_hash(folder: Path, way_out: str = "Save the tokenizer again.") -> str | None:
    """Compute the `tokenizer_hash` of the tokenizer in a folder; None where there is none.

    Raises:
        ValueError: its files cannot be read; the message ends with the way out.
    """
    config_file, rules_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config_file.is_file():
        return None
    config = read_object(config_file, way_out)
    backend = read_object(rules_file, way_out, _LARGEST_BYTES) if rules_file.is_file() else None
    with reading(config_file if backend is None else rules_file, "a tokenizer", way_out):
        roles = {role: _content(config[role]) for role in _ROLES if config.get(role) is not None}
        rules = _file_rules(folder) if backend is None else _rules(backend)
    if not rules:
        return None
    return hashlib.sha256(json.dumps([roles, rules], sort_keys=True).encode()).hexdigest()


def _content(token: Any) -> str:
    """A token as tokenizer_config.json has it: text, or an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _rules(backend: dict[str, Any]) -> dict[str, Any]:
    rules = {name: value for name, value in backend.items() if name not in _NO_RULES}
    # Whether an added token is called special changes no id.
    added = [{key: value for key, value in token.items() if key != "special"} for token in backend["added_tokens"]]
    return {**rules, "added_tokens": added}


def _file_rules(folder: Path) -> dict[str, str]:
    files = {file for pattern in _RULE_FILES for file in folder.glob(pattern)}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Fields of a config about files, libraries or text generation, and not about the next token's distribution.
_NOT_THE_FUNCTION = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "cbd_trl",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
_SAMPLE = 8


def teacher_fingerprint(model: Any) -> str:
    """Hash a model's config and some values of each of its parameters.

    Two models that were trained apart differ in almost every value; reading a few of each matrix tells them apart in
    no time.

    Args:
        model: a causal LM.

    Returns:
        64 hexadecimal digits.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_FUNCTION}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).float().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
