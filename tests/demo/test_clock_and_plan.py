"""Time left, and the demo's arguments."""

import pytest

from cbd_trl.demo import clock as clock_module
from cbd_trl.demo.clock import Clock, peak_memory, predict
from cbd_trl.demo.plan import SMOLLM2, default_steps, training_args
from cbd_trl.utils.formatting import format_seconds


def test_the_clock_learns_from_finished_stages(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    clock = Clock({"first": 10.0, "second": 20.0, "third": 0.0})
    assert clock.left() == 30
    clock.start("first")
    now[0] = 15.0
    clock.start("second")
    assert clock.seconds("second") == pytest.approx(30)
    assert clock.left() == pytest.approx(30)
    now[0] = 45.0
    clock.stop()
    assert clock.left() == 0


def test_prediction_at_the_stated_speed_is_within_the_promise():
    for bf16 in (False, True):
        seconds = predict(
            [135_000_000, 85_000_000, 44_000_000],
            targets=6,
            operators=5,
            swap_probabilities=SMOLLM2.swap_probabilities,
            speed=380,
            bf16=bf16,
            steps=default_steps(bf16),
            step_tokens=SMOLLM2.batch_size * SMOLLM2.max_length,
            calibration_tokens=SMOLLM2.calibration_tokens,
            held_out_tokens=SMOLLM2.held_out_blocks * SMOLLM2.held_out_length,
            answer_tokens=SMOLLM2.answer_tokens,
        )
        assert list(seconds) == ["anchor 1", "anchor 2", "sweep", "answers"]
        assert sum(seconds.values()) < 14 * 60


@pytest.mark.parametrize(("seconds", "text"), [(40.2, "40 s"), (360, "6 min"), (3900, "1 h 5 min")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_peak_memory_is_that_of_a_python_with_torch():
    assert 0.1 < peak_memory() < 64


def test_every_anchor_has_its_learning_rate(tmp_path):
    rates = [training_args(SMOLLM2, n, str(tmp_path), 20, 0, False).learning_rate for n in (0, 1)]
    assert rates == [4e-4, 6e-4]
    assert len(SMOLLM2.targets) == 6
