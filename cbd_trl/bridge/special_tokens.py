"""The special tokens that a tokenizer adds to a text by itself, such as BOS, carried over to another one."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from cbd_trl.bridge.token_bytes import component_json
from cbd_trl.bridge.vocabulary import counterpart
from cbd_trl.utils.blocks import marks_around

logger = logging.get_logger(__name__)

_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_PLACES = ("before it", "behind it")
_PROBE = [{"role": "user", "content": "a"}]


def carry_over_special_tokens(
    old_tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that adds to a text the special tokens that another one adds.

    A model that has read every text behind BOS is lost without: Gemma 3 270M, given the vocabulary of SmolLM2, whose
    tokenizer adds nothing, has 6.4 nats a token instead of 3.6. What the new tokenizer adds and the old one does not
    is left out. Where chats of the old template begin with them, or there is none, the new template writes them in
    front.

    Args:
        old_tokenizer: the model's.
        new_tokenizer: the one that the model is given; it is not changed.

    Returns:
        the copy, to transplant with, to train with and to save. Every token keeps its id; a special token for which
        the new tokenizer has none of its own is added behind the others.
    """
    old: Any = old_tokenizer
    made: Any = copy.deepcopy(new_tokenizer)
    sides: list[list[str]] = []
    for ids in marks_around(old):
        sides.append([])
        for index in ids:
            if counterpart(old, made, index) is None:
                _add(made, old, index)
            sides[-1].append(made.convert_ids_to_tokens(counterpart(old, made, index)))
    _set_rule(made, *sides)
    prefix = marks_around(old)[0]
    if made.chat_template and prefix and (not old.chat_template or _begins(old, old.chat_template, prefix)):
        templates: Any = made.chat_template
        if isinstance(templates, str):
            made.chat_template = _begun(made, templates, sides[0])
        else:
            made.chat_template = {name: _begun(made, one, sides[0]) for name, one in templates.items()}
    return made


def warn_of_other_special_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Say so where a new tokenizer adds other special tokens to a text than those a model was trained with.

    Args:
        old: the model's.
        new: the one it is given.
    """
    wanted = tuple([counterpart(old, new, index) for index in ids] for ids in marks_around(old))
    if wanted == marks_around(new):
        return
    ours, theirs = (_names(tokenizer, marks_around(tokenizer)) for tokenizer in (old, new))
    logger.warning(
        f"To a text the model's tokenizer adds {ours}, the new one {theirs}: a model predicts worse where texts do "
        "not begin as in its training, far worse where BOS is missing that was always there. Have the new one add the "
        "same before the transplant, and train with that one and save it: new_tokenizer = "
        "cbd_trl.bridge.carry_over_special_tokens(old_tokenizer, new_tokenizer)."
    )


def renumber(rule: dict[str, Any] | None, ids: Mapping[str, int]) -> None:
    """Have the post-processor of a tokenizer.json name the ids of another vocabulary.

    Args:
        rule: as the file has it, changed in place; None where there is none.
        ids: {token: id}, with all tokens that it names.
    """
    for part in _parts(rule):
        for mark in part.get("special_tokens", {}).values():
            mark["ids"] = [ids[token] for token in mark["tokens"]]
        for role in ("sep", "cls"):
            if role in part:
                part[role] = [part[role][0], ids[part[role][0]]]


def _parts(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return [part for one in rule["processors"] for part in _parts(one)] if rule["type"] == "Sequence" else [rule]


def _add(made: Any, old: Any, index: int) -> None:
    content = old.convert_ids_to_tokens(index)
    if content in made.get_vocab():
        raise ValueError(
            f"The model's tokenizer adds {content!r} to a text, which in the new one has another role: there is no "
            "token to carry over. Give the role in the new tokenizer to a token of another name first."
        )
    made.add_tokens([AddedToken(content, special=True, normalized=False)])
    if index == old.bos_token_id:
        made.bos_token = content


def _set_rule(made: Any, before: list[str], behind: list[str]) -> None:
    backend = made.backend_tokenizer
    parts = _parts(component_json(backend.post_processor))
    # Of these the one on offsets is kept.
    offsets = [
        {"type": "ByteLevel", "use_regex": True, **{name: part[name] for name in ("add_prefix_space", "trim_offsets")}}
        if part["type"] == "RobertaProcessing"
        else part
        for part in parts
        if part["type"] not in _ADDING or part["type"] == "RobertaProcessing"
    ]

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        marks = [[{"SpecialToken": {"id": token, "type_id": kind}} for token in side] for side in (before, behind)]
        return [*marks[0], {"Sequence": {"id": text, "type_id": kind}}, *marks[1]]

    ids = made.convert_tokens_to_ids
    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [ids(token)], "tokens": [token]} for token in before + behind},
    }
    rule = {"type": "Sequence", "processors": [*offsets, template]} if offsets else template
    empty = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}, "added_tokens": []}
    backend.post_processor = Tokenizer.from_str(json.dumps({**empty, "post_processor": rule})).post_processor


def _begins(tokenizer: Any, template: Any, prefix: list[int]) -> bool:
    """Whether chats begin with these ids; so it is said of a template that refuses the simplest of chats."""
    try:
        text = tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return True
    return tokenizer(text, add_special_tokens=False)["input_ids"][: len(prefix)] == prefix


def _begun(made: Any, template: str, marks: list[str]) -> str:
    if _begins(made, template, made.convert_tokens_to_ids(marks)):
        return template
    return f"{{{{ {json.dumps(''.join(marks), ensure_ascii=False)} }}}}{template}"


def _names(tokenizer: Any, sides: tuple[list[int], list[int]]) -> str:
    """The marks before and behind a text, for a message."""
    texts = (" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in sides)
    return " and ".join(f"{text!r} {place}" for text, place in zip(texts, _PLACES, strict=True) if text) or "nothing"
