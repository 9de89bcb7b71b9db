"""What a build tells while it trains: a line of progress per anchor, and the Trainer's logs to `report_to`."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback, WandbCallback, integration_utils

from cbd_trl import Chain, build_chain
from tests.build.bridged import bridge_config, bridge_step, build_bridged
from tests.chain.helpers import CHAIN_ANCHORS, chain_config, chain_rows, chain_source
from tests.tokenizer import tiny_tokenizer

TERMS = {"loss", "kd", "ce", "teacher_ce", "num_tokens"}


class _TensorBoard(TensorBoardCallback):
    """Writes what it is told to a file where the real one would."""

    def __init__(self) -> None:
        self.logging_dir: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logging_dir = self.logging_dir or str(Path(args.output_dir) / "runs")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.logging_dir is not None
        Path(self.logging_dir).mkdir(parents=True, exist_ok=True)
        with (Path(self.logging_dir) / "events").open("a") as file:
            file.write(" ".join(logs) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, str]:
    """A chain with a bridge, and what was printed while it was built."""
    folder = tmp_path_factory.mktemp("logs")
    how = {"disable_tqdm": False, "report_to": "tensorboard", "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patch, (folder / "out").open("w+") as out:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", _TensorBoard)
        patch.setattr("sys.stdout", out)
        bridge = bridge_step(args=bridge_config(**how))
        chain = build_bridged(folder / "chain", bridge=bridge, args=chain_config(**how))
    return chain, (folder / "out").read_text()


def test_each_anchor_has_a_line_of_progress(built: tuple[Chain, str]) -> None:
    chain, said = built
    for number, anchor in enumerate(chain.anchors, start=1):
        line = (
            rf"^{anchor.name} {number}/2 · step 3/3 · [\d,]+ tokens/s · 0 s left · "
            rf"ce {anchor.losses['ce']:.2f} \(teacher {anchor.losses['teacher_ce']:.2f}\)$"
        )
        assert re.search(line, said, re.MULTILINE), (line, said)


def test_the_logs_outlive_the_folder_of_the_checkpoints(built: tuple[Chain, str]) -> None:
    chain, _ = built
    for anchor in chain.anchors:
        *steps, last = (chain.path / "runs" / anchor.name / "events").read_text().splitlines()
        assert len(steps) >= 3 and all(set(line.split()) >= TERMS for line in steps[:3])
        assert "eval_kd" in last.split()
    assert not (chain.path / ".work").exists()
    assert [anchor.name for anchor in Chain.from_pretrained(chain.path).anchors] == [a.name for a in chain.anchors]


class _Wandb:
    """What the module keeps: the run that is open, and what became of all."""

    def __init__(self) -> None:
        self.run: str | None = None
        self.told: list[tuple[str | None, str]] = []

    def finish(self, exit_code: int) -> None:
        self.told.append((self.run, f"finished {exit_code}"))
        self.run = None


def _wandb_callback(wandb: _Wandb) -> type[WandbCallback]:
    """Opens runs as the real one does: where none is open."""

    class Callback(WandbCallback):
        def __init__(self) -> None:
            self._wandb = wandb

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wandb.run = wandb.run or args.run_name

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            wandb.told.append((wandb.run, "evaluated" if "eval_kd" in logs else "logged"))
            if len(wandb.told) > 40:
                raise RuntimeError("the server is gone")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pass

    return Callback


def _logged_to(wandb: _Wandb, folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Chain:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", _wandb_callback(wandb))
    return build_chain(
        chain_source(),
        CHAIN_ANCHORS,
        dataset=chain_rows(),
        output_dir=folder / "chain",
        args=chain_config(report_to="wandb", save_strategy="no", **how),
        processing_class=tiny_tokenizer(),
        eval_dataset=chain_rows(4, seed=9),
        calibration_tokens=64,
    )


@pytest.mark.parametrize("name", [None, "mine"])
def test_each_anchor_is_a_run_of_its_own(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    chain = _logged_to(wandb, tmp_path, monkeypatch, run_name=name)
    runs = list(dict.fromkeys(run for run, _ in wandb.told))
    assert runs == [anchor.name if name is None else f"mine {anchor.name}" for anchor in chain.anchors[1:]]
    for run in runs:
        assert [what for whose, what in wandb.told if whose == run][-2:] == ["evaluated", "finished 0"]


def test_a_run_that_the_caller_began_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    wandb.run = "the caller's"
    _logged_to(wandb, tmp_path, monkeypatch)
    assert wandb.run == "the caller's" and {run for run, _ in wandb.told} == {"the caller's"}


def test_a_run_that_fails_is_finished_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    wandb.told = [(None, "before")] * 41
    with pytest.raises(RuntimeError, match="the server is gone"):
        _logged_to(wandb, tmp_path, monkeypatch)
    assert wandb.run is None and wandb.told[-1][1] == "finished 1"
