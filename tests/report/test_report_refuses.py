"""What `cbd-trl report` refuses, before a model is measured."""

import re

import pytest

from cbd_trl import Chain
from tests.report.conftest import QUICK, run


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr("cbd_trl.report.measure.sweep", lambda *args, **options: pytest.fail("measured"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--operators", "nestd"], r"Unknown operator 'nestd'\. Did you mean 'nested'"),
        (["--operators", "random,nested"], r"the first one decides the shape.*Begin with nested"),
        (["--blocks", "0"], r"blocks=0 must be at least 1"),
        (["--block_length", "1"], r"block_length=1 must be at least 2"),
        (["--batch_size", "0"], r"batch_size=0 must be at least 1"),
        (["--limit", "0"], r"limit=0 must be at least 1"),
        (["--block_length", "65"], r"block_length=65 is more than the 64 positions.*Ask for 64 or fewer"),
        (["--blocks", "9000"], r"texts fill \d+ blocks of 24 tokens, 9000 blocks.*fewer or shorter"),
        (["--sizes", "9B"], r"size 9B lies outside.*\d+(\.\d+)?k.*Leave it out"),
        (["--sizes", "many"], r"many"),
        (["--include_path", "nowhere", "--tasks", "colors"], r"no folder nowhere"),
        (["--data", "gone.jsonl"], r"There is no file gone\.jsonl"),
        (["--compare", "no-such-chain"], r"no-such-chain"),
        (["--data", "{rows}"], r"columns \['words'\], and none of the SFT formats.*'text'"),
        (["--text_column", "body", "--data", "{rows}"], r"no column 'body'.*columns are \['words'\]\. Name one that"),
        (["--text_column", "nope"], r"no column 'nope', where text is expected; its columns are \['text'\]"),
        (["--text_column", "id", "--data", "{numbers}"], r"int in the column 'id'.*columns are \['id', 'text'\]"),
        (["--data", "{empty}"], r"empty\.jsonl is empty: there is no text"),
        (["--data", "{blank}"], r"blank\.txt holds no rows of text"),
        (["--data", "{document}"], r"text\.docx is not a dataset file"),
        (["--output", "{document}"], r"text\.docx is a file.*folder"),
    ],
)
def test_it_says_what_is_wrong_and_writes_nothing(word_chain, words, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    files = {"rows": "rows.jsonl", "empty": "empty.jsonl", "blank": "blank.txt", "document": "text.docx"}
    files["numbers"] = "numbers.jsonl"
    contents = ('{"words": "w1 w2"}\n', "", " \n\n", "w1 w2", '{"text": "w1 w2", "id": 3}\n')
    for name, content in zip(files.values(), contents, strict=True):
        (tmp_path / name).write_text(content)
    flags = [flag.format(**files) for flag in flags]
    code, _, err = run(word_chain, "--data", words, *QUICK, *flags)
    assert code == 1 and re.search(message, err), err
    # Above it there may be the bars of a file that was read.
    assert err.strip().splitlines()[-1].startswith("cbd-trl report: error: ")
    assert not (tmp_path / "chain-report").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--data", "x.jsonl"], r"The chain is missing: cbd-trl report CHAIN"), (["chain"], r"--data")],
)
def test_what_is_required_is_named(flags, message):
    code, _, err = run(*flags)
    assert code == 2 and re.search(message, err)


def test_a_size_no_shape_comes_near_is_named(word_chain, words, tmp_path):
    upper, lower = (anchor.num_parameters for anchor in Chain.from_pretrained(word_chain).anchors[:2])
    flags = ["--sizes", f"{lower + 0.3 * (upper - lower):.0f}", "--tolerance", "0.0001", "--output", tmp_path]
    code, _, err = run(word_chain, "--data", words, *flags)
    assert code == 1 and re.search(r"The size .* cannot be measured\. .*Nearest: ", err), err


def test_results_of_something_else_are_not_overwritten(word_chain, words, tmp_path):
    (tmp_path / "results.json").write_text("notes")
    code, _, err = run(word_chain, "--data", words, "--output", tmp_path)
    assert code == 1 and re.search(r"results\.json is not JSON.*delete it", err)
    assert (tmp_path / "results.json").read_text() == "notes"
