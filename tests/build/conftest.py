"""Builds that are interrupted as a killed process is."""

import pytest
from transformers import TrainerCallback

import cbd_trl.build.build as build_module
from cbd_trl import DistillTrainer


class _Interrupt(TrainerCallback):
    """Ends a run after a number of steps over all anchors, as a killed process would."""

    def __init__(self, after):
        self.left = after

    def on_step_begin(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(steps) makes the builds of a test stop after so many; interrupted(None) lets them run again.

    Returns the steps that were taken since.
    """
    steps = []

    def start(after):
        callback = _Interrupt(10**6 if after is None else after)

        class Trainer(DistillTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(callback)

            def training_step(self, *args, **kwargs):
                steps.append(self.state.global_step)
                return super().training_step(*args, **kwargs)

        steps.clear()
        monkeypatch.setattr(build_module, "DistillTrainer", Trainer)
        return steps

    return start
