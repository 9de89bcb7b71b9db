"""The shipped text, and how rows become conversations."""

import pytest
from tokenizers.processors import TemplateProcessing

from cbd_trl.recipe import corpus
from tests.tokenizer import tiny_tokenizer

ROW = {"prompt": "w1 w2", "completion": "w3", "complete": True}


def test_the_shipped_corpus_has_the_rows_its_notice_tells_of():
    try:
        rows = corpus.read_rows()
    except FileNotFoundError:
        pytest.skip("the corpus is not there")
    assert len(rows) == 1332
    assert all(isinstance(row["prompt"], str) and row["completion"] for row in rows)
    assert len(corpus.read_rows(limit=5)) == 5


def test_a_row_is_a_conversation(tokenizer):
    assert corpus.as_chat(ROW, tokenizer) == "<user> w1 w2 </s> <assistant> w3 </s> "


def test_an_answer_that_was_cut_off_has_no_end_mark(tokenizer):
    assert corpus.as_chat({**ROW, "complete": False}, tokenizer) == "<user> w1 w2 </s> <assistant> w3"


def test_without_a_chat_template_prompt_and_answer_are_joined():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert corpus.as_chat(ROW, tokenizer) == "w1 w2\nw3"


def test_every_tenth_row_is_held_out(tokenizer, monkeypatch):
    rows = [{**ROW, "prompt": f"w{number}"} for number in range(1, 31)]
    monkeypatch.setattr(corpus, "read_rows", lambda limit=None: rows[:limit])
    training, held_out = corpus.split(tokenizer)
    assert len(training) == 27
    assert [text.split()[1] for text in held_out] == ["w10", "w20", "w30"]
    assert not set(held_out) & set(training["text"])


def test_the_first_token_is_written_by_the_template_or_the_tokenizer(tokenizer):
    tokenizer.chat_template = "{{ bos_token }} " + tokenizer.chat_template
    assert corpus.as_chat(ROW, tokenizer).startswith("<s> <user>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer(corpus.as_chat(ROW, tokenizer))["input_ids"][:2] == [1, 4]
