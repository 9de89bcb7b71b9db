"""Which rows are prompts, what the teacher reads of them, and which are refused."""

import re

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from cbd_trl.generation.prompts import Prompts
from tests.bridge.tokenizers_of_kinds import KINDS, TRICKY, corpus, make_tokenizer
from tests.generation.helpers import alone, complete, rows_of, tiny_teacher
from tests.tokenizer import tiny_tokenizer

CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
]
ANSWER = {"role": "assistant", "content": "w5"}


def test_a_text_is_read_behind_what_the_tokenizer_puts_before_it():
    tokenizer = tiny_tokenizer()
    assert Prompts([{"prompt": "w1 w2"}], tokenizer)[0].ids == tokenizer.convert_tokens_to_ids(["w1", "w2"])
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    # What it puts behind a text would end it before the completion.
    assert Prompts([{"prompt": "w1 w2"}], tokenizer)[0].ids == tokenizer.convert_tokens_to_ids(["<s>", "w1", "w2"])
    assert Prompts([{"prompt": ""}], tokenizer)[0].ids == [1]


def test_an_empty_prompt_begins_with_bos():
    assert Prompts([{"prompt": ""}], tiny_tokenizer())[0].ids == [1]
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"Row 0: the prompt is empty, .* no BOS token .*prompt_tokens=1"):
        Prompts([{"prompt": ""}], tokenizer)[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT},
        {"messages": CHAT},
        {"messages": [*CHAT, ANSWER]},
        {"messages": [{**m, "x": None} for m in CHAT]},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]},
        {"prompt": "w1 w2", "messages": CHAT},
    ],
)
def test_a_conversation_is_read_in_the_chat_template(row):
    tokenizer = tiny_tokenizer()
    prompt = Prompts([row], tokenizer)[0]
    assert prompt.columns == {"prompt": CHAT} and not prompt.is_text
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids == expected["input_ids"]
    assert tokenizer.decode(prompt.ids[-1]) == "<assistant>"


def test_what_the_template_is_given_besides_reaches_it_and_the_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] if tools }} {{ mood }} " + tokenizer.chat_template
    row = {"messages": CHAT, "tools": [{"name": "w7"}], "chat_template_kwargs": {"mood": "w8"}}
    assert tokenizer.decode(Prompts([row], tokenizer)[0].ids).startswith("w7 w8 <user>")
    assert Prompts([{**row, "tools": '[{"name": "w7"}]'}], tokenizer)[0].ids == Prompts([row], tokenizer)[0].ids
    written = rows_of(complete(tmp_path / "out.jsonl", dataset=[row], processing_class=tokenizer).file)
    assert written[0]["tools"] == row["tools"] and written[0]["chat_template_kwargs"] == row["chat_template_kwargs"]


def test_conversations_are_answered_by_the_assistant(tmp_path):
    data = Dataset.from_list([{"messages": [*CHAT, ANSWER]}, {"messages": CHAT[:1]}])
    rows = rows_of(complete(tmp_path / "out.jsonl", dataset=data).file)
    assert [row["prompt"] for row in rows] == [CHAT, CHAT[:1]]
    for row in rows:
        (turn,) = row["completion"]
        assert turn["role"] == "assistant"
        assert re.fullmatch(r"(w\d+ ?)*", turn["content"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_tokens_of_a_text_are_its_prompt(kind):
    tokenizer = make_tokenizer(kind)
    for text in [*corpus()[:5], *(TRICKY[:2] if kind == "byte_level" else [])]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = Prompts([{"text": text}], tokenizer, len(ids))[0]
        assert whole.columns["prompt"] == text and whole.ids == ids
        for count in (1, 3, 9):
            prompt = Prompts([{"text": text}], tokenizer, count)[0]
            assert text.startswith(prompt.columns["prompt"]) and len(prompt.columns["prompt"]) < len(text)
            # A character that the cut falls into is taken whole.
            assert count <= len(prompt.ids) <= count + 3
            assert prompt.ids[: count - 1] == ids[: count - 1]
    assert Prompts([{"text": text}], tokenizer, 0)[0].columns == {"prompt": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_one_text(tmp_path, kind):
    tokenizer = make_tokenizer(kind)
    model = tiny_teacher(vocab_size=len(tokenizer))
    data = [{"text": text} for text in corpus()[:8]]
    options = {"processing_class": tokenizer, "prompt_tokens": 3, "do_sample": False}
    rows = rows_of(complete(tmp_path / "out.jsonl", model, data, **options).file)
    for number, row in enumerate(rows):
        ids = Prompts(data, tokenizer, 3)[number].ids
        text = tokenizer.decode([*ids, *alone(model, ids)], skip_special_tokens=True)
        # What is left of a character behind the last whole one is no text of the teacher's.
        assert row["prompt"] + row["completion"] in (text, text.rstrip("\ufffd"))
    assert not any(row["completion"].endswith("\ufffd") for row in rows if row["finish_reason"] == "length")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (iter([]), {}, "The prompts are a list_iterator, a stream: .* needs rows by number"),
        ([], {}, "dataset given as dataset is empty"),
        ([{"question": "w1"}], {}, r"columns \['question'\], and no prompt: it needs `prompt`"),
        ([{"text": "w1"}], {}, "prompt_tokens=None for a dataset of texts"),
        ([{"text": "w1"}], {"prompt_tokens": -1}, "prompt_tokens=-1 for a dataset of texts"),
        ([{"prompt": "w1"}], {"prompt_tokens": 3}, "prompt_tokens=3 .* has 'prompt'"),
        ([{"prompt": 3}], {}, r"prompt.* holds 3 \(int\), and must hold texts, or lists of messages"),
        ([{"prompt": "w1"}, {"prompt": None}], {}, "Row 1 .*None in the column 'prompt'"),
        ([{"text": ["w1"]}], {"prompt_tokens": 1}, r"text.* holds \['w1'\] \(list\), and must hold texts"),
        ([{"messages": "w1"}], {}, "messages.* holds 'w1' .*, and must hold lists of messages"),
        ([{"messages": []}], {}, "nothing but empty chats"),
        ([{"messages": ["w1"]}], {}, r"messages.* holds \['w1'\] .*, and must hold lists of messages with 'role'"),
        ([{"messages": [ANSWER]}], {}, "Row 0: no turn stands before the assistant's"),
        ([{"prompt": [*CHAT, ANSWER]}], {}, "Row 0: the prompt ends with a turn of the assistant.*name the column"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        Prompts(rows, tiny_tokenizer(), **options).check(None, range(len(rows)))


def test_a_conversation_needs_a_chat_template_that_reads_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"Row 0: the teacher's chat template cannot read it \(roles must alternate\)"
    ):
        Prompts([{"prompt": CHAT}], tokenizer)[0]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Row 0 is a conversation, .* no chat template .* prompts as text"):
        Prompts([{"prompt": CHAT}], tokenizer)[0]


def test_empty_chats_are_skipped():
    prompts = Prompts([{"messages": []}, {"messages": CHAT}, {"messages": []}], tiny_tokenizer())
    assert len(prompts) == 1 and prompts[0].columns == {"prompt": CHAT}


def test_a_tokenizer_that_does_not_tell_places_cannot_cut_texts(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"offsets of its tokens .*Give a dataset with `prompt`"):
        Prompts([{"text": "w1 w2"}], tokenizer, 1)
