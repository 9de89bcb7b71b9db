"""A cache made of vLLM's outputs is the one the model itself would have written."""

import json
import math

import pytest
import torch
from datasets import Dataset

from cbd_trl.cache import TeacherCache, import_logprobs, write_cache
from tests.cache.helpers import direct_log_probs, make_args, token_dataset
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


def entries(model, ids, k):
    """What vLLM lists for each token: the k best and the token itself."""
    listed = [None]
    for logs, token in zip(direct_log_probs(model, ids), ids[1:], strict=True):
        chosen = [*logs.topk(k).indices.tolist(), token]
        listed.append({str(i): {"logprob": logs[i].item(), "rank": 1, "decoded_token": "x"} for i in chosen})
    return listed


def line(ids, listed):
    return {"prompt_token_ids": ids, "prompt_logprobs": listed, "outputs": None}


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(one) for one in lines) + "\n\n")
    return path


def load(file, folder, **options):
    return import_logprobs(
        file, folder, **{"processing_class": tiny_tokenizer(), "vocabulary_rows": 64, "k": 6, **options}
    )


def test_an_import_equals_the_local_cache(tmp_path):
    model, rows = tiny_model("llama"), token_dataset(5)
    options = {"args": make_args(tmp_path), "k": 6, "value_bits": 32, "processing_class": tiny_tokenizer()}
    write_cache(model, rows, tmp_path / "local", **options)
    file = write_lines(tmp_path / "rows.jsonl", [line(ids, entries(model, ids, 6)) for ids in rows["input_ids"]])
    manifest = load(file, tmp_path / "imported", value_bits=32, teacher="org/teacher")
    assert manifest.settings.teacher == "org/teacher" and manifest.rows == 5
    local, imported = TeacherCache.open(tmp_path / "local"), TeacherCache.open(tmp_path / "imported", verify=True)
    imported.check(vocabulary_rows=64, tokenizer=tiny_tokenizer())
    for ids in rows["input_ids"]:
        ours, theirs = imported.lookup(ids), local.lookup(ids)
        assert torch.equal(ours.indices, theirs.indices)
        for name in ("log_probs", "target", "tail"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=2e-4)


@pytest.mark.parametrize("nested", [True, False])
def test_a_completion_is_appended_and_bare_numbers_are_read(tmp_path, nested):
    model, ids = tiny_model("llama"), token_dataset(1)["input_ids"][0]
    listed = [e and {key: value["logprob"] for key, value in e.items()} for e in entries(model, ids, 6)]
    completion = {"token_ids": ids[3:], "logprobs": listed[3:]}
    start = {"prompt_token_ids": ids[:3], "prompt_logprobs": listed[:3]}
    one = {**start, "outputs": [completion]} if nested else {**start, **completion}
    load(write_lines(tmp_path / "rows.jsonl", [one]), tmp_path / "cache")
    found = TeacherCache.open(tmp_path / "cache").lookup(ids)
    assert torch.equal(found.indices.long(), direct_log_probs(model, ids).topk(6).indices)


def test_an_import_goes_on_and_adds(tmp_path):
    model, rows = tiny_model("llama"), token_dataset(4)["input_ids"]
    lines = [line(ids, entries(model, ids, 6)) for ids in rows]
    write_lines(tmp_path / "first.jsonl", lines[:2])
    write_lines(tmp_path / "all.jsonl", [*lines, lines[0]])
    assert load(tmp_path / "first.jsonl", tmp_path / "cache").rows == 2
    assert load(tmp_path / "all.jsonl", tmp_path / "cache").rows == 4


def test_the_tail_holds_what_is_left(tmp_path):
    half = math.log(0.5)
    listed = [None, {"7": half, "8": math.log(0.25), "9": math.log(0.125)}, {"7": -1e-9, "8": -40.0, "9": -41.0}]
    load(write_lines(tmp_path / "a.jsonl", [line([6, 9, 7], listed)]), tmp_path / "a", k=2, value_bits=32)
    tail = TeacherCache.open(tmp_path / "a").lookup([6, 9, 7]).tail
    torch.testing.assert_close(tail.exp(), torch.tensor([0.25, 1e-7]))
    whole = {str(i): math.log(1 / 3) for i in range(3)}
    load(write_lines(tmp_path / "b.jsonl", [line([0, 1], [None, whole])]), tmp_path / "b", k=3, vocabulary_rows=3)
    assert TeacherCache.open(tmp_path / "b").lookup([0, 1]).tail.item() == -math.inf


