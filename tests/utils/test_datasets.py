"""Rows of data sets become the tokens that `trl.SFTTrainer` makes of them, and what it cannot read is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from cbd_trl.trainers.data import check_before_preparing
from cbd_trl.utils.datasets import cut_rows, prepared_rows, sft_dataset, token_rows, training_tokenizer
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import make_config, make_trainer

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% endif %}"
    "{% if mood %}{{ mood }} {% endif %}{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% generation %}{{ m['content'] + ' </s> ' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TOOLS = [
    [{"type": "function", "function": {"name": "w40", "parameters": {"type": "object", "properties": {}}}}],
    [{"type": "function", "function": {"name": "w41", "description": "w3"}}],
]


def _chat(first: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]


CHATS = [_chat("w1 w2", "w3"), _chat("w4", "w5 w6 w7 </s> w8")]
PARTS = {"prompt": [chat[:1] for chat in CHATS], "completion": [chat[1:] for chat in CHATS]}
TURNS = [[{"from": turn["role"], "value": turn["content"]} for turn in chat] for chat in CHATS]
TEXT = {"text": ["w1 w2 w3", "w4 </s>"]}

# Columns, fields of the arguments.
READ: dict[str, tuple[dict[str, list[Any]], dict[str, Any]]] = {
    "text": (TEXT, {}),
    "text of another name": ({"story": ["w1 w2", "w3"], "text": ["w4", "w5"]}, {"dataset_text_field": "story"}),
    "text that begins with the first token": ({"text": ["<s> w1", "w2"]}, {}),
    "prompt and completion": ({"prompt": ["w1 w2", "w3"], "completion": [" w3", " w4 </s>"]}, {}),
    "chats": ({"messages": CHATS}, {}),
    "chats beside text": ({"messages": CHATS, "text": ["w9", "w9"]}, {}),
    "ShareGPT": ({"conversations": TURNS}, {}),
    "tools": ({"messages": CHATS, "tools": TOOLS}, {}),
    "tools in JSON": ({"messages": CHATS, "tools": [json.dumps(tools) for tools in TOOLS]}, {}),
    "tools in some rows": ({"messages": CHATS, "tools": [None, TOOLS[0]]}, {}),
    "arguments of the template": ({"messages": CHATS, "chat_template_kwargs": [{"mood": "w50"}, {"mood": "w51"}]}, {}),
    "ShareGPT with tools": ({"conversations": TURNS, "tools": TOOLS}, {}),
    "parts of chats": (PARTS, {}),
    "parts with everything": (
        {**PARTS, "tools": TOOLS, "chat_template_kwargs": [{"mood": "w50"}, {"tools": None, "mood": None}]},
        {},
    ),
    "another end": (TEXT, {"eos_token": "<user>"}),
    "the assistant alone": ({"messages": CHATS, "tools": TOOLS}, {"assistant_only_loss": True}),
    "cut": ({"messages": CHATS}, {"max_length": 5}),
    "cut in front": (TEXT, {"max_length": 2, "truncation_mode": "keep_end"}),
    "tokens": ({"input_ids": [[7, 8, 9, 10], [11, 2]]}, {"max_length": 3}),
    "tokens, and a row of none": ({"input_ids": [[7, 8], [], [11, 2]]}, {"max_length": None}),
}


def _tokenizer(first: bool, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if first:
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _trained(dataset: Any, tokenizer: PreTrainedTokenizerFast, **args: Any) -> list[list[int]]:
    """What SFTTrainer itself makes of a data set."""
    model: Any = tiny_model("llama", num_hidden_layers=1)
    trainer = SFTTrainer(model, make_config(**args), train_dataset=dataset, processing_class=tokenizer)
    rows: Any = trainer.train_dataset
    return [list(row["input_ids"]) for row in rows]


def _read(dataset: Any, tokenizer: PreTrainedTokenizerFast, **args: Any) -> list[list[int]]:
    return list(token_rows(dataset, tokenizer, make_config(**args)))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("first", [False, True], ids=["no first token", "a first token"])
@pytest.mark.parametrize("name", READ)
def test_rows_are_the_tokens_that_are_trained(name: str, first: bool) -> None:
    columns, args = READ[name]
    tokenizer, dataset = _tokenizer(first), Dataset.from_dict(columns)
    ours, before = _read(dataset, tokenizer, **args), tokenizer.eos_token
    assert tokenizer.eos_token == before
    assert ours == _trained(dataset, _tokenizer(first), **args)
    assert ours == _read(dataset.to_iterable_dataset(), tokenizer, **args)
    whole = prepared_rows(dataset, tokenizer, make_config(**args))
    assert isinstance(whole, Dataset) and ours == [row.tolist() for row in cut_rows(whole, make_config(**args))]
    if "messages" in columns or "conversations" in columns or dataset[0].get("prompt") == CHATS[0][:1]:
        # One first token: the template's.
        assert all(row.count(1) == 1 for row in ours)


@pytest.mark.parametrize("name", ["chats", "tools", "parts of chats"])
def test_a_template_of_a_file_is_that_of_training(name: str, tmp_path: Path) -> None:
    file, dataset = tmp_path / "chat.jinja", Dataset.from_dict(READ[name][0])
    file.write_text(TEMPLATE)
    base, path = _tokenizer(True, None), str(file)
    ours = _read(dataset, base, chat_template_path=path)
    assert base.chat_template is None and training_tokenizer(base, None) is base
    assert (
        ours == _trained(dataset, _tokenizer(True, None), chat_template_path=path) == _read(dataset, _tokenizer(True))
    )


def test_a_template_of_a_tokenizer_is_that_of_training(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"messages": CHATS})
    _tokenizer(True).save_pretrained(tmp_path)
    ours = _read(dataset, _tokenizer(True, None), chat_template_path=str(tmp_path))
    assert ours == _read(dataset, _tokenizer(True))


USABLE: dict[str, tuple[Any, Any]] = {
    "a list of rows": ([{"text": "w1"}, {"text": "w2"}], {"text": ["w1", "w2"]}),
    "rows whose first lacks a column": (
        [{"messages": CHATS[0]}, {"messages": CHATS[1], "tools": TOOLS[0]}],
        {"messages": CHATS, "tools": [None, TOOLS[0]]},
    ),
    "rows read as tables of pandas": (
        Dataset.from_dict({"messages": CHATS}).with_format("pandas"),
        {"messages": CHATS},
    ),
    "a prompt beside chats": (
        Dataset.from_dict({"prompt": ["w1 w2", "w4"], "messages": CHATS}),
        {"messages": CHATS},
    ),
    "preferences beside chats": (
        Dataset.from_dict({"prompt": ["w1", "w4"], "chosen": CHATS, "rejected": CHATS, "messages": CHATS}),
        {"messages": CHATS},
    ),
    "chats beside a prompt and a completion": (
        Dataset.from_dict({"prompt": ["w1", "w4"], "completion": [" w2", " w3"], "messages": CHATS}),
        {"prompt": ["w1", "w4"], "completion": [" w2", " w3"]},
    ),
    "a prompt beside text": (Dataset.from_dict({**TEXT, "prompt": ["w1", "w2"]}), TEXT),
    "an empty chat": (Dataset.from_dict({"messages": [CHATS[0], [], CHATS[1]]}), {"messages": CHATS}),
    "an empty chat first": (Dataset.from_dict({"conversations": [[], *TURNS]}), {"messages": CHATS}),
    "an empty completion": (
        Dataset.from_dict({"prompt": [*PARTS["prompt"], CHATS[0][:1]], "completion": [*PARTS["completion"], []]}),
        PARTS,
    ),
    "rows in another order": (
        Dataset.from_dict({"messages": [CHATS[1], [], CHATS[0]]}).select([2, 1, 0]),
        {"messages": CHATS},
    ),
}


@pytest.mark.parametrize("name", USABLE)
def test_what_trl_would_stumble_over_is_read(name: str) -> None:
    dataset, same = USABLE[name]
    expected = _trained(Dataset.from_dict(same), _tokenizer(True))
    assert _trained(sft_dataset(dataset, "dataset"), _tokenizer(True)) == expected
    assert _read(dataset, _tokenizer(True)) == expected
    if isinstance(dataset, Dataset) and dataset.format["type"] is None:
        assert _read(dataset.to_iterable_dataset(), _tokenizer(True)) == expected


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of."""
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *rest, **options: said.append(text))
    return said


