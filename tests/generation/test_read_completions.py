"""Files of completions as servers write them."""

import json
import logging

import pytest
from trl import SFTConfig, SFTTrainer

from cbd_trl.generation import read_completions
from cbd_trl.utils.datasets import token_rows
from tests.generation.helpers import complete, rows_of
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

ASKED = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]
ANSWERED = [{"role": "assistant", "content": "w2 w3"}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def request(name, **body):
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **body}}


def result(name, *choices, **other):
    return {"id": "x", "custom_id": name, "response": {"status_code": 200, "body": {"choices": choices}}, **other}


def choice(text, reason="stop", **message):
    return {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}


def test_fine_tuning_files(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]}
    data = read_completions(
        write(tmp_path / "f", {"messages": ASKED + ANSWERED}, "", {"messages": [ASKED[0], parts, *ANSWERED]})
    )
    assert data.column_names == ["messages"]
    assert data[0] == data[1] == {"messages": ASKED + ANSWERED}


@pytest.mark.parametrize("row", [{"prompt": "w1", "completion": "w2"}, {"prompt": ASKED, "completion": ANSWERED}])
def test_prompts_and_completions(tmp_path, row):
    data = read_completions(write(tmp_path / "f", row, {**row, "finish_reason": "length"}))
    assert data.to_list() == [{**row, "finish_reason": None}, {**row, "finish_reason": "length"}]
    assert read_completions(write(tmp_path / "f", row)).to_list() == [row]


def test_results_of_the_batch_interface_find_their_prompts(tmp_path):
    requests = write(tmp_path / "in", request("a", messages=ASKED), request("b", messages=ASKED[1:]))
    found = write(
        tmp_path / "out",
        result("b", choice("w4", refusal=None), choice("w5", "length"), error=None),
        result("a", choice("w6")),
    )
    data = read_completions(found, requests=requests).to_list()
    assert [row["prompt"] for row in data] == [ASKED[1:], ASKED[1:], ASKED]
    assert [row["completion"][0]["content"] for row in data] == ["w4", "w5", "w6"]
    assert [row["finish_reason"] for row in data] == ["stop", "length", "stop"]
    assert len(read_completions(found, requests=requests, drop_truncated=True)) == 2


def test_texts_as_the_older_interface_gives_them(tmp_path):
    plain = {"choices": [{"text": "w2", "finish_reason": "stop"}]}
    expected = {"prompt": "w1", "completion": "w2", "finish_reason": "stop"}
    assert read_completions(write(tmp_path / "f", {**plain, "prompt": "w1"})).to_list() == [expected]
    requests = write(tmp_path / "in", request("a", prompt="w1"))
    for line in (result("a", *plain["choices"]), {**plain, "custom_id": "a"}, {**plain, "id": "a"}):
        assert read_completions(write(tmp_path / "f", line), requests=requests).to_list() == [expected]
    chat = {"messages": ASKED, "choices": [choice("w2 w3")]}
    assert read_completions(write(tmp_path / "f", chat))[0]["completion"] == ANSWERED


def test_tools_and_arguments_of_the_template_are_kept(tmp_path):
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {"type": "object"}}}]
    given = {"tools": tools, "chat_template_kwargs": {"mood": "w8"}}
    kept = {"tools": json.dumps(tools), "chat_template_kwargs": {"mood": "w8"}}
    requests = write(tmp_path / "in", request("a", messages=ASKED, **given), request("b", messages=ASKED))
    found = write(tmp_path / "out", result("a", choice("w2 w3")), result("b", choice("w4")))
    data = read_completions(found, requests=requests)
    row = {"prompt": ASKED, "completion": ANSWERED, "finish_reason": "stop"}
    assert data[0] == {**row, **kept} and data[1]["tools"] is None
    assert read_completions(write(tmp_path / "f", {"messages": ASKED + ANSWERED, **given}))[0] == {
        "messages": ASKED + ANSWERED,
        **kept,
    }
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] if tools }} {{ mood }} " + tokenizer.chat_template
    written = complete(tmp_path / "written", dataset=[{"messages": ASKED, **given}], processing_class=tokenizer).file
    # An older datasets sorts the keys of a column of objects.
    found = read_completions(written)[0]
    assert json.loads(found["tools"]) == tools
    assert found | {"completion": None, "finish_reason": None, "tools": kept["tools"]} == {
        **{"prompt": ASKED, "completion": None, "finish_reason": None},
        **kept,
    }
    (ids,) = token_rows([read_completions(written)[0]], tokenizer)
    assert tokenizer.decode(ids).startswith("w7 w8 ")


