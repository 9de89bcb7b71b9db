"""`accelerate launch` on two processes builds the chain that one process builds, and says everything once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cbd_trl import Chain
from cbd_trl.cli.main import main
from tests.recipe.helpers import ARGS, write_recipe

ROOT = Path(__file__).parents[2]
# SGD, because two ways of adding up a gradient of almost 0 are two steps of Adam.
SGD = {**ARGS, "optim": "sgd", "learning_rate": 0.1, "disable_tqdm": False, "logging_steps": 1}


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `accelerate launch -m cbd_trl.cli ...`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # --multi_gpu is its name for torchrun: with --cpu it would start one process, or MPI.
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cbd_trl.cli"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def _recipe(folder: Path, inputs: Path, processes: int) -> list[str]:
    folder.mkdir()
    anchors = [{"shape": {"num_hidden_layers": 4}}, {"shape": {"num_hidden_layers": 3}}]
    args = {**SGD, "per_device_train_batch_size": 4 // processes}
    evaluation = {"data": str(inputs / "held.jsonl"), "sizes": [40_000], "tokens": 64, "length": 16}
    file = write_recipe(inputs, anchors=anchors, args=args, evaluation=evaluation, output_dir=str(folder / "chain"))
    return ["build", str(file.rename(folder / "recipe.yaml"))]


@pytest.mark.slow
def test_two_processes_build_the_chain_of_one(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_recipe(tmp_path / "one", inputs, 1)) == 0
    command = _recipe(tmp_path / "two", inputs, 2)
    done = launch(*command)
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (Chain.from_pretrained(tmp_path / name / "chain") for name in ("one", "two"))
    assert len(two.anchors) == 3 and not list(two.path.glob(".work*"))
    for ours, theirs in zip(two.anchors, one.anchors, strict=True):
        for field in ("name", "parent", "blocks", "shape", "tokenizer_sha256", "tokens_seen"):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        weights, expected = ours.load_state_dict(), theirs.load_state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.allclose(weights[key], expected[key], atol=1e-3, rtol=0) for key in expected), ours.name
    before = [anchor.load_state_dict() for anchor in one.anchors]
    assert before[1]["model.embed_tokens.weight"].ne(before[0]["model.embed_tokens.weight"]).any()  # it was trained
    found, expected = (json.loads((c.path / "loss-against-size.json").read_text()) for c in (two, one))
    assert len(found["anchors"]) == 3 and len(found["targets"]) == len(expected["targets"]) == 1
    for ours, theirs in zip(
        found["anchors"] + found["targets"], expected["anchors"] + expected["targets"], strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for line in ("The chain is in", "[2/3] distilling", f"{two.anchors[1].name} 2/3 · step 2/2 ·"):
        assert done.stdout.count(line) == 1, done.stdout
    files = {file: file.stat().st_mtime_ns for file in two.path.rglob("*.safetensors")}
    again = launch(*command)
    assert again.returncode == 0, again.stderr[-6000:]
    assert {file: file.stat().st_mtime_ns for file in two.path.rglob("*.safetensors")} == files


@pytest.mark.slow
def test_a_recipe_that_is_wrong_ends_both_processes(inputs: Path, tmp_path: Path) -> None:
    done = launch(*_recipe(tmp_path / "two", inputs, 2), "--set", "args.max_stepz=3")
    assert done.returncode != 0 and "max_steps" in done.stderr
    assert not (tmp_path / "two" / "chain").exists()