def test_empty_chats_are_counted_once(warnings: list[str]) -> None:
    dataset = Dataset.from_dict({"messages": [CHATS[0], [], CHATS[1], []] * 3})
    kept = sft_dataset(dataset, "the 12 rows")
    assert len(kept) == 6 and sft_dataset(kept, "the 12 rows") is kept
    sft_dataset(dataset, "the 12 rows")
    assert warnings == ["6 of 12 rows of the 12 rows are empty chats, such as row 1: skipped."]
    assert len(list(sft_dataset(dataset.to_iterable_dataset(), "the stream"))) == 6
    assert warnings[1:] == ["There are empty chats in the stream, a stream: they are skipped."]


REFUSED: dict[str, tuple[Any, str]] = {
    "splits": (DatasetDict({"train": Dataset.from_dict(TEXT), "test": Dataset.from_dict(TEXT)}), "'train', 'test'"),
    "no rows": (Dataset.from_dict({"text": []}), "the data is empty"),
    "empty chats alone": ([{"messages": []}], "nothing but empty chats"),
    "other columns": ([{"question": "w1"}], r"\['question'\], and none of the SFT formats"),
    "a prompt alone": ([{"prompt": "w1"}], r"\['prompt'\], and none of the SFT formats"),
    "no text": ([{"text": "w1"}, {"text": "w1"}, {"text": None}], "Row 2 .*None in the column 'text'"),
    "no text in a row of unequal columns": ([{"text": "w1"}, {"body": "w1"}], "Row 1 .*None in the column 'text'"),
    "no chat": ([{"messages": None}, {"messages": CHATS[0]}], "Row 0 .*None in the column 'messages'"),
    "no completion": (
        [{"prompt": "w1", "completion": "w1"}, {"prompt": "w1", "completion": None}],
        "Row 1 .*None in the column 'completion'",
    ),
    "no arguments of the template": (
        [{"messages": CHATS[0], "chat_template_kwargs": {"mood": "w1"}}, {"messages": CHATS[1]}],
        "Row 1 .*None in the column 'chat_template_kwargs'",
    ),
    "numbers": ([{"text": 3}], r"'text' of the data holds 3 \(int\), and must hold texts"),
    "words": ([{"text": ["w1"]}], r"'text' of the data holds \['w1'\] \(list\)"),
    "chats in JSON": ([{"messages": json.dumps(CHATS[0])}], r"'messages' of the data holds .* \(str\).*json.loads"),
    "texts for chats": ([{"messages": ["w1"]}], r"'messages' of the data holds .* \(list\).*'role'"),
    "roles in the other column": ([{"conversations": CHATS[0]}], "Rename the column to `messages`"),
    "no message": ([{"messages": CHATS[0]}] * 3 + [{"messages": [None]}], "Row 3 .*None for a message"),
    "no role": (
        [{"messages": CHATS[0]}, {"messages": [*CHATS[1], {"role": None, "content": "w1"}]}],
        "Row 1 .*None for a message, or for who wrote it, in the column 'messages'",
    ),
    "no role in a turn": (
        [{"conversations": TURNS[0]}, {"conversations": [{"from": None, "value": "w1"}]}],
        "Row 1 .*in the column 'conversations'",
    ),
    "tools that are no JSON": ([{"messages": CHATS[0], "tools": "[{"}], r"'tools' of the data holds '\[{' \(str\)"),
    "text and a chat": (
        [{"prompt": "w1", "completion": CHATS[0][1:]}],
        r"\['prompt', 'completion'\] of the data hold text and messages",
    ),
    "a list of numbers for a completion": (
        [{"prompt": [1], "completion": [2]}],
        r"'prompt' of the data holds \[1\] \(list\).*must hold texts, or lists of messages",
    ),
    "arguments of the template in JSON": (
        [{"messages": CHATS[0], "chat_template_kwargs": "{}"}],
        r"'chat_template_kwargs' of the data holds '{}' \(str\), and must hold dicts",
    ),
    "token ids that are none": ([{"input_ids": [1.0, 2.0]}], r"'input_ids' .*holds \[1.0, 2.0\] .*token ids"),
    "a token id below 0": ([{"input_ids": [7, -100]}], r"'input_ids' .*holds \[7, -100\]"),
    "fewer labels than tokens": ([{"input_ids": [7, 8], "labels": [8]}], "'labels' .*has 1 entries for 2 tokens"),
    "values of several types": ([{"text": "w1"}, {"text": 3}], "several types in a column"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    dataset, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sft_dataset(dataset, "the data")


@pytest.mark.parametrize("dataset", [3, "data.jsonl", {"text": ["w1"]}, ["w1", "w2"]], ids=repr)
def test_what_is_no_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"the data is a .*a list of rows"):
        sft_dataset(dataset, "the data")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "w1"}, {"text": None}], "Row 1 .*None in the column 'text'"),
        ([{"text": "w1"}, {"body": "w1"}], r"Row 1 of the data has the columns \['body'\] and no 'text'"),
        (
            [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": CHATS[0]}],
            "of row 1 of the data hold text and messages",
        ),
        (
            [{"prompt": CHATS[0][:1], "completion": CHATS[0][1:]}, {"prompt": "w1", "completion": "w2"}],
            "of row 1 of the data hold text and messages, or not what those of the first row hold",
        ),
        ([{"text": "w1"}, {"text": 3}], r"'text' of row 1 of the data holds 3 \(int\)"),
        ([{"messages": CHATS[0]}, {"messages": [{"role": None}]}], "'messages' of row 1 of the data holds"),
        ([{"messages": CHATS[0]}, {"messages": None}], "Row 1 .*None in the column 'messages'"),
    ],
)
def test_a_row_of_a_stream_is_refused_when_it_is_met(rows: list[dict[str, Any]], message: str) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows))
    read = iter(sft_dataset(stream, "the data"))
    assert next(read) == rows[0]
    with pytest.raises(ValueError, match=message):
        next(read)


