"""Rows of tokens as blocks: each begins as its tokenizer begins a text, and that is never scored."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from cbd_trl.losses.held_out import held_out_loss
from cbd_trl.utils.blocks import cut_blocks, prefix_ids, token_blocks
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

# Of the tiny tokenizer: BOS, end, user, assistant; w0 is 6.
B, E, U, A = 1, 2, 4, 5
NOT = -100


def tokenizer_with(start="<s>", **roles):
    """The tiny tokenizer, which begins a text with `start` by itself."""
    tokenizer = tiny_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in start.split()]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A".strip(), special_tokens=ids)
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    return tokenizer


CASES = {
    # What the tokenizer adds, its roles, rows, tokens, length -> blocks, labels.
    "nothing in front": ("", {}, [[6, 7, E], [8, 9, E]], 3, [[6, 7, E], [8, 9, E]], [[6, 7, E], [8, 9, E]]),
    "a row goes on behind a BOS of its own": (
        "<s>", {}, [[B, 6, 7, 8, 9, 10, E]], 4,
        [[B, 6, 7, 8], [B, 9, 10, E]], [[NOT, 6, 7, 8], [NOT, 9, 10, E]],
    ),
    "a row without BOS gets one where a block begins": (
        "<s>", {}, [[U, 6, A, 7, E], [U, 8, E]], 4,
        [[B, U, 6, A], [B, 7, E, U], [B, 8, E, U]][:2], [[NOT, U, 6, A], [NOT, 7, E, U]],
    ),
    "a BOS inside a block is not scored": (
        "<s>", {}, [[B, 6, E], [B, 7, 8, E]], 6, [[B, 6, E, B, 7, 8]], [[NOT, 6, E, NOT, 7, 8]],
    ),
    "a row that begins with a block has one BOS": (
        "<s>", {}, [[B, 6, E], [B, 7, E]], 3, [[B, 6, E], [B, 7, E]], [[NOT, 6, E], [NOT, 7, E]],
    ),
    "a BOS that is the last of a block": (
        "<s>", {}, [[B, 6, E], [B, 7, 8, E]], 4, [[B, 6, E, B], [B, 7, 8, E]], [[NOT, 6, E, NOT], [NOT, 7, 8, E]],
    ),
    "two tokens in front, cut by the end of a block": (
        "<s> <user>", {}, [[B, U, 6, E], [B, U, 7, 8, E]], 5,
        [[B, U, 6, E, B], [B, U, 7, 8, E]], [[NOT, NOT, 6, E, NOT], [NOT, NOT, 7, 8, E]],
    ),
    "the end, of the same id, is scored": (
        "</s>", {"bos_token": "</s>"}, [[E, 6, E], [E, 7, E]], 6, [[E, 6, E, E, 7, E]], [[NOT, 6, E, NOT, 7, E]],
    ),
    "a BOS that only the chat template writes": (
        "", {}, [[B, U, 6, 7, 8, E], [B, U, 9, E]], 4, [[B, U, 6, 7], [B, 8, E, B], [B, U, 9, E]],
        [[NOT, U, 6, 7], [NOT, 8, E, NOT], [NOT, U, 9, E]],
    ),
    "a BOS that begins every turn": (
        "", {"bos_token": "<user>"}, [[U, 6, E, U, 7, 8, E]], 4, [[U, 6, E, U]], [[U, 6, E, U]],
    ),
    "one block where there is less text": ("<s>", {}, [[B, 6, 7]], 512, [[B, 6, 7]], [[NOT, 6, 7]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_blocks_begin_as_a_text_does(name):
    start, roles, rows, length, blocks, labels = CASES[name]
    found = cut_blocks(rows, tokenizer_with(start, **roles), length * len(blocks), length)
    assert found.input_ids.tolist() == blocks and found.labels.tolist() == labels
    assert found.input_ids.dtype == found.labels.dtype == torch.int64
    assert found.scored == sum(label != NOT for row in labels for label in row[1:])
    front = [id for id, label in zip(blocks[0], labels[0], strict=True) if label == NOT][: len(found.start)]
    assert list(found.start) == front and len(found) == len(blocks)


def test_rows_of_text_are_read_and_cut_behind_one_bos_each():
    tokenizer = tokenizer_with()
    text = " ".join(f"w{i}" for i in range(20))
    blocks = token_blocks([{"text": text}] * 3, tokenizer, 60, 12)
    assert (blocks.input_ids[:, 0] == B).all() and (blocks.labels[:, 0] == NOT).all() and blocks.start == (B,)
    content = blocks.labels[blocks.labels != NOT]
    assert content.tolist() == [*range(6, 26), E, *range(6, 26), E, *range(6, 26)][: len(content)]


def test_rows_are_read_no_further_than_needed():
    def rows():
        yield [B, 6, 7, 8]
        raise AssertionError("read too far")

    assert cut_blocks(rows(), tokenizer_with(), 4, 2).input_ids.tolist() == [[B, 6], [B, 7]]


@pytest.mark.parametrize(("rows", "count"), [([], 0), ([[]], 0), ([[B]], 0), ([[B, B]], 1)])
def test_text_without_anything_to_predict_is_refused(rows, count):
    if count:
        assert cut_blocks(rows, tokenizer_with(), 8, 8).scored == count
        return
    with pytest.raises(ValueError, match=rf"holds {count} tokens, too few to calibrate on"):
        cut_blocks(rows, tokenizer_with(), 8, 8)


def test_blocks_that_hold_only_a_beginning_are_refused():
    with pytest.raises(ValueError, match=r"Blocks of 2 tokens .* \(\[1, 4\]\)\. Ask for 3 or more"):
        cut_blocks([[6, 7]], tokenizer_with("<s> <user>"), 20, 2)


def test_the_loss_is_that_of_every_token_but_the_beginnings():
    """As if each piece of a row were read behind a BOS of its own, and only its own tokens counted."""
    model = tiny_model("llama")
    rows = [[B, *range(6, 6 + count), E] for count in (9, 3, 17)]
    blocks = cut_blocks(rows, tokenizer_with(), 36, 12)
    with torch.no_grad():
        nats = -model(blocks.input_ids).logits.log_softmax(-1)[:, :-1].gather(2, blocks.input_ids[:, 1:, None])[..., 0]
    scored = blocks.input_ids[:, 1:] != B
    assert 0 < (~scored).sum() < scored.sum()
    loss = held_out_loss(model, blocks)
    assert loss == pytest.approx(nats[scored].mean().item(), rel=1e-5)
    assert loss != pytest.approx(nats.mean().item(), rel=1e-3)


@pytest.mark.parametrize(("start", "ids"), [("", []), ("<s>", [B]), ("<s> <user>", [B, U])])
def test_what_a_tokenizer_begins_a_text_with(start, ids):
    assert prefix_ids(tokenizer_with(start)) == ids
