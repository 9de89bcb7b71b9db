"""A cache written by a teacher says what the teacher says, and goes on where it was killed."""

import json
import pickle
import shutil
from collections import namedtuple

import pytest
import torch
from datasets import Dataset, IterableDataset

from cbd_trl.cache import MissingRowError, TeacherCache, write_cache
from cbd_trl.cache import writer as predict_module
from cbd_trl.cache import writer as writer_module
from tests.cache.helpers import direct_log_probs, make_args, token_dataset
from tests.tiny import FAMILIES, tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import text_rows


def write(folder, dataset=None, model=None, **options):
    options = {"args": make_args(folder), "k": 8, "value_bits": 32, "batch_size": 3, **options}
    return write_cache(
        tiny_model("llama") if model is None else model,
        token_dataset() if dataset is None else dataset,
        folder,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_is_that_of_the_dense_logits(tmp_path, family):
    model, rows = tiny_model(family), token_dataset()
    write(tmp_path, rows, model, temperature=2.0)
    cache = TeacherCache.open(tmp_path, verify=True)
    for ids in rows["input_ids"]:
        found, dense = cache.lookup(ids), direct_log_probs(model, ids, 2.0)
        best = dense.topk(8)
        assert torch.equal(found.indices.long(), best.indices)
        torch.testing.assert_close(found.log_probs, best.values, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.tail, torch.log1p(-best.values.exp().sum(-1)), rtol=0, atol=1e-3)
        target = direct_log_probs(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(found.target, target, rtol=0, atol=2e-5)


def test_the_whole_vocabulary_can_be_kept(tmp_path):
    model, rows = tiny_model("llama"), token_dataset(3)
    assert write(tmp_path, rows, model, k=1000).settings.k == 64
    cache = TeacherCache.open(tmp_path)
    for ids in rows["input_ids"]:
        found = cache.lookup(ids)
        dense = torch.zeros(len(ids) - 1, 64).scatter(1, found.indices.long(), found.log_probs)
        torch.testing.assert_close(dense, direct_log_probs(model, ids), rtol=0, atol=2e-5)
        assert (found.tail == -torch.inf).all()


def test_hidden_states_and_head_give_the_dense_logits(tmp_path):
    model, rows = tiny_model("gpt2"), token_dataset(4)
    write(tmp_path, rows, model, kind="hidden")
    cache = TeacherCache.open(tmp_path, verify=True)
    for ids in rows["input_ids"]:
        logits = cache.head().logits(cache.lookup(ids).hidden)
        torch.testing.assert_close(logits.log_softmax(-1), direct_log_probs(model, ids), rtol=0, atol=2e-5)


def test_hidden_states_in_another_dtype(tmp_path):
    write(tmp_path, kind="hidden", hidden_dtype="bfloat16")
    assert TeacherCache.open(tmp_path).lookup(token_dataset()["input_ids"][0]).hidden.dtype == torch.bfloat16


def test_draws_depend_on_seed_and_row_alone(tmp_path):
    rows = token_dataset(6)
    write(tmp_path / "a", rows, kind="sampled", seed=1, batch_size=4)
    write(tmp_path / "b", rows.select([5, 2, 0]), kind="sampled", seed=1, batch_size=1)
    write(tmp_path / "c", rows, kind="sampled", seed=2)
    a, b, c = (TeacherCache.open(tmp_path / name) for name in "abc")
    ids = rows["input_ids"][2]
    assert torch.equal(a.lookup(ids).indices, b.lookup(ids).indices)
    assert not torch.equal(a.lookup(ids).indices, c.lookup(ids).indices)


def test_draws_follow_the_teacher(tmp_path):
    model, rows = tiny_model("llama"), token_dataset(1)
    write(tmp_path, rows, model, kind="sampled", k=4000, temperature=1.5)
    ids = rows["input_ids"][0]
    found, dense = TeacherCache.open(tmp_path).lookup(ids), direct_log_probs(model, ids, 1.5)
    torch.testing.assert_close(found.log_probs, dense.gather(1, found.indices.long()), rtol=0, atol=2e-5)
    drawn = torch.zeros_like(dense).scatter_add(1, found.indices.long(), torch.full(found.indices.shape, 1 / 4000))
    assert (drawn - dense.exp()).abs().max() < 0.04
    assert found.tail is None


def test_logits_in_chunks_change_nothing(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    monkeypatch.setattr(predict_module, "_LOGITS", 64 * 3)
    write(tmp_path / "chunks")
    whole, chunks = (TeacherCache.open(tmp_path / name) for name in ("whole", "chunks"))
    for ids in token_dataset()["input_ids"]:
        assert torch.equal(whole.lookup(ids).indices, chunks.lookup(ids).indices)
        torch.testing.assert_close(whole.lookup(ids).log_probs, chunks.lookup(ids).log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "sampled", "hidden"])
def test_a_killed_write_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(writer_module, "SHARD_TOKENS", 40)
    write(tmp_path / "unbroken", token_dataset(20), kind=kind)
    broken = tmp_path / "broken"
    flush, calls = writer_module.CacheWriter._flush, []

    def dies(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        flush(self)

    monkeypatch.setattr(writer_module.CacheWriter, "_flush", dies)
    with pytest.raises(KeyboardInterrupt):
        write(broken, token_dataset(20), kind=kind)
    with pytest.raises(ValueError, match=r"incomplete: it holds \d+ of 20 rows. Run the same command to finish it"):
        TeacherCache.open(broken)
    monkeypatch.setattr(writer_module.CacheWriter, "_flush", flush)
    write(broken, token_dataset(20), kind=kind)
    files = {file.name: file.read_bytes() for file in (tmp_path / "unbroken").iterdir()}
    assert len(files) >= 5
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == files


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_a_failed_addition_leaves_a_complete_cache_usable(tmp_path, monkeypatch, kind):
    rows, more = token_dataset(5), token_dataset(15, seed=1)
    write(tmp_path, rows, kind=kind)
    predict, calls, fails_at = predict_module.Predictor.predict, [], [1]

    def fails(self, *args):
        calls.append(1)
        if len(calls) == fails_at[0]:
            raise ValueError("not finite")
        return predict(self, *args)

    monkeypatch.setattr(predict_module.Predictor, "predict", fails)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path, more, kind=kind)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    TeacherCache.open(tmp_path, verify=True).check_rows(rows["input_ids"])
    # Behind the first new shard it is unfinished, and what is missing is named.
    monkeypatch.setattr(writer_module, "SHARD_TOKENS", 5)
    fails_at[0] = 3
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path, more, kind=kind)
    with pytest.raises(ValueError, match=r"incomplete: it holds 8 of 20 rows"):
        TeacherCache.open(tmp_path)
    write(tmp_path, more, kind=kind)
    TeacherCache.open(tmp_path, verify=True).check_rows([*rows["input_ids"], *more["input_ids"]])


def test_more_rows_are_added_and_known_ones_left_alone(tmp_path):
    first, second = token_dataset(5), token_dataset(4, seed=1)
    write(tmp_path, first)
    before = (tmp_path / "rows-00000.safetensors").read_bytes()
    both = Dataset.from_dict({"input_ids": [*second["input_ids"], *first["input_ids"], *second["input_ids"]]})
    manifest = write(tmp_path, both)
    assert manifest.rows == 9 and len(manifest.shards) == 2
    assert (tmp_path / "rows-00000.safetensors").read_bytes() == before
    TeacherCache.open(tmp_path).check_rows(both["input_ids"])
    again = json.loads((tmp_path / "cache.json").read_text())
    write(tmp_path, both)
    assert json.loads((tmp_path / "cache.json").read_text()) == again


def test_a_stream_can_be_written(tmp_path):
    rows = token_dataset(7)
    stream = IterableDataset.from_generator(lambda: iter(rows.to_list()))
    assert write(tmp_path, stream).rows == 7
    TeacherCache.open(tmp_path).check_rows(rows["input_ids"])


@pytest.mark.parametrize(("truncation", "packing"), [("keep_start", False), ("keep_end", False), ("keep_end", True)])
def test_rows_are_truncated_as_training_truncates_them(tmp_path, truncation, packing):
    args = make_args(tmp_path, max_length=5, packing=packing)
    args.truncation_mode = truncation  # a warning of TRL, which deprecates keep_end, comes with the argument
    rows = token_dataset(4)
    write(tmp_path, rows, args=args)
    keep = (lambda ids: ids[-5:]) if truncation == "keep_end" and not packing else (lambda ids: ids[:5])
    cache = TeacherCache.open(tmp_path)
    cache.check_rows(keep(ids) for ids in rows["input_ids"])
    assert cache.manifest.tokens == sum(min(5, len(ids)) for ids in rows["input_ids"])


def test_rows_without_a_prediction_are_left_out(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[7], [8, 9], [7]]})
    assert write(tmp_path, rows).rows == 1
    cache = TeacherCache.open(tmp_path)
    cache.check_rows([[7], [8, 9], [3]])
    found = cache.lookup([7])
    assert found.indices.shape == (0, 8) and found.target.shape == found.tail.shape == (0,)


