"""Builds in processes of their own, forked from one that has imported everything, and killed wherever a test says."""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback, TrainerState

import cbd_trl.build.build as build_module
import cbd_trl.build.store as store_module
import cbd_trl.chain.folders as folders_module
from cbd_trl import Chain, DistillTrainer, build_chain
from cbd_trl.cards.card import CARD_FILES
from cbd_trl.chain.chain import STATISTICS_FILE
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.tokenizer import tiny_tokenizer

SAVE_STEPS, STEPS = 2, 5
# What a build does, by the functions that do it: where each is looked up, and its name.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "cutting": [
        *(
            (build_module, name)
            for name in ("choose_blocks", "initial_student", "refit_student", "store_source_anchor")
        ),
        (store_module, "save_statistics"),
    ],
    "training": [(DistillTrainer, "training_step")],
    "saving": [(DistillTrainer, "_save_checkpoint"), (store_module, "write_anchor")],
    "end of a checkpoint": [(TrainerState, "save_to_json")],
    "manifest": [(folders_module, "write_manifest"), (folders_module, "_move_folder")],
    "clearing": [(build_module, "remove_work_folder")],
    "anywhere": [(build_module, "_make_anchors")],
}


@dataclass(frozen=True)
class Kill:
    """Where a build dies.

    Args:
        phase: one of `PHASES`.
        call: at which call of a Python or C function during it, from 1.
        entry: counted from the phase's so manieth beginning; None: over all of them.
    """

    phase: str
    call: int
    entry: int | None = None


class _Calls:
    """Counts the calls of phases, and kills the process at one of them."""

    def __init__(self, phases: list[str], kill: Kill | None) -> None:
        self.counts, self._entries, self._kill = Counter[str](), Counter[str](), kill
        for phase in phases:
            for owner, name in PHASES[phase]:
                setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outer = sys.getprofile()

            def count(frame: Any, event: str, arg: Any) -> None:
                if outer is not None:
                    outer(frame, event, arg)
                if event in ("call", "c_call"):
                    self._count(phase)

            self._entries[phase] += 1
            sys.setprofile(count)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(outer)

        return watched

    def _count(self, phase: str) -> None:
        kill, entry = self._kill, self._entries[phase]
        if kill is None or kill.entry in (None, entry):
            self.counts[phase] += 1
            if kill is not None and self.counts[phase] == kill.call:
                os.kill(os.getpid(), signal.SIGKILL)


class _Journal(TrainerCallback):
    """What a run did, line by line, in a file that outlives it: steps begun, and checkpoints written."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _add(self, what: str, args: Any, state: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{what} {Path(args.output_dir).name} {state.global_step}\n")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add("step", args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add("saved", args, state)


def build(folder: Path, anchors: int = 2, **args: Any) -> Chain:
    """The chain of these tests: two anchors of five steps each, a checkpoint after two, four and five."""
    return build_chain(
        chain_source(),
        CHAIN_ANCHORS[:anchors],
        dataset=chain_rows(),
        eval_dataset=chain_rows(4, seed=9),
        output_dir=folder,
        args=chain_config(**{"max_steps": STEPS, "save_steps": SAVE_STEPS, **args}),
        processing_class=tiny_tokenizer(),
        calibration_tokens=256,
    )


def build_and_die(folder: Path, kill: Kill | None = None, anchors: int = 2) -> None:
    """Build, in a process that is there for nothing else."""

    class Trainer(DistillTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(_Journal(_journal_of(folder)))

    build_module.DistillTrainer = Trainer  # type: ignore[misc]
    if kill is not None:
        _Calls([kill.phase], kill)
    build(folder, anchors)


def count_calls(folder: Path, phases: list[str]) -> None:
    """Build, and write how many calls each phase is: a file `<phase>.calls` each beside the folder."""
    calls = _Calls(phases, None)
    build(folder)
    for phase in phases:
        (folder.parent / f"{phase}.calls").write_text(str(calls.counts[phase]))


def _journal_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.journal"


def take_journal(folder: Path) -> dict[str, dict[str, list[int]]]:
    """What was done since it was last taken: anchor -> steps begun, and steps saved."""
    file, told = _journal_of(folder), {}
    for line in file.read_text().splitlines() if file.exists() else []:
        what, name, step = line.split()
        told.setdefault(name, {"step": [], "saved": []})[what].append(int(step))
    file.unlink(missing_ok=True)
    return told


def _settled(function: Callable[..., None], *args: Any) -> None:
    # All that it is forked with is imported, and none of it garbage.
    gc.freeze()
    torch.set_num_threads(1)
    function(*args)


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


def forked(function: Callable[..., None], *args: Any, seconds: float = 300) -> int:
    """Call a function of a module in a process of its own.

    Returns:
        its exit code: 0, 1 where it raised, or below 0 where a signal killed it.
    """
    process = _FORKS.Process(target=_settled, args=(function, *args))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def contents(folder: Path) -> dict[str, Any]:
    """What is below a folder, in a form that is the same for the same chain.

    safetensors writes metadata in any order, which is no part of what a file says, nor then is its hash in chain.json.
    """
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                found |= {f"{name}/{key}": tensors.get_tensor(key).numpy().tobytes() for key in sorted(tensors.keys())}
                found[name] = tensors.metadata()
        else:
            found[name] = file.read_bytes()
    chain = json.loads(found["chain.json"])
    del chain["checksum"]
    for anchor in chain["anchors"]:
        del anchor["files"][STATISTICS_FILE]
    return {**found, "chain.json": chain}


def fingerprints(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file below a folder was last written, and its sha256; cards tell of the whole chain and follow it."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in CARD_FILES
    }
