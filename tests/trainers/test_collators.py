"""What a cached teacher says stands at the tokens it was asked about, however rows are batched."""

import itertools

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cbd_trl.cache import MissingRowError, TeacherCache, write_cache
from cbd_trl.trainers.data import CachedTeacherCollator
from cbd_trl.trainers.packing import PackingCollator
from tests.cache.helpers import direct_log_probs, make_args, token_dataset
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import text_rows

MODEL = tiny_model("llama")


def cached(folder, dataset, **options):
    options = {"args": make_args(folder), "k": 5, "value_bits": 32, "processing_class": tiny_tokenizer(), **options}
    write_cache(MODEL, dataset, folder, **options)
    return TeacherCache.open(folder)


def places(batch):
    """(batch row, first token, token ids) of every row, from what the models read."""
    for line, ids in enumerate(batch["input_ids"]):
        if "attention_mask" in batch:
            yield line, 0, ids[: batch["attention_mask"][line].sum()].tolist()
            continue
        starts = [*(batch["position_ids"][line] == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            yield line, start, ids[start:end].tolist()


def assert_aligned(batch):
    """Every position against the model itself; nothing where there is no row."""
    expected = torch.zeros_like(batch["teacher_target"])
    for line, start, ids in places(batch):
        if len(ids) < 2:
            continue
        logs, at = direct_log_probs(MODEL, ids), slice(start, start + len(ids) - 1)
        best = logs.topk(5)
        assert torch.equal(batch["teacher_indices"][line, at].long(), best.indices)
        torch.testing.assert_close(batch["teacher_log_probs"][line, at], best.values, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            batch["teacher_tail"][line, at].exp(), 1 - best.values.exp().sum(-1), rtol=0, atol=1e-5
        )
        expected[line, at] = logs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(batch["teacher_target"], expected, rtol=0, atol=2e-5)
    nothing = expected == 0
    assert (
        nothing.any() and not batch["teacher_log_probs"][nothing].any() and not batch["teacher_indices"][nothing].any()
    )


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("padding_free", [False, True])
def test_padded_and_padding_free_rows(tmp_path, padding_free, multiple):
    rows = token_dataset(6)
    kind = PackingCollator if padding_free else DataCollatorForLanguageModeling
    inner = kind(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple)
    collator = CachedTeacherCollator(inner, cached(tmp_path, rows))
    batch = collator([{**row, "labels": row["input_ids"]} for row in rows])
    assert batch["teacher_indices"].dtype == torch.int32 and batch["teacher_tail"].dtype == torch.float32
    # Padding behind padding-free rows has position 0 each, which makes it rows of one token.
    assert_aligned(batch)
    assert multiple is None or batch["teacher_tail"].shape[1] % multiple == 0
    assert ("row_lengths" in batch) == padding_free


def prepared(dataset, folder, **options):
    return SFTTrainer(
        MODEL_COPY, make_args(folder, **options), train_dataset=dataset, processing_class=tiny_tokenizer()
    )


MODEL_COPY = tiny_model("llama")


@pytest.mark.parametrize(
    "options",
    [{"max_length": 32}, {"max_length": 6}, {"max_length": 32, "packing": True}, {"max_length": 8, "packing": True}],
)
@pytest.mark.parametrize("form", ["text", "prompt", "messages"])
def test_batches_of_the_trainer(tmp_path, form, options):
    text = text_rows((3, 9, 5, 12, 7, 4, 4))
    halves = [row["text"].split(" ", 2) for row in text]
    dataset = {
        "text": text,
        "prompt": Dataset.from_list([{"prompt": " ".join(a), "completion": b} for *a, b in halves]),
        "messages": Dataset.from_list(
            [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, _, b in halves]
        ),
    }[form]
    # Written once, longer than some of the trainings truncate.
    cache = cached(tmp_path / "cache", dataset, args=make_args(tmp_path, max_length=32))
    trainer = prepared(dataset, tmp_path, per_device_train_batch_size=4, shuffle_dataset=True, **options)
    trainer.data_collator = CachedTeacherCollator(trainer.data_collator, cache)
    rows = 0
    for batch in trainer.get_train_dataloader():
        assert_aligned(batch)
        rows += sum(1 for _ in places(batch))
    assert rows == len(dataset) or (form == "prompt" and not options.get("packing"))


def test_workers_read_the_cache_too(tmp_path):
    rows = token_dataset(8)
    collator = CachedTeacherCollator(DataCollatorForLanguageModeling(pad_token_id=0), cached(tmp_path, rows))
    loader = torch.utils.data.DataLoader(rows.to_list(), 4, collate_fn=collator, num_workers=2)
    assert sum(1 for batch in loader if assert_aligned(batch) is None) == 2


def test_draws_and_hidden_states(tmp_path):
    rows = token_dataset(3)
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    drawn = CachedTeacherCollator(inner, cached(tmp_path / "a", rows, kind="sampled"))(rows.to_list())
    assert "teacher_tail" not in drawn and drawn["teacher_indices"].shape == (*drawn["input_ids"].shape, 5)
    cache = cached(tmp_path / "b", rows, kind="hidden")
    batch = CachedTeacherCollator(inner, cache)(rows.to_list())
    assert set(batch) - {"input_ids", "labels", "attention_mask"} == {"teacher_hidden", "teacher_target"}
    for line, start, ids in places(batch):
        hidden = batch["teacher_hidden"][line, start : start + len(ids) - 1]
        logs = cache.head().logits(hidden).log_softmax(-1)
        torch.testing.assert_close(logs, direct_log_probs(MODEL, ids), rtol=0, atol=2e-5)
        assert not batch["teacher_hidden"][line, start + len(ids) - 1 :].any()


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_rows_cut_in_the_middle_are_refused(tmp_path, strategy):
    rows = text_rows((30, 28, 31))
    cache = cached(tmp_path / "cache", rows, args=make_args(tmp_path, max_length=64))
    options = {"packing": True, "packing_strategy": strategy, "max_length": 12, "per_device_train_batch_size": 2}
    trainer = prepared(rows, tmp_path, **options)
    collator = CachedTeacherCollator(trainer.data_collator, cache)
    with pytest.raises(MissingRowError, match="pack with packing_strategy='bfd', not 'bfd_split' or 'wrapped'"):
        collator(trainer.train_dataset.to_list())


def test_a_collator_that_moves_tokens_is_refused(tmp_path):
    rows = token_dataset(3)

    def pads_left(examples):
        ids = [torch.tensor(example["input_ids"]).flip(0) for example in examples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).flip(1)
        return {"input_ids": padded, "attention_mask": padded != 0}

    collator = CachedTeacherCollator(pads_left, cached(tmp_path, rows))
    with pytest.raises(ValueError, match=r"function did not put a row of \d+ tokens at token 0 of batch row 0"):
        collator(rows.to_list())
