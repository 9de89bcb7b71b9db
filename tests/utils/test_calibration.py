"""Rows of every SFT format as blocks of tokens."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from cbd_trl.utils.blocks import calibration_length, token_blocks
from tests.tiny import FAMILIES, own_names, tiny_model
from tests.training import make_config

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
# A token's id is its number plus the six special ones; 2 ends a text, 4 and 5 are the user and the assistant.
FORMATS = {
    "text": ({"text": "w1 w2 w3"}, [7, 8, 9, 2]),
    "messages": ({"messages": CHAT}, [4, 7, 8, 2, 5, 9, 2]),
    "prompt and completion": ({"prompt": "w1 w2", "completion": " w3"}, [7, 8, 9, 2]),
    "conversational prompt and completion": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        [4, 7, 8, 2, 5, 9, 2],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name, tokenizer):
    row, ids = FORMATS[name]
    blocks = token_blocks(Dataset.from_list([row, row]), tokenizer, 100)
    assert blocks.input_ids.tolist() == [ids + ids] and blocks.input_ids.dtype == torch.int64


def test_tokenised_rows_are_taken_as_they_are(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[7, 8, 9], [10, 2]]})
    assert token_blocks(rows, tokenizer, 100).input_ids.tolist() == [[7, 8, 9, 10, 2]]


def test_a_stream_is_read_no_further_than_needed(tokenizer):
    def rows():
        yield {"text": "w1 w2 w3"}
        yield {"text": "w4 w5 w6"}
        raise AssertionError("read too far")

    stream = IterableDataset.from_generator(rows)
    blocks = token_blocks(stream, tokenizer, 6, block_length=3)
    assert blocks.input_ids.tolist() == [[7, 8, 9], [2, 10, 11]]


def test_the_text_column_may_have_another_name(tokenizer):
    rows, args = Dataset.from_dict({"story": ["w1 w2"], "text": ["w3"]}), make_config(dataset_text_field="story")
    assert token_blocks(rows, tokenizer, 9, args=args).input_ids.tolist() == [[7, 8, 2]]
    assert token_blocks(rows, tokenizer, 9).input_ids.tolist() == [[9, 2]]


@pytest.mark.parametrize(("options", "ids"), [({}, [7, 8]), ({"packing": True}, [7, 8])])
def test_rows_are_cut_as_in_training(options, ids, tokenizer):
    rows = Dataset.from_dict({"text": ["w1 w2 w3", "w4"]})
    assert token_blocks(rows, tokenizer, 9, args=make_config(max_length=2, **options)).input_ids.tolist() == [
        [*ids, 10, 2]
    ]


def test_an_end_is_added_once(tokenizer):
    rows = Dataset.from_dict({"text": ["w1 </s>", "w2"]})
    assert token_blocks(rows, tokenizer, 100).input_ids.tolist() == [[7, 2, 8, 2]]
    tokenizer.eos_token = None
    assert token_blocks(rows, tokenizer, 100).input_ids.tolist() == [[7, 2, 8]]


@pytest.mark.parametrize(
    ("max_tokens", "block_length", "shape"),
    [(100, 7, (5, 7)), (100, 512, (1, 40)), (20, 8, (2, 8)), (20, 512, (1, 20)), (5, 8, (1, 5)), (40, 40, (1, 40))],
)
def test_blocks_hold_at_most_what_was_asked_for(max_tokens, block_length, shape, tokenizer):
    rows = Dataset.from_dict({"text": ["w0 w1 w2 w3 w4 w5 w6 w7 w8"] * 4})
    blocks = token_blocks(rows, tokenizer, max_tokens, block_length).input_ids
    assert tuple(blocks.shape) == shape
    everything = [*range(6, 15), 2] * 4
    assert blocks.flatten().tolist() == everything[: blocks.numel()]


@pytest.mark.parametrize("rows", [[{"text": ""}], [{"input_ids": [7]}]])
def test_too_little_text_is_refused(rows, tokenizer):
    with pytest.raises(ValueError, match="holds 1 tokens, too few to calibrate on"):
        token_blocks(rows, tokenizer, 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_fit_the_models_positions(family):
    assert calibration_length(tiny_model(family).config) == 64
    assert calibration_length(tiny_model(family, **own_names(family, max_position_embeddings=1024)).config) == 512
