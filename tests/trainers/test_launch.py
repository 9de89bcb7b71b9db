"""Two processes do what one does: under `accelerate launch`, and sharded by FSDP or DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import launch
from tests.trainers.launched import CASES, measure, measure_steps
from tests.training import assert_same_gradient

TERMS = ("loss", "kd", "ce", "teacher_ce", "num_tokens")


def launched(mode: str, folder: Path) -> dict[str, tuple]:
    """What two processes measure in a mode of launched.py."""
    zero = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"} if mode == "zero" else {}
    launch("tests.trainers.launched", mode, str(folder), str(folder / "models"), **zero)
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    launched("ddp", folder)
    return folder


def test_one_step_and_evaluation_of_two_processes_are_those_of_one(under_ddp: Path) -> None:
    measured, expected = torch.load(under_ddp / "step.pt"), measure_steps(processes=1)
    assert measured.keys() == expected.keys()
    for how, (logs, grads, metrics) in expected.items():
        ours = measured[how]
        assert_same_gradient(ours[1], grads)
        for name in ("loss", "kd", "ce", "hidden", "teacher_ce"):
            assert ours[0][name] == pytest.approx(logs[name], rel=1e-5), (how, name)
            assert ours[2][f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5), (how, name)
        assert ours[0]["num_tokens"] == logs["num_tokens"], how


# Between CPUs an older torch (2.8 was run) adds up the gradients that FSDP averages, and 2.7 keeps a teacher whole.
sharded = pytest.mark.skipif(torch.__version__ < "2.13", reason="FSDP of an older torch, on CPUs")


@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        pytest.param("fsdp", marks=sharded),
        pytest.param("fsdp of the rest", marks=[sharded, pytest.mark.slow]),
        pytest.param("zero", marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(mode: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if mode == "zero":
        pytest.importorskip("deepspeed")
    folder = request.getfixturevalue("under_ddp") if mode == "ddp" else tmp_path
    expected = measure(mode, 1, str(tmp_path / "one"), str(tmp_path / "models"))
    measured = torch.load(folder / "out.pt") if mode == "ddp" else launched(mode, folder)
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
        (saved,), (own,) = ([*map(load_file, (f / name).glob("*.safetensors"))] for f in (folder, tmp_path / "one"))
        # FSDP saves both ends of tied embeddings.
        assert saved.keys() - own.keys() <= {"lm_head.weight"}
        for key, tensor in own.items():
            assert (tensor - saved[key]).abs().max() < 1e-3, (name, key)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_exactly(tmp_path: Path) -> None:
    for name, (whole, resumed, equal) in launched("fsdp resumed", tmp_path).items():
        assert equal and resumed == whole and len(whole) == 3, name