def test_failed_responses_are_left_out_and_counted(tmp_path, caplog):
    requests = write(tmp_path / "in", *(request(name, messages=ASKED) for name in "abcdef"))
    refused = {"status_code": 429, "body": {"error": {"message": "rate limit"}}}
    found = write(
        tmp_path / "out",
        {"custom_id": "a", "response": refused, "error": None},
        {"custom_id": "b", "response": None, "error": {"code": "batch_expired"}},
        result("c"),
        result("d", choice(None, "tool_calls", tool_calls=[])),
        {"custom_id": "e", "response": None},
        result("f", choice("w2")),
    )
    with caplog.at_level(logging.WARNING):
        assert len(read_completions(found, requests=requests)) == 1
    assert '5 failed responses are left out, such as line 1: {"error": {"message": "rate limit"}}' in caplog.text
    write(tmp_path / "out", *found.read_text().splitlines()[:5])
    with pytest.raises(
        ValueError, match=r"gives no row: 5 responses failed, and 0 completions were cut off.*rate limit"
    ):
        read_completions(found, requests=requests)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON .*Lines are"),
        (["", "[]"], "line 2 holds a list, and must hold an object"),
        ([{"question": "w1"}], r"line 1: it has the keys \['question'\]. Lines are"),
        ([{"prompt": "w1"}], r"line 1: it has the keys \['prompt'\]"),
        (
            [{"messages": ASKED}, {"prompt": "w1", "completion": "w2"}],
            "line 2 has a prompt as text, and the first row",
        ),
        (
            [{"prompt": "w1", "completion": "w2"}, {"prompt": ASKED, "completion": ANSWERED}],
            "line 2 has a conversation",
        ),
        ([{"prompt": "w1", "completion": ANSWERED}], "line 1: one of prompt and completion is a text and the other"),
        ([{"prompt": "w1", "choices": [choice("w2")]}], "line 1: one of prompt and answer is a text and the other"),
        ([{"prompt": 3, "completion": "w2"}], "line 1: prompt is 3, and must be messages"),
        ([{"messages": []}], r"line 1: messages is \[\], and must be messages"),
        ([{"messages": ["w1"]}], "line 1: a message is 'w1', and must have a `role`"),
        ([{"messages": [{"role": "user", "content": None}]}], "line 1: a message's content is None, and must be text"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], "images and tool calls are not"),
        ([{"prompt": "w1", "choices": ["w2"]}], "line 1: a choice is 'w2', and must be an object"),
        ([result("a", choice("w2"))], r"line 1: a response \(custom_id 'a'\) without its prompt: .*`requests`"),
        ([{"prompt": "w1", "completion": "w2", "finish_reason": "length"}], "0 responses failed, and 1 completions"),
        ([], "gives no row: .* Lines are"),
    ],
)
def test_other_lines_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_completions(write(tmp_path / "f", *lines), drop_truncated=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [request("b", messages=ASKED)],
            "out, line 1: no line of `requests` has its custom_id 'a': the two files are of",
        ),
        (
            [request("a", messages=ASKED)] * 2,
            "in, line 2: custom_id is 'a', and must be a text that no other line has",
        ),
        ([{"body": {"messages": ASKED}}], "in, line 1: custom_id is None"),
        ([{"custom_id": "a", "body": {"input": "w1"}}], "in, line 1: the request has neither `messages` nor `prompt`"),
    ],
)
def test_requests_that_do_not_fit_are_named(tmp_path, lines, message):
    found = write(tmp_path / "out", result("a", choice("w2")))
    with pytest.raises(ValueError, match=message):
        read_completions(found, requests=write(tmp_path / "in", *lines))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*no.jsonl. Give a JSON-lines file"):
        read_completions(tmp_path / "no.jsonl")


def test_what_was_generated_is_read_back(tmp_path):
    file = complete(tmp_path / "out.jsonl").file
    assert read_completions(file).to_list() == rows_of(file)


def test_sft_trains_on_what_a_server_answered(tmp_path):
    requests = write(tmp_path / "in", request("a", messages=ASKED), request("b", messages=ASKED[1:]))
    found = write(tmp_path / "out", result("a", choice("w2 w3")), result("b", choice("w4", "length")))
    args = SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    data, tokenizer = read_completions(found, requests=requests), tiny_tokenizer()
    trainer = SFTTrainer(
        tiny_model("llama", num_hidden_layers=1), args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    example = trainer.train_dataset[0]
    assert tokenizer.decode([token for token in example["labels"] if token != -100]).split() == ["w2", "w3", "</s>"]
