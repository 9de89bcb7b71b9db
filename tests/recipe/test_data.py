"""Datasets of a recipe and their mix."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from cbd_trl.recipe.data import check_data, load_data, shares_rows
from cbd_trl.recipe.schema import DataPart
from tests.tokenizer import tiny_tokenizer


def _file(folder: Path, name: str, rows: list[dict[str, object]]) -> str:
    Dataset.from_list(rows).to_json(folder / name)
    return str(folder / name)


def test_rows_are_drawn_by_their_shares(tmp_path: Path) -> None:
    names = [_file(tmp_path, f"{name}.jsonl", [{"text": name, "n": n} for n in range(2000)]) for name in "abc"]
    parts = [DataPart(name=name, share=float(share)) for name, share in zip(names, (3, 1.5, 0.5), strict=True)]
    mix = load_data(parts, None, seed=1)
    shares = {name: count / len(mix) for name, count in Counter(mix["text"]).items()}
    # About 3,300 rows: three standard deviations of a share are 0.026 at most.
    assert len(mix) > 3000
    assert shares == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1}, abs=0.026)
    assert load_data(parts, None, seed=1)["text"] == mix["text"] != load_data(parts, None, seed=2)["text"]


def test_the_mix_ends_with_the_first_that_runs_out(tmp_path: Path) -> None:
    few = DataPart(name=_file(tmp_path, "few.jsonl", [{"text": f"few {n}"} for n in range(20)]), share=0.5)
    many = DataPart(name=_file(tmp_path, "many.jsonl", [{"text": f"many {n}"} for n in range(900)]), share=0.5)
    texts = load_data([few, many], None, seed=0)["text"]
    assert len(set(texts)) == len(texts) < 100
    assert sum(text.startswith("few") for text in texts) == 20


def test_a_column_of_any_name_is_text(tmp_path: Path) -> None:
    body = _file(tmp_path, "a.jsonl", [{"body": "w1 w2", "id": 3}])
    text = _file(tmp_path, "b.jsonl", [{"text": "w3", "id": 4}])
    parts = [DataPart(name=body, column="body"), DataPart(name=text)]
    assert [check_data(part, tiny_tokenizer()) for part in parts] == [["text"], ["text"]]
    assert load_data(parts[:1], None, 0).to_list() == [{"text": "w1 w2"}]
    assert load_data(parts, None, 0).column_names == ["text"]


def test_what_the_teacher_alone_reads_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "w1", "teacher_prompt": "w2 w1", "completion": " w3"}
    part = DataPart(name=_file(tmp_path, "a.jsonl", [{**row, "id": 3}]))
    assert set(check_data(part, tiny_tokenizer())) == row.keys()
    assert load_data([part], tiny_tokenizer(), 0).to_list() == [row]


def test_a_slice_is_that_part_of_the_rows(tmp_path: Path) -> None:
    name = _file(tmp_path, "a.jsonl", [{"text": f"w{n}"} for n in range(10)])
    assert load_data([DataPart(name=name, split="train[80%:]")], None, 0)["text"] == ["w8", "w9"]


def test_the_text_of_the_package_is_in_the_sources_chat_template() -> None:
    rows = load_data([DataPart(name="demo")], tiny_tokenizer(), 0)
    held_out = load_data([DataPart(name="demo", split="held_out")], tiny_tokenizer(), 0)
    assert rows[0]["text"].startswith("<user> ") and " </s> <assistant> " in rows[0]["text"]
    assert len(rows) > 8 * len(held_out) and not set(rows["text"]) & set(held_out["text"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "train[90%"}, r"the split 'train\[90%' of .* cannot be read"),
        ({"split": "test"}, "is a file, which has no split 'test': all of it is `train`"),
        ({"column": "body"}, "has no column 'body' of text. Its columns: text, id"),
        ({"column": "id"}, "has no column 'id' of text"),
    ],
)
def test_a_dataset_is_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    name = _file(tmp_path, "a.jsonl", [{"text": "w1", "id": 1}])
    with pytest.raises(ValueError, match=said):
        check_data(DataPart(name=name, **options), None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", None, "there is no file"),
        ("empty.jsonl", "", "cannot be read|has no rows"),
        (
            "other.jsonl",
            '{"question": "w1"}\n',
            r"has the columns \['question'\], and these are not an SFT format: .* Name the column",
        ),
        ("broken.jsonl", '{"text": "w1"\n', "cannot be read"),
    ],
)
def test_a_file_is_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=said):
        check_data(DataPart(name=str(file)), tiny_tokenizer())


def test_the_demo_has_two_splits() -> None:
    with pytest.raises(ValueError, match="demo has no split 'test': there are train and held_out"):
        check_data(DataPart(name="demo", split="test"), None)


@pytest.mark.parametrize(
    ("split", "other", "shared"),
    [
        ("train", "train", True),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train[50%:]", True),
        ("train[:20]", "train[10:30]", True),
        ("train[:-10]", "train[20:]", True),
        ("train[:10%]+train[90%:]", "train[95%:]", True),
        ("train[1000:]", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:20]", "train[20:]", False),
        ("train[:-10]", "train[-10:]", False),
        ("train[:10%]+train[90%:]", "train[10%:90%]", False),
        ("train", "test", False),
        ("train[:90%", "train", False),
    ],
)
def test_slices_that_share_rows(split: str, other: str, shared: bool) -> None:
    one, two = DataPart(name="me/data", split=split), DataPart(name="me/data", split=other)
    assert shares_rows(one, two) == shares_rows(two, one) == shared
    assert not shares_rows(one, DataPart(name="me/data", config="en", split=other))
    assert not shares_rows(one, DataPart(name="me/other", split=other))


def test_a_file_is_the_same_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = _file(tmp_path, "a.jsonl", [{"text": "w1"}])
    (tmp_path / "link.jsonl").symlink_to(name)
    monkeypatch.chdir(tmp_path)
    for path in ("a.jsonl", "./a.jsonl", f"../{tmp_path.name}/a.jsonl", "link.jsonl"):
        assert shares_rows(DataPart(name=name), DataPart(name=path)), path
    other = _file(tmp_path, "b.jsonl", [{"text": "w2"}])
    assert not shares_rows(DataPart(name=name), DataPart(name=other))
