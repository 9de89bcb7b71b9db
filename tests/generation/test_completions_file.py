"""Interrupted anywhere and run again, a file ends as if it had not been; nothing else is ever written into it."""

import json

import pytest

from cbd_trl.generation.files import CompletionsFile
from cbd_trl.generation.generate import Completer
from tests.generation.helpers import PROMPTS, complete, tiny_teacher


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The bytes of a file of seven rows in batches of three."""
    return complete(tmp_path_factory.mktemp("unbroken") / "out.jsonl").file.read_bytes()


class Killed(Exception):
    pass


def interrupt(monkeypatch, after):
    """Have the completer die in the batch that follows so many, and the list of batches it was given."""
    batches, real = [], Completer.complete

    def count(self, prompts, rows):
        if len(batches) == after:
            raise Killed
        batches.append(list(rows))
        return real(self, prompts, rows)

    monkeypatch.setattr(Completer, "complete", count)
    return batches


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, unbroken, after):
    file = tmp_path / "new folder" / "out.jsonl"
    with monkeypatch.context() as patched:
        interrupt(patched, after)
        with pytest.raises(Killed):
            complete(file)
    assert file.read_bytes() == b"".join(unbroken.splitlines(keepends=True)[: 3 * after])
    with monkeypatch.context() as patched:
        batches = interrupt(patched, -1)
        complete(file)
        assert batches == [[0, 1, 2], [3, 4, 5], [6]][after:]
    assert file.read_bytes() == unbroken


def test_a_batch_or_a_line_written_in_part_is_written_again(tmp_path, unbroken):
    file = tmp_path / "out.jsonl"
    complete(file)
    lines = unbroken.splitlines(keepends=True)
    sizes = (len(b"".join(lines[:4])), len(b"".join(lines[:4])) + 5, len(unbroken) - 1, 7, 0)
    for size in sizes:
        file.write_bytes(unbroken[:size])
        complete(file)
        assert file.read_bytes() == unbroken


def test_a_finished_file_is_left_alone(tmp_path, monkeypatch, unbroken):
    file = tmp_path / "out.jsonl"
    complete(file)
    interrupt(monkeypatch, 0)
    assert complete(file).rows == 7
    assert file.read_bytes() == unbroken


def test_the_settings_are_beside_it(tmp_path):
    complete(tmp_path / "out.jsonl", seed=3)
    settings = json.loads((tmp_path / "out.jsonl.settings").read_text())
    assert (settings["seed"], settings["temperature"], settings["rows"], settings["ends"]) == (3, 1.0, 7, [2])
    assert str(tmp_path) not in json.dumps(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0, requested 1"),
        ({"temperature": 0.5}, "temperature is 1.0, requested 0.5"),
        ({"max_new_tokens": 4}, "max_new_tokens is 8, requested 4"),
        ({"batch_size": 2}, "batch_size is 3, requested 2"),
        ({"num_return_sequences": 2}, "num_return_sequences is 1, requested 2; rows is 7, requested 14"),
        ({"dataset": PROMPTS[:5]}, "prompts_sha256 is '.*', requested '.*'; rows is 7, requested 5"),
        ({"dataset": [*PROMPTS[1:], PROMPTS[0]]}, "prompts_sha256 is"),
        ({"model": tiny_teacher(rms_norm_eps=1e-3)}, "teacher_fingerprint is"),
    ],
)
def test_rows_made_in_another_way_are_not_added(tmp_path, unbroken, changes, message):
    file = tmp_path / "out.jsonl"
    complete(file)
    with pytest.raises(ValueError, match=rf"generated in another way: .*{message}.*Give another output_file"):
        complete(file, **changes)
    assert file.read_bytes() == unbroken


def test_a_first_try_without_a_row_binds_nobody(tmp_path, monkeypatch, unbroken):
    with monkeypatch.context() as patched:
        interrupt(patched, 0)
        with pytest.raises(Killed):
            complete(tmp_path / "out.jsonl", seed=5)
    assert complete(tmp_path / "out.jsonl").file.read_bytes() == unbroken


def test_a_file_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"out.jsonl exists, and out.jsonl.settings beside it does not"):
        complete(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_a_changed_file_is_not_added_to(tmp_path):
    file = complete(tmp_path / "out.jsonl").file
    whole = file.read_text()
    file.write_text(whole.replace('"prompt"', "prompt", 1))
    with pytest.raises(ValueError, match=r"out.jsonl, line 1 is not JSON .*: the file was changed or damaged"):
        complete(file)
    file.write_text(whole + "{}" + "\n")
    with pytest.raises(ValueError, match=r"out.jsonl has 8 rows, and 7 are generated: the file was changed"):
        complete(file)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record_is_named(tmp_path, text):
    file = tmp_path / "out.jsonl"
    file.write_text("{}\n")
    file.with_name("out.jsonl.settings").write_text(text)
    with pytest.raises(ValueError, match=r"out.jsonl.settings cannot be read .* how the rows of .* is not known"):
        CompletionsFile(file, {"rows": 1}, 1)
