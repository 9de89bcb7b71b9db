"""Processes of the tests: what each settles before it works, and two that work as one."""

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def settle() -> None:
    """Use one thread, and leave what was imported so far out of every later collection of garbage.

    Of torch, transformers and TRL there are half a million objects, and accelerate collects after every training: to
    walk through them each time takes longer than a tiny training.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def launch(module: str, *words: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module words` in processes that work as one, on the CPU, under `accelerate launch`.

    Args:
        module: to run.
        words: its arguments.
        processes: how many.
        environment: variables besides those of this process; without any, accelerate is kept on the CPU.

    Returns:
        what became of it; every process ended well.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # --multi_gpu is its name for torchrun: with --cpu it would start one process, or MPI.
    launcher = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", port]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", module]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *words]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {"ACCELERATE_USE_CPU": "1"})}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return done
