"""What a tokenizer adds to a text by itself, carried over to another: proved by ids and by a model's logits."""

from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbd_trl.bridge import carry_over_special_tokens, match_vocabularies, transplant_vocabulary
from cbd_trl.utils.blocks import marks_around
from cbd_trl.utils.tokenizers import tokenizer_hash
from tests.bridge.tokenizers_of_kinds import TRICKY, letters, make_tokenizer
from tests.tiny import tiny_model

_RULES = {"none": "$A", "bos": "<s> $A", "both": "<s> $A </s>", "two": "<s> <user> $A", "end": "$A </s>"}


def _adding(tokenizer: PreTrainedTokenizerFast, rule: str, beside: str = "") -> PreTrainedTokenizerFast:
    """Make a tokenizer add special tokens by one of `_RULES`, by one post-processor or beside others."""
    ids = tokenizer.get_vocab()
    marks = [(token, ids[token]) for token in ("<s>", "</s>", "<user>") if token in _RULES[rule]]
    template = processors.TemplateProcessing(single=_RULES[rule], pair=f"{_RULES[rule]} $B:1", special_tokens=marks)
    offsets = processors.ByteLevel(trim_offsets=True)
    chosen = {"": template, "sequence": processors.Sequence([offsets, template]), "offsets": offsets}
    if beside == "roberta":
        chosen["roberta"] = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    tokenizer.backend_tokenizer.post_processor = chosen[beside]
    return tokenizer


def _loaded(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize(
    ("kind", "theirs", "beside"),
    [
        ("byte_level", "none", ""),
        ("byte_level", "both", "sequence"),
        ("byte_level", "both", "roberta"),
        ("byte_level", "none", "offsets"),
        ("byte_fallback", "bos", ""),
    ],
)
def test_a_text_gets_what_the_old_tokenizer_adds(
    rule: str, kind: str, theirs: str, beside: str, tmp_path: Path
) -> None:
    old, new = _adding(make_tokenizer("byte_level", 300), rule), _adding(make_tokenizer(kind, 500, 1), theirs, beside)
    before = new.backend_tokenizer.to_str()
    made = carry_over_special_tokens(old, new)
    assert new.backend_tokenizer.to_str() == before and made.get_vocab() == new.get_vocab()
    front, behind = (old.convert_ids_to_tokens(ids) for ids in marks_around(old))
    for reader in (made, _loaded(made, tmp_path)):
        for text in TRICKY:
            bare = new.convert_ids_to_tokens(new(text, add_special_tokens=False)["input_ids"])
            assert reader.convert_ids_to_tokens(reader(text)["input_ids"]) == [*front, *bare, *behind]
            assert reader(text, add_special_tokens=False)["input_ids"] == new.convert_tokens_to_ids(bare)
        pair = [reader(text, add_special_tokens=False)["input_ids"] for text in ("ba", "to")]
        ids = reader.convert_tokens_to_ids
        assert reader("ba", "to")["input_ids"] == [t for part in pair for t in (*ids(front), *part, *ids(behind))]
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(made)
    if beside:
        assert made("  ba", return_offsets_mapping=True, add_special_tokens=False) == new(
            "  ba", return_offsets_mapping=True, add_special_tokens=False
        )
    assert carry_over_special_tokens(made, made)("ba")["input_ids"] == made("ba")["input_ids"]


def _spelling(rule: str, *tokens: str, **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = letters(*tokens, **roles)
    return _adding(tokenizer, rule) if rule else tokenizer


@pytest.mark.parametrize(
    "roles",
    [
        {"bos_token": "<begin>", "eos_token": "<end>"},
        {"bos_token": "<text>", "eos_token": "<text>", "pad_token": "<text>"},
        {"eos_token": "<end>"},
        {"unk_token": "<?>"},
    ],
    ids=["own", "one for both", "no begin", "neither"],
)
def test_a_model_predicts_the_same_for_a_text_where_its_begin_is_carried_over(
    roles: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    old = _spelling("bos", "a", "b", "c", bos_token="<s>", eos_token="</s>")
    new = _spelling("", "c", "b", "a", **roles)
    model = tiny_model("llama", vocab_size=len(old))
    transplant_vocabulary(model, old, new)
    assert "adds '<s>' before it, the new one nothing" in caplog.text and "carry_over_special_t" in caplog.text
    caplog.clear()
    made = carry_over_special_tokens(old, new)
    moved = transplant_vocabulary(model, old, made)
    assert not caplog.text and made.get_vocab().items() >= new.get_vocab().items()
    ours, theirs = (tokenizer("abcab", return_tensors="pt")["input_ids"] for tokenizer in (old, made))
    assert match_vocabularies(old, made).source[int(theirs[0, 0])] == old.bos_token_id
    assert moved.config.bos_token_id == made.bos_token_id == theirs[0, 0] or roles == {"eos_token": "<end>"}
    columns = [[tokenizer.get_vocab()[token] for token in "abc"] for tokenizer in (old, made)]
    with torch.no_grad():
        expected, found = model(ours).logits[..., columns[0]], moved(theirs).logits[..., columns[1]]
    assert torch.equal(found, expected)


def test_the_other_way_round_nothing_is_added(caplog: pytest.LogCaptureFixture) -> None:
    old = _spelling("", "a", "b", eos_token="</s>")
    new = _spelling("bos", "b", "a", bos_token="<s>", eos_token="</s>")
    transplant_vocabulary(tiny_model("llama", vocab_size=len(old)), old, new)
    assert "adds nothing, the new one '<s>' before it" in caplog.text
    made = carry_over_special_tokens(old, new)
    assert made("ab")["input_ids"] == new("ab", add_special_tokens=False)["input_ids"] and len(made) == len(new)


_BEGUN, _BARE = (
    begin + "{%- for m in messages %}<user>{{ m['content'] }}</s>{%- endfor %}" for begin in ("{{ bos_token }}", "")
)


@pytest.mark.parametrize(
    ("ours", "theirs", "begins"),
    [(None, _BARE, 1), (None, _BEGUN, 1), (_BEGUN, _BARE, 1), (_BARE, _BARE, 0), (_BEGUN, {"x": _BARE}, 1)],
)
def test_chats_begin_as_those_of_the_old_template(ours: str | None, theirs: str | dict, begins: int) -> None:
    old, new = _adding(make_tokenizer(size=300), "bos"), make_tokenizer(size=400, seed=1)
    old.chat_template, new.chat_template = ours, theirs
    made = carry_over_special_tokens(old, new)
    named = {} if isinstance(theirs, str) else {"chat_template": "x"}
    chat = [{"role": "user", "content": "ba"}]
    ids = made.apply_chat_template(chat, return_dict=False, **named)
    assert made.convert_ids_to_tokens(ids)[: begins + 1] == ["<s>", "<user>"][1 - begins :]
    assert ids.count(made.bos_token_id) == begins and new.chat_template == theirs


def test_a_name_with_another_role_is_refused() -> None:
    old = _spelling("bos", "a", bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="'<s>'"):
        carry_over_special_tokens(old, letters("a", eos_token="<s>"))
