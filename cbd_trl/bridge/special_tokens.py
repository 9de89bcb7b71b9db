"""Carry the special tokens that a tokenizer adds to every text, such as BOS, over to another tokenizer."""

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
_POSITIONS = ("before it", "after it")
_PROBE = [{"role": "user", "content": "a"}]


def carry_over_special_tokens(
    old_tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Copy a tokenizer so that it adds to every text the special tokens that another one adds.

    A model trained with BOS before every text is far worse without it: Gemma 3 270M, given the vocabulary of SmolLM2,
    whose tokenizer adds nothing, has 6.4 nats per token instead of 3.6. What the new tokenizer adds and the old one
    does not is left out. If chats in the old template begin with these tokens, or the old tokenizer has no template,
    the new template writes them first.

    Args:
        old_tokenizer: the model's.
        new_tokenizer: the one to give the model; it is not changed.

    Returns:
        the copy, to transplant with, to train with and to save. Every token keeps its id; a special token without a
        counterpart in the new tokenizer is added after the others.

    Raises:
        ValueError: the new tokenizer has a token of the same text with another role.
    """
    old: Any = old_tokenizer
    made: Any = copy.deepcopy(new_tokenizer)
    around: list[list[str]] = []
    for ids in marks_around(old):
        around.append([])
        for index in ids:
            if counterpart(old, made, index) is None:
                _add(made, old, index)
            around[-1].append(made.convert_ids_to_tokens(counterpart(old, made, index)))
    _set_rule(made, *around)
    prefix = marks_around(old)[0]
    if made.chat_template and prefix and (not old.chat_template or _begins(old, old.chat_template, prefix)):
        templates: Any = made.chat_template
        if isinstance(templates, str):
            made.chat_template = _with_prefix(made, templates, around[0])
        else:
            made.chat_template = {name: _with_prefix(made, one, around[0]) for name, one in templates.items()}
    return made


def warn_of_other_special_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Log a warning if a new tokenizer adds other special tokens to a text than those a model was trained with.

    Args:
        old: the model's tokenizer.
        new: the one to give it.
    """
    wanted = tuple([counterpart(old, new, index) for index in ids] for ids in marks_around(old))
    if wanted == marks_around(new):
        return
    ours, theirs = (_names(tokenizer, marks_around(tokenizer)) for tokenizer in (old, new))
    logger.warning(
        f"Around a text the model's tokenizer adds {ours}, the new one {theirs}: a model predicts worse if texts do "
        "not begin as in its training, and far worse without a BOS that was always there. Make the new tokenizer add "
        "the same before the transplant, and train with it and save it: new_tokenizer = "
        "cbd_trl.bridge.carry_over_special_tokens(old_tokenizer, new_tokenizer)."
    )


def renumber(rule: dict[str, Any] | None, ids: Mapping[str, int]) -> None:
    """Change the ids in the post-processor of a tokenizer.json to those of another vocabulary.

    Args:
        rule: the entry of the file, changed in place; None where there is none.
        ids: {token: id} of at least all tokens that it names.
    """
    for part in _parts(rule):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [ids[token] for token in special["tokens"]]
        for role in ("sep", "cls"):
            if role in part:
                part[role] = [part[role][0], ids[part[role][0]]]


def _parts(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flatten nested sequences of post-processors."""
    if rule is None:
        return []
    return [part for one in rule["processors"] for part in _parts(one)] if rule["type"] == "Sequence" else [rule]


def _add(made: Any, old: Any, index: int) -> None:
    """Add a special token of the old tokenizer to the new one."""
    content = old.convert_ids_to_tokens(index)
    if content in made.get_vocab():
        raise ValueError(
            f"The model's tokenizer adds {content!r} to a text, and the new one has a token of that text with another "
            "role, so it cannot be carried over. Give that role to a token of another text first."
        )
    made.add_tokens([AddedToken(content, special=True, normalized=False)])
    if index == old.bos_token_id:
        made.bos_token = content


def _set_rule(made: Any, before: list[str], after: list[str]) -> None:
    """Make a tokenizer add these special tokens before and after a text, and no others."""
    backend = made.backend_tokenizer
    parts = _parts(component_json(backend.post_processor))
    # Of RobertaProcessing its handling of offsets is kept.
    offsets = [
        {"type": "ByteLevel", "use_regex": True, **{name: part[name] for name in ("add_prefix_space", "trim_offsets")}}
        if part["type"] == "RobertaProcessing"
        else part
        for part in parts
        if part["type"] not in _ADDING or part["type"] == "RobertaProcessing"
    ]

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        first, last = (
            [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens] for tokens in (before, after)
        )
        return [*first, {"Sequence": {"id": text, "type_id": kind}}, *last]

    ids = made.convert_tokens_to_ids
    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [ids(token)], "tokens": [token]} for token in before + after},
    }
    rule = {"type": "Sequence", "processors": [*offsets, template]} if offsets else template
    empty = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}, "added_tokens": []}
    backend.post_processor = Tokenizer.from_str(json.dumps({**empty, "post_processor": rule})).post_processor


def _begins(tokenizer: Any, template: Any, prefix: list[int]) -> bool:
    """Tell whether chats begin with these ids; True as well for a template that rejects the simplest of chats."""
    try:
        text = tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return True
    return tokenizer(text, add_special_tokens=False)["input_ids"][: len(prefix)] == prefix


def _with_prefix(made: Any, template: str, tokens: list[str]) -> str:
    """Put tokens at the beginning of a template, unless its chats begin with them already."""
    if _begins(made, template, made.convert_tokens_to_ids(tokens)):
        return template
    return f"{{{{ {json.dumps(''.join(tokens), ensure_ascii=False)} }}}}{template}"


def _names(tokenizer: Any, around: tuple[list[int], list[int]]) -> str:
    """Name the special tokens before and after a text, for a message."""
    texts = (" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in around)
    return (
        " and ".join(f"{text!r} {position}" for text, position in zip(texts, _POSITIONS, strict=True) if text)
        or "nothing"
    )
