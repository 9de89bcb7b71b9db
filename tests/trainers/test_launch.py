"""Two processes do what one does: under `accelerate launch`, and sharded by FSDP or DeepSpeed."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.launched import CASES, measure
from tests.training import assert_same_gradient

ROOT = Path(__file__).parents[2]
TERMS = ("loss", "kd", "ce", "teacher_ce", "num_tokens")


def launch(mode: str, folder: Path) -> dict[str, tuple]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # --multi_gpu is its name for torchrun: with --cpu it would start one process, or MPI.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m"]
    command = [sys.executable, "-m", *launcher, "tests.trainers.launched", mode, str(folder)]
    command.append(str(folder / "models"))
    cpu = (
        {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
        if mode == "zero"
        else {"ACCELERATE_USE_CPU": "1"}
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **cpu}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fsdp of the rest", "zero"))]
)
def test_two_processes_do_what_one_does(mode: str, tmp_path: Path) -> None:
    if mode == "zero":
        pytest.importorskip("deepspeed")
    expected = measure(mode, 1, str(tmp_path / "one"), str(tmp_path / "models"))
    measured = launch(mode, tmp_path)
    assert [*measured] == CASES[mode]
    for name, (logs, grads, metrics) in expected.items():
        ours: Any = measured[name]
        if mode != "zero":  # which keeps gradients to itself
            assert_same_gradient(ours[1], grads, rtol=1e-4)
        for one, other in zip(ours[0], logs, strict=True):
            for term in TERMS:
                assert one[term] == pytest.approx(other[term], rel=1e-5), (name, term)
        for term in TERMS[:-1]:
            assert ours[2][f"eval_{term}"] == pytest.approx(metrics[f"eval_{term}"], rel=1e-5), (name, term)
        (saved,), (own,) = ([*map(load_file, (f / name).glob("*.safetensors"))] for f in (tmp_path, tmp_path / "one"))
        # FSDP saves both ends of tied embeddings.
        assert saved.keys() - own.keys() <= {"lm_head.weight"}
        for key, tensor in own.items():
            assert (tensor - saved[key]).abs().max() < 1e-3, (name, key)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_exactly(tmp_path: Path) -> None:
    for name, (whole, resumed, equal) in launch("fsdp resumed", tmp_path).items():
        assert equal and resumed == whole and len(whole) == 3, name
