"""Two processes in two places leave the same bytes, but for what docs/guides/chains.md excepts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cbd_trl.utils.tensor_files import save_tensors, tensor_bytes, write_tensors
from tests.recipe.helpers import write_inputs, write_recipe

ROOT = Path(__file__).parents[2]
# What the table of exceptions in docs/guides/chains.md says, one expression a row.
EXCEPTIONS = {
    "`training_args.bin`": r"run/.*training_args\.bin",
    "`evaluation-results.json`, `loss-against-size.json`": r"(chain|copy)/(evaluation-results|loss-.*-size)\.json",
    "`report.json`, `results.json`, `report.html`": r"report/(report\.json|results\.json|report\.html)",
    "`README.md`": r"(chain|copy)/README\.md",
    "`runs/`": r"(chain|bridged|run)/runs/.*",
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Everything, written twice: at one time, in folders of other names, with other hashes of strings."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    write_recipe(inputs)
    folders = tmp_path_factory.mktemp("one") / "a", tmp_path_factory.mktemp("other") / "deeper" / "b"
    processes = []
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "tests.build.everything", str(inputs), str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": str(number + 1), "OMP_NUM_THREADS": "1"}
        with (folder.parent / "log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    for folder, process in zip(folders, processes, strict=True):
        assert process.wait() == 0, (folder.parent / "log").read_text()
    return folders


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(value: object) -> object:
    """JSON without what is a number of seconds, or the chain's folder."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key and key != "path"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def without_seconds(card: bytes) -> list[str]:
    """Lines of a card without its seal, which hashes all others, and rows of its tables without the last column."""
    lines = [line for line in card.decode().splitlines() if not line.startswith("<!-- Written by cbd_trl")]
    return [line.rpartition("|")[0].rpartition("|")[0] or line for line in lines]


def test_two_builds_differ_in_nothing_but_the_exceptions(twice: tuple[Path, Path]) -> None:
    one, other = map(files, twice)
    assert one.keys() == other.keys() and len(one) > 100
    differing = {name for name in one if one[name] != other[name]}
    assert {name for name in differing if not any(re.fullmatch(what, name) for what in EXCEPTIONS.values())} == set()
    # In what does differ it is time and place alone.
    for name in differing:
        if name.endswith(".json"):
            assert timeless(json.loads(one[name])) == timeless(json.loads(other[name])), name
        elif name.endswith("README.md"):
            assert without_seconds(one[name]) == without_seconds(other[name]), name


def test_the_exceptions_are_those_of_the_docs() -> None:
    text = (ROOT / "docs" / "guides" / "chains.md").read_text(encoding="utf-8")
    section = text.partition("## The same build, the same bytes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (`.*?) \|", section, flags=re.M) == list(EXCEPTIONS)


def test_metadata_are_written_in_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)}
    metadata = {name: 'é\n"' + name for name in "zyxwvutsrqponmlkjihgfedcba"}
    save_tensors(tensors, tmp_path / "file.safetensors", metadata)
    written = (tmp_path / "file.safetensors").read_bytes()
    assert written == tensor_bytes(tensors, dict(sorted(metadata.items())))
    assert list(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["__metadata__"]) == sorted(metadata)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == metadata
    save_tensors(tensors, tmp_path / "bare.safetensors")
    assert load_file(tmp_path / "bare.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("reverse", [False, True])
def test_tensors_written_one_by_one_are_the_same_file(tmp_path: Path, reverse: bool) -> None:
    tensors = {
        "b": torch.arange(6.0).view(2, 3).T,
        "é": torch.ones(1, dtype=torch.bfloat16),
        "a": torch.arange(5, dtype=torch.uint8),
        "c": torch.zeros(2, 2),
    }
    metadata = {"z": "1", "a": '"'}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    items = list(tensors.items())[:: -1 if reverse else 1]
    write_tensors(tmp_path / "file.safetensors", entries, iter(items), metadata)
    expected = tensor_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "file.safetensors").read_bytes() == expected
    for wrong in (items[:-1], items + items[:1], [("b", torch.zeros(3)), *items]):
        with pytest.raises(ValueError, match=r"No tensor was given|wanted"):
            write_tensors(tmp_path / "wrong.safetensors", entries, iter(wrong), metadata)
