"""Token ids in a model's configs, after its vocabulary has changed."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.vocabulary import VocabularyMatch

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings of generation that name old ids, whose words need not be single tokens now.
_DROPPED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


def named_ids(model: Any) -> set[int]:
    """The ids that a model's configs name: begin, end (there may be several) and padding.

    Args:
        model: of transformers.
    """
    configs = (model.config.get_text_config(), model.generation_config)
    found = [getattr(config, role, None) for config in configs if config is not None for role in _ROLES]
    return {index for ids in found if ids is not None for index in (ids if isinstance(ids, list) else [ids])}


def move_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, match: VocabularyMatch) -> None:
    """Have the configs of a model name the ids of its new tokenizer.

    Args:
        model: its config and generation config are changed in place. What its generation settings say about single
            old tokens (suppressed ones, forced ones) is dropped.
        tokenizer: the new one. Of several ends of a text, those it has not itself are kept where they were taken over.
        match: from the old vocabulary to the new one.
    """
    new_ids: dict[int, int] = {}
    for new, old in sorted(match.source.items()):
        new_ids.setdefault(old, new)
    for config in (model.config.get_text_config(), model.generation_config):
        if config is None:
            continue
        for role in _ROLES:
            before = getattr(config, role, None)
            listed = before if isinstance(before, list) else [before]
            kept = [new_ids[old] for old in listed if old in new_ids]
            own = getattr(tokenizer, role)
            if own is not None:
                kept = [own, *(index for index in kept if index != own and isinstance(before, list))]
            setattr(config, role, kept if isinstance(before, list) and len(kept) > 1 else next(iter(kept), None))
    for name in _DROPPED:
        if getattr(model.generation_config, name, None) is not None:
            setattr(model.generation_config, name, None)