def test_the_teacher_is_left_as_it_was(tmp_path):
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    tokenizer.pad_token = None
    config = model.config.to_dict()
    write(tmp_path, text_rows(), model, processing_class=tokenizer)
    assert model.training and model.config.to_dict() == config and tokenizer.pad_token is None
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


def test_beginnings_of_rows_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_TOKENS", 30)
    model, rows = tiny_model("llama"), token_dataset(15)
    write(tmp_path, rows, model)
    cache = TeacherCache.open(tmp_path)
    for ids in rows["input_ids"]:
        whole = cache.lookup(ids)
        for n in range(2, len(ids)):
            part = cache.lookup(ids[:n])
            torch.testing.assert_close(part.log_probs, whole.log_probs[: n - 1], rtol=0, atol=2e-5)
            torch.testing.assert_close(part.target, whole.target[: n - 1], rtol=0, atol=2e-5)


def test_a_zero_token_is_no_end(tmp_path):
    write(tmp_path, Dataset.from_dict({"input_ids": [[5, 0], [5, 0, 0, 9], [5, 7]]}))
    cache = TeacherCache.open(tmp_path)
    cache.check_rows([[5, 0], [5, 0, 0], [5, 0, 0, 9]])
    with pytest.raises(MissingRowError):
        cache.lookup([5, 0, 9])


def test_copies_in_other_processes_reopen_it(tmp_path):
    write(tmp_path)
    cache = TeacherCache.open(tmp_path)
    ids = token_dataset()["input_ids"][1]
    found = cache.lookup(ids)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).lookup(ids).indices, found.indices)
    assert len(pickle.dumps(cache)) < 3000


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_TOKENS", 5)
    monkeypatch.setattr("cbd_trl.cache.reader._OPEN_SHARDS", 2)
    write(tmp_path, batch_size=1)
    cache = TeacherCache.open(tmp_path)
    for ids in token_dataset()["input_ids"]:
        cache.lookup(ids)
    assert len(cache.manifest.shards) >= 10 and len(cache._shards) == 2


def test_a_disk_that_is_too_small_is_seen_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 2000))
    with pytest.raises(ValueError, match=r"cache of \d+ tokens needs .*B and the disk of .* Use a smaller k"):
        write(tmp_path / "new")
    assert not (tmp_path / "new").exists()
