"""The demo's time left, and its memory."""

import pytest

from cbd_trl.demo import run as run_module
from cbd_trl.demo.run import Clock, peak_memory
from cbd_trl.utils.formatting import format_seconds


def test_the_clock_learns_from_finished_stages(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
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


@pytest.mark.parametrize(("seconds", "text"), [(40.2, "40 s"), (360, "6 min"), (3900, "1 h 5 min")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_peak_memory_is_that_of_a_python_with_torch():
    assert 0.1 < peak_memory() < 64
