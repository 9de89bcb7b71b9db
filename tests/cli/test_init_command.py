"""`cbd-trl init`: one model, many, or none but a table."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_trl.cli.main import main
from cbd_trl.cli.parsing import parse_sizes
from cbd_trl.utils.datasets import load_rows
from tests.chain.helpers import WIDE, chain_rows, random_chain


@pytest.fixture
def sizes(chain):
    """Two sizes between the last two anchors, as a user types them."""
    upper, lower = (anchor.num_parameters for anchor in chain.anchors[1:])
    return [f"{lower + share * (upper - lower):.0f}" for share in (0.3, 0.6)]


def run(capsys, *flags):
    code = main(["init", *map(str, flags)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_many_sizes_in_one_pass(chain_folder, sizes, tmp_path, capsys):
    flags = [chain_folder, "--sizes", ",".join(sizes), "--tolerance", 0.1, "--output", tmp_path / "models"]
    code, shown, _ = run(capsys, *flags)
    assert code == 0 and "Kept" not in shown
    folders = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert len(folders) == 2 and all(name.endswith("K") for name in folders)
    for folder in folders:
        AutoModelForCausalLM.from_pretrained(tmp_path / "models" / folder)
        AutoTokenizer.from_pretrained(tmp_path / "models" / folder)
        assert f"models/{folder}: " in shown
    code, shown, _ = run(capsys, *flags)
    assert code == 0 and shown.count("Kept from an earlier run.") == 2


def test_a_failing_size_is_named_and_the_others_are_made(chain_folder, sizes, tmp_path, capsys):
    flags = ["--tolerance", "0.1", "--output", tmp_path / "models"]
    code, shown, err = run(capsys, chain_folder, "--sizes", sizes[0], "9B", *flags)
    assert code == 1 and "operator nested" in shown
    line = err.strip().splitlines()[-1]
    assert line.startswith(
        "cbd-trl init: error: 1 of 2 sizes cannot be made. 9B: num_parameters=9,000,000,000 lies outside"
    )
    assert len(list((tmp_path / "models").iterdir())) == 1


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_text_is_read_from_a_file(tmp_path, kind):
    rows, file = chain_rows(30, seed=5), tmp_path / f"text.{kind}"
    if kind == "jsonl":
        rows.to_json(file)
    elif kind == "parquet":
        rows.to_parquet(file)
    else:
        file.write_text("\n".join(rows["text"]))
    assert load_rows(str(file))["text"][:] == rows["text"][:]


def test_calibration_data_from_a_file_and_what_it_chose(chain_folder, tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    chain_rows(30, seed=5).to_json(file)
    flags = ["--shape", json.dumps(WIDE), "--calibration-data", file, "--output", tmp_path / "model"]
    code, shown, _ = run(capsys, chain_folder, *flags)
    provenance = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.cbd_trl
    assert code == 0 and f"operator {provenance['operator']} of " in shown
    assert f"chosen by the loss on {provenance['calibration_tokens']} tokens of calibration text" in shown
    if provenance["alpha"] is not None:
        assert f"alpha {provenance['alpha']:.3g}" in shown


def test_a_dry_run_prints_a_table_and_writes_nothing(chain_folder, chain, sizes, tmp_path, capsys):
    before = sorted(path for path in tmp_path.rglob("*"))
    flags = ["--sizes", f"{sizes[0]},{sizes[1]},{chain.source.num_parameters}", "--tolerance", "0.1", "--dry-run"]
    code, shown, _ = run(capsys, chain_folder, *flags, "--output", tmp_path / "models")
    assert code == 0 and "this is a dry run" in shown
    lines = [line for line in shown.splitlines() if "float32" in line]
    assert len(lines) == 3 and "nested, alpha" in lines[0] and "the anchor itself" in lines[2]
    assert sorted(path for path in tmp_path.rglob("*")) == before
    code, shown, _ = run(capsys, chain_folder, "--shape", json.dumps(WIDE), "--dry-run", "--calibration-data", "x")
    assert code == 0 and shown.count("float32") == 1 and "may turn out otherwise" in shown


def test_a_search_of_shapes(tmp_path, capsys):
    made = random_chain(tmp_path / "chain")
    middle = sum(anchor.num_parameters for anchor in made.anchors) // 2
    flags = [made.path, "--num-parameters", middle, "--shape-search", "4"]
    code, shown, _ = run(capsys, *flags, "--dry-run")
    lines = [line for line in shown.splitlines() if "float32" in line]
    assert code == 0 and len(lines) > 1
    # The best is first and marked.
    assert ["★" in line for line in lines] == [True] + [False] * (len(lines) - 1)
    scores = [float(line.split()[-1]) for line in lines]
    assert scores == sorted(scores)
    code, shown, _ = run(capsys, *flags, "--output", tmp_path / "made")
    assert code == 0 and "the best of up to 4 shapes" in shown
    code, _, err = run(capsys, *flags, "--dry-run", "--shape", json.dumps(WIDE))
    assert code == 1 and "config=" in err and "gives the shape" in err


def test_a_limit_of_memory(tmp_path, capsys):
    made = random_chain(tmp_path / "chain")
    flags = [made.path, "--memory-limit", "150kB", "--context-length", 64, "--storage", "q8_0"]
    code, shown, _ = run(capsys, *flags, "--dry-run")
    (line,) = [line for line in shown.splitlines() if "float32" in line]
    assert code == 0 and "q8_0 + 64 tokens" in shown and " kB = 1" in line
    code, shown, _ = run(capsys, *flags, "--dry-run", "--shape-search", "4", "--flops-limit", "1e9")
    assert code == 0 and shown.count("★") == 2
    code, shown, _ = run(capsys, *flags, "--output", tmp_path / "made")
    assert code == 0 and "the largest within 150 kB in q8_0 with a cache of 64 tokens" in shown
    for other, wanted in (("--num-parameters", 1), ("--sizes", 2)):
        code, _, err = run(capsys, *flags, "--dry-run", other, "100k")
        assert code == wanted and other.strip("-").replace("-", "_") in err.replace("--", "")


def test_a_dry_run_names_the_sizes_that_fail(chain_folder, sizes, capsys):
    code, shown, err = run(capsys, chain_folder, "--sizes", "9B", sizes[0], "--tolerance", "0.1", "--dry-run")
    assert code == 1 and shown.count("float32") == 1
    assert "1 of 2 sizes cannot be made. 9B: num_parameters=9,000,000,000 lies outside" in err
    code, _, err = run(capsys, chain_folder, "--num-parameters", "9B", "--dry-run")
    assert code == 1 and err.startswith("cbd-trl init: error: num_parameters=9,000,000,000 lies outside")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--sizes", "1M", "--num-parameters", "1M"], 2, "--sizes and --num-parameters both name sizes"),
        (["--sizes", "1M"], 2, "--output is missing"),
        (["--sizes", "big", "--output", "x"], 1, "'big'"),
        (["--dry-run"], 1, "No size or shape was requested"),
    ],
)
def test_what_cannot_be_asked_for(chain_folder, flags, code, message, capsys):
    found, _, err = run(capsys, chain_folder, *flags)
    assert found == code and message in err


def test_parse_sizes():
    assert parse_sizes(["100e6,120e6"]) == [100e6, 120e6] == parse_sizes(["100M", "120M"]) == parse_sizes([1e8, 120e6])
    assert parse_sizes("1.5B, 900M,") == [1.5e9, 9e8]
    with pytest.raises(ValueError, match=r"'x'.*number of parameters"):
        parse_sizes(["1M,x"])
