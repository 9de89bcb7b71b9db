"""The line of progress: what it says, where it goes, and that what the Trainer logs is left alone."""

import io
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from cbd_trl.trainers.callbacks import ProgressLine, show_progress
from tests.training import make_config, make_trainer, text_rows

TERMS = {"loss", "kd", "ce", "hidden", "teacher_ce", "num_tokens"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Run:
    """A run of steps that take as long, and have as many tokens, as is asked for."""

    def __init__(self, max_steps: int, step: int = 0, tokens: int = 0, main: bool = True) -> None:
        self.now, self.tokens = 0.0, tokens
        self.state = TrainerState(max_steps=max_steps, global_step=step, is_world_process_zero=main)
        self.line = ProgressLine("85M 3/5", lambda: self.tokens, lambda: self.now)
        self._tell("on_train_begin")

    def _tell(self, event: str, log: bool = False, **what: Any) -> None:
        getattr(self.line, event)(make_config(), self.state, TrainerControl(should_log=log), **what)

    def step(self, seconds: float, tokens: int, log: bool = False) -> None:
        self._tell("on_step_begin")
        self.now, self.tokens = self.now + seconds, self.tokens + tokens
        self.state.global_step += 1
        self._tell("on_step_end", log=log)

    def log(self, **logs: Any) -> None:
        self._tell("on_log", logs=logs)

    def says(self) -> str:
        return self.line.line(self.state)


def test_the_line_says_step_speed_time_left_and_both_losses() -> None:
    run = _Run(500)
    assert run.says() == "85M 3/5 · step 0/500"
    run.step(1.0, 1240)
    assert run.says() == "85M 3/5 · step 1/500 · 1,240 tokens/s · 8 min left"
    for _ in range(119):
        run.step(1.0, 1240)
    run.log(loss=3.0, ce=2.409, teacher_ce=2.2)
    assert run.says() == "85M 3/5 · step 120/500 · 1,240 tokens/s · 6 min left · ce 2.41 (teacher 2.20)"
    run.log(loss=3.0, ce=2.1)  # no teacher is run
    assert run.says().endswith(" · ce 2.10")
    run.log(eval_loss=1.0)
    assert run.says().endswith(" · ce 2.10")


def test_speed_is_that_of_the_last_steps() -> None:
    run = _Run(1000)
    for seconds in [60.0, *[1.0] * 50]:  # the first one compiled
        run.step(seconds, 100)
    assert run.says() == "85M 3/5 · step 51/1000 · 100 tokens/s · 16 min left"


def test_what_came_before_a_checkpoint_is_not_counted_as_speed() -> None:
    run = _Run(100, step=90, tokens=10**6)
    run.now += 500  # data that is skipped
    run.step(2.0, 300)
    assert run.says() == "85M 3/5 · step 91/100 · 150 tokens/s · 18 s left"


def test_off_a_terminal_a_line_comes_between_logs_that_are_far_apart(capsys: pytest.CaptureFixture[str]) -> None:
    run = _Run(1000)
    for _ in range(200):
        run.step(1.0, 10)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[1] for line in said] == [f"step {step}/1000" for step in (5, 15, 35, 75, 135, 195)]
    run.log(loss=1.0, ce=2.0)  # begins the minute again
    capsys.readouterr()
    for _ in range(59):
        run.step(1.0, 10)
    assert not capsys.readouterr().out
    run.step(1.0, 10)
    assert "step 260/1000" in capsys.readouterr().out
    run.step(100.0, 10, log=True)
    run.log(loss=1.0, ce=2.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "step 261/1000" in line]
    assert len(lines) == 1 and lines[0].endswith("ce 2.00")


def _trainer(**how: Any) -> Any:
    steps = {"max_steps": 3, "disable_tqdm": False, "hidden_weight": 1.0}
    return make_trainer(**{**steps, **how})


def test_a_resumed_training_has_the_speed_of_its_own_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 2,
        "train_dataset": text_rows((5,) * 8),
    }
    _trainer(**how).train()
    capsys.readouterr()
    trainer, seconds = _trainer(**how), itertools.count()
    show_progress(trainer, "it")
    line = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressLine))
    line._clock = lambda: float(next(seconds))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    before, after = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry][-2:]
    assert 0 < before < after
    assert f"it · step 3/3 · {after - before} tokens/s · 0 s left" in capsys.readouterr().out


def test_off_a_terminal_a_line_stands_below_each_log(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(logging_steps=2, max_steps=4)
    show_progress(trainer, "85M 2/3")
    capsys.readouterr()
    trainer.train()
    said = capsys.readouterr()
    assert "\r" not in said.out and not said.err  # nothing is rewritten
    first, line, second, other, summary = said.out.strip().splitlines()
    assert line.startswith("85M 2/3 · step 2/4 · ") and other.startswith("85M 2/3 · step 4/4 · ")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert line.endswith(f"left · ce {logs[0]['ce']:.2f} (teacher {logs[0]['teacher_ce']:.2f})")
    for printed in (first, second):
        assert all(f"'{term}'" in printed for term in TERMS)
    assert "train_runtime" in summary


def test_on_a_terminal_one_line_is_rewritten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = _Terminal()
    trainer = _trainer(logging_steps=3)
    show_progress(trainer, "85M 2/3")
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer.train()
    ce, teacher = (trainer.state.log_history[0][name] for name in ("ce", "teacher_ce"))
    *rewritten, last, end = terminal.getvalue().rpartition("\n")[0].rpartition("\r")
    assert "\n" not in "".join(rewritten) and "85M 2/3 · step 3/3" in end
    assert f"ce {ce:.2f} (teacher {teacher:.2f})" in end and last == "\r"
    out = capsys.readouterr().out
    assert "85M 2/3" not in out and "'teacher_ce'" in out


def test_it_is_silent_with_disable_tqdm_and_off_the_main_process(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(disable_tqdm=True)
    show_progress(trainer, "85M 2/3")
    trainer.train()
    said = capsys.readouterr()
    assert "85M" not in said.out + said.err and "'teacher_ce'" in said.out
    other = _Run(10, main=False)
    other.step(1.0, 10)
    other.log(loss=1.0, ce=1.0)
    assert capsys.readouterr() == ("", "")


def test_what_is_logged_reaches_the_integrations_of_report_to(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[dict[str, Any]] = []

    class Integration(TrainerCallback):
        def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            received.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Integration)
    trainer = _trainer(report_to="ours", kd_schedule="linear", kd_weight_end=0.5, eval_dataset=text_rows())
    show_progress(trainer, "it")
    trainer.train()
    trainer.evaluate()
    *steps, summary, evaluation = received
    assert len(steps) == 3 and "train_runtime" in summary
    for logs, kept in zip(steps, trainer.state.log_history, strict=False):
        assert (TERMS | {"kd_weight", "learning_rate", "grad_norm"}) <= logs.keys()
        assert logs == {name: value for name, value in kept.items() if name != "step"}
    assert {f"eval_{term}" for term in TERMS - {"num_tokens"}} <= evaluation.keys()