def test_rows_in_a_format_are_read() -> None:
    rows = Dataset.from_dict({"text": ["w1", "w2"], "words": ["w3", "w4"]})
    made = rows.with_transform(lambda batch: {"text": batch["words"]})
    for formatted in (rows.with_format("numpy"), rows.with_format("numpy", columns=["text"])):
        assert _read(formatted, _tokenizer(False)) == [[7, 2], [8, 2]]
    assert _read(made, _tokenizer(False)) == [[9, 2], [10, 2]]


def test_the_assistant_alone_needs_messages() -> None:
    for columns in (TEXT, {"conversations": TURNS}):
        with pytest.raises(ValueError, match="assistant_only_loss=True needs chats as `messages`"):
            _read(Dataset.from_dict(columns), _tokenizer(False), assistant_only_loss=True)


def test_a_tokenizer_is_needed_and_its_end_known() -> None:
    with pytest.raises(ValueError, match="processing_class"):
        prepared_rows(Dataset.from_dict(TEXT), None)
    with pytest.raises(ValueError, match="eos_token='<end>'"):
        _read(Dataset.from_dict(TEXT), _tokenizer(False), eos_token="<end>")
    for path in ("no/tokenizer", __file__):
        with pytest.raises(ValueError, match=r"chat_template_path=.*\.jinja"):
            _read(Dataset.from_dict(TEXT), _tokenizer(False), chat_template_path=path)


def test_a_row_that_the_template_cannot_read_is_refused_by_its_number() -> None:
    unsaid = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None}]
    alternates = "{% if messages[0].role != 'user' %}{{ raise_exception('alternate') }}{% endif %}w1"
    for row, template, said in (
        (unsaid, TEMPLATE, "content"),
        (CHATS[0][::-1], alternates, "alternate"),
    ):
        dataset, tokenizer = Dataset.from_dict({"messages": [*CHATS, row, CHATS[0]]}), _tokenizer(False, template)
        for read in (
            lambda dataset, tokenizer: _read(dataset, tokenizer, max_length=9),
            lambda dataset, tokenizer: prepared_rows(dataset, tokenizer, make_config()),
            lambda dataset, tokenizer: check_before_preparing(
                dataset.select([2]), dataset, make_config(), tokenizer, tiny_model("llama").config
            ),
            lambda dataset, tokenizer: make_trainer(train_dataset=dataset, processing_class=tokenizer),
        ):
            with pytest.raises(ValueError, match=rf"template cannot read row [02] \(from 0\) of .*{said}"):
                read(dataset, tokenizer)