GOOD = {"7": -1.0, "8": -2.0}


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ("{", "line 2: .*"),
        ([1], "It holds a list instead of an object"),
        ({"text": "x"}, r"It has the keys \['text'\], and no 'prompt_token_ids'"),
        (line([7, 8], [None]), "It has 2 prompt_token_ids and 1 prompt_logprobs: one is wanted for each"),
        (line([7, 8, 7], [None, GOOD, None]), r"Token 2 has no log-probabilities \(null\): only the first may"),
        ({"prompt_token_ids": [7, 8], "outputs": [{"token_ids": [7], "logprobs": [GOOD]}]}, "Token 1 has no log-prob"),
        (line([7, 99], [None, GOOD]), "Token 99 is not below the vocabulary's 64 rows"),
        (line([7, 8], [None, {**GOOD, "64": -3.0}]), "Token 1: id 64 is not below the vocabulary's 64 rows"),
        (line([7, 8], [None, {"7": -1.0, "8": 0.5}]), "Token 1: 0.5 must be a log-probability, at most 0"),
        (line([7, 8], [None, {"7": -1.0, "8": math.nan}]), "Token 1: nan must be a log-probability"),
        (line([7, 8], [None, {"8": -1.0}]), "Token 1 has 1 log-probabilities, fewer than k=2: use a smaller k"),
        (line([7, 9], [None, GOOD]), "Token 1 is 9, which its log-probabilities do not list: they are of another row"),
        (line([7, 8], [None, {"7": -0.1, "8": -0.1}]), "Token 1: the probabilities sum to 1.8097, above 1"),
        (line([7, 8], [None, {"seven": -0.1, "8": -2.0}]), "line 2: invalid literal"),
    ],
)
def test_lines_that_are_refused(tmp_path, one, message):
    good = json.dumps(line([7, 8], [None, GOOD]))
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{one if isinstance(one, str) else json.dumps(one)}\n")
    with pytest.raises(ValueError, match=message) as refusal:
        load(tmp_path / "rows.jsonl", tmp_path / "cache", k=2)
    assert "rows.jsonl, line 2: " in str(refusal.value)
    with pytest.raises(ValueError, match="incomplete"):
        TeacherCache.open(tmp_path / "cache")


def test_values_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="k=0, value_bits=16: k must be at least 1 and value_bits 16 or 32"):
        load(tmp_path / "none", tmp_path / "cache", k=0)
    with pytest.raises(ValueError, match=r"There is no file .*none"):
        load(tmp_path / "none", tmp_path / "cache")
    with pytest.raises(ValueError, match="vocabulary_rows is missing"):
        import_logprobs(write_lines(tmp_path / "rows.jsonl", []), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_imported_and_local_rows_do_not_mix(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [line([7, 8], [None, GOOD])])
    load(file, tmp_path / "cache", k=2)
    rows = Dataset.from_dict({"input_ids": [[9, 8]]})
    with pytest.raises(ValueError, match="teacher_fingerprint is 'imported:None', requested"):
        write_cache(
            tiny_model("llama"),
            rows,
            tmp_path / "cache",
            k=2,
            args=make_args(tmp_path),
            processing_class=tiny_tokenizer(),
        )


def test_imports_of_two_teachers_do_not_mix(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [line([7, 8], [None, GOOD])])
    load(file, tmp_path / "cache", k=2, teacher="org/one")
    with pytest.raises(ValueError, match="teacher_fingerprint is 'imported:org/one', requested 'imported:org/two'"):
        load(file, tmp_path / "cache", k=2, teacher="org/two")
    assert load(file, tmp_path / "cache", k=2, teacher="org/one").rows == 1


def test_a_bad_line_of_an_addition_leaves_the_cache_as_it_was(tmp_path):
    load(write_lines(tmp_path / "rows.jsonl", [line([7, 8], [None, GOOD])]), tmp_path / "cache", k=2)
    before = (tmp_path / "cache" / "cache.json").read_bytes()
    more = write_lines(tmp_path / "more.jsonl", [line([8, 7], [None, GOOD]), line([7, 9], [None, GOOD])])
    with pytest.raises(ValueError, match="line 2: "):
        load(more, tmp_path / "cache", k=2)
    assert (tmp_path / "cache" / "cache.json").read_bytes() == before
    TeacherCache.open(tmp_path / "cache", verify=True).check_rows([[7, 8]])
    assert load(write_lines(more, [line([8, 7], [None, GOOD])]), tmp_path / "cache", k=2).rows == 2
