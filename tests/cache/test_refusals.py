"""Whatever is wrong with a cache is refused and named."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save

from cbd_trl.cache import MissingRowError, TeacherCache, write_cache
from tests.cache.helpers import make_args, token_dataset
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer
from tests.training import text_rows


def write(folder, dataset=None, model=None, **options):
    options = {"args": make_args(folder), "k": 4, "processing_class": tiny_tokenizer(), **options}
    return write_cache(
        tiny_model("llama") if model is None else model,
        token_dataset() if dataset is None else dataset,
        folder,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    """A small cache."""
    write(tmp_path / "cache")
    return tmp_path / "cache"


def edit(folder, **changes):
    file = folder / "cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_without_a_cache(tmp_path):
    with pytest.raises(ValueError, match=r"is not a teacher cache: there is no cache.json in it"):
        TeacherCache.open(tmp_path)


def test_another_format_version(folder):
    edit(folder, format_version=1)
    with pytest.raises(ValueError, match="format_version 1; this version of cbd-trl reads 2"):
        TeacherCache.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "format_version None"),
        ('{"format_version": 2}', "settings: the field is missing"),
    ],
)
def test_a_damaged_manifest(folder, text, message):
    (folder / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(folder)


def test_a_shard_outside_the_folder(folder):
    shard = json.loads((folder / "cache.json").read_text())["shards"][0]
    edit(folder, shards=[{**shard, "file": "../rows.safetensors"}])
    with pytest.raises(ValueError, match="a shard lies outside the folder"):
        TeacherCache.open(folder)


def test_an_incomplete_cache(folder):
    edit(folder, complete=False, expected_rows=5000)
    with pytest.raises(ValueError, match=r"incomplete: it holds 12 of 5,000 rows. Run the same command to finish it"):
        TeacherCache.open(folder)
    edit(folder, expected_rows=None)
    with pytest.raises(ValueError, match="12 of an unknown number of rows"):
        TeacherCache.open(folder)


def test_a_missing_or_short_shard(folder):
    shard = folder / "rows-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"rows-00000.safetensors has .* bytes instead of .* cut short"):
        TeacherCache.open(folder)
    with pytest.raises(ValueError, match="cut short"):
        write(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"rows-00000.safetensors is missing, but the cache lists it with 12 rows"):
        TeacherCache.open(folder)


def test_a_shard_with_another_header(folder):
    shard = folder / "rows-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[data.index(b'"tail"') + 1] = ord("T")
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"was changed: it holds the arrays .*'Tail'"):
        TeacherCache.open(folder)
    shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(ValueError, match=r"rows-00000.safetensors cannot be read as a safetensors file"):
        TeacherCache.open(folder)


def test_an_altered_byte_is_found_by_the_checksum(folder):
    shard = folder / "rows-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    TeacherCache.open(folder)
    with pytest.raises(ValueError, match=r"rows-00000.safetensors was changed: its sha256"):
        TeacherCache.open(folder, verify=True)


def test_other_tokens_under_the_key_are_found_on_every_read(folder):
    shard = folder / "rows-00000.safetensors"
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    tensors["tokens"][0] += 1
    shard.write_bytes(save(tensors, metadata={"format": "pt"}))
    cache = TeacherCache.open(folder)
    ids = token_dataset()["input_ids"]
    cache.lookup(ids[1])
    with pytest.raises(ValueError, match=rf"was changed: under the key of the row that begins with \[{ids[0][0]}, "):
        cache.lookup(ids[0])


def test_a_missing_or_altered_head(tmp_path):
    write(tmp_path, kind="hidden")
    head = tmp_path / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    TeacherCache.open(tmp_path)
    with pytest.raises(ValueError, match=r"head.safetensors was changed: its sha256"):
        TeacherCache.open(tmp_path, verify=True)
    head.write_bytes(save({"weight": torch.zeros(3, 32)}))
    with pytest.raises(ValueError, match=r"shapes {'weight': \[3, 32\]} instead of {'weight': \[64, 32\]}"):
        TeacherCache.open(tmp_path)
    head.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"head.safetensors cannot be read"):
        TeacherCache.open(tmp_path)
    head.unlink()
    with pytest.raises(ValueError, match=r"head.safetensors is missing"):
        TeacherCache.open(tmp_path)


def test_only_hidden_states_come_with_a_head(folder):
    with pytest.raises(ValueError, match=r"of kind 'top_k', which holds no head. Write one with --kind hidden"):
        TeacherCache.open(folder).head()


def test_another_tokenizer_or_too_few_rows(folder):
    cache = TeacherCache.open(folder)
    cache.check(vocabulary_rows=64, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"was made with another tokenizer .* token ids mean other tokens"):
        cache.check(vocabulary_rows=64, tokenizer=tiny_tokenizer([f"v{i}" for i in range(54)]))
    highest = cache.manifest.highest_token_id
    cache.check(vocabulary_rows=highest + 1)
    with pytest.raises(ValueError, match=rf"predictions of token {highest}, but the student has {highest} vocab"):
        cache.check(vocabulary_rows=highest)


def test_rows_that_are_not_there(folder):
    cache, rows = TeacherCache.open(folder), token_dataset()["input_ids"]
    cache.check_rows(rows)
    foreign = [*rows[:2], list(range(20, 40)), rows[0][:-1], [*rows[0], 7]]
    with pytest.raises(
        MissingRowError,
        match=r"2 of 5 rows are not in the teacher cache .*20 tokens, \[20, 21, .*, 31, \.\.\.\].*--max_",
    ):
        cache.check_rows(foreign)
    with pytest.raises(
        MissingRowError, match=r"A row is not in .*packing_strategy='bfd', not 'bfd_split' or 'wrapped'"
    ):
        cache.lookup(rows[0][1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k is 4, requested 5"),
        ({"temperature": 2.0}, "temperature is 1.0, requested 2.0"),
        ({"value_bits": 32}, "value_bits is 16, requested 32"),
        ({"kind": "hidden"}, "kind is 'top_k', requested 'hidden'; "),
        ({"model": tiny_model("llama", seed=3)}, "teacher_fingerprint is '"),
        ({"model": tiny_model("llama", vocab_size=70)}, "vocabulary_rows is 64, requested 70"),
        ({"processing_class": tiny_tokenizer(["a"])}, "tokenizer_sha256 is '"),
    ],
)
def test_other_settings_in_the_same_folder(folder, options, message):
    with pytest.raises(ValueError, match=rf"made in another way: {message}.*Use another --output_dir"):
        write(folder, **options)


def test_a_cache_without_a_row_binds_nobody(tmp_path):
    with pytest.raises(ValueError, match="holds token 99"):
        write(tmp_path, Dataset.from_dict({"input_ids": [[1, 99]]}))
    assert write(tmp_path, k=5).settings.k == 5


def test_the_seed_is_a_setting_of_draws(tmp_path):
    write(tmp_path, kind="sampled", seed=1)
    with pytest.raises(ValueError, match="made in another way: seed is 1, requested 2"):
        write(tmp_path, kind="sampled", seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "topk"},
            "kind='topk': there is no such teacher cache. Did you mean 'top_k'.* top_k, sampled, hidden",
        ),
        ({"k": 0}, "k=0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: it divides the logits"),
        ({"temperature": float("nan")}, "temperature=nan: it divides the logits"),
        ({"value_bits": 8}, r"value_bits=8: log-probabilities are stored in 16 bits \(quantized\) or 32"),
        ({"kind": "hidden", "temperature": 2.0}, "temperature=2.0 with kind='hidden': hidden states serve every"),
        ({"hidden_dtype": "bfloat16"}, "hidden_dtype='bfloat16' with kind='top_k'"),
        ({"kind": "hidden", "hidden_dtype": "int8"}, "hidden_dtype='int8' .*one of float32, bfloat16, float16"),
        (
            {"model_init_kwargs": {"dtype": "float32"}},
            "model_init_kwargs are for loading a teacher, but it is a model",
        ),
        (
            {"dataset": Dataset.from_dict({"input_ids": [[1, 99]]})},
            "holds token 99, but the teacher has 64 vocabulary",
        ),
        ({"dataset": Dataset.from_dict({"text": []})}, "is empty: it has no rows"),
        ({"dataset": text_rows(), "processing_class": None}, r"columns \['text'\] and has to be tokenized, but"),
    ],
)
def test_what_cannot_be_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **options)
    assert not (tmp_path / "rows-00000.safetensors").exists()


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt' and no cache"):
        write(tmp_path)


def test_a_teacher_that_predicts_nothing(tmp_path):
    model = tiny_model("llama")
    # Only the row under the token of the data, so that the check of the head passes.
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = np.nan
    with pytest.raises(ValueError, match="predictions are not finite for a row of 3 tokens"):
        write(tmp_path, Dataset.from_dict({"input_ids": [[7, 50, 8]]}), model)


def test_several_processes(tmp_path, monkeypatch):
    args = make_args(tmp_path)
    monkeypatch.setattr(type(args), "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="A cache is written by one process, and 2 were started"):
        write(tmp_path, args=args)


def test_manifest_names_no_path(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = write_cache(str(tmp_path / "model"), text_rows(), tmp_path / "cache", args=make_args(tmp_path)).settings
    assert settings.teacher == "model"
    assert str(tmp_path) not in (tmp_path / "cache" / "cache.json").read_text()
