"""What is shown of long work: a bar on a terminal, plain lines elsewhere, nothing where nothing is wanted."""

import io
import sys
import time

import pytest

from cbd_trl.utils import progress
from cbd_trl.utils.progress import Progress, Ticker, progress_shown


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(Ticker.__init__, "__defaults__", (clock,))
    # Lines come from the steps alone.
    monkeypatch.setattr(progress, "_LOOK", 3600.0)
    return clock


def work(clock, seconds, steps=100, **how):
    for _ in Progress("Factorizing", range(steps), **how):
        clock.now += seconds / steps


def test_lines_come_after_five_seconds_then_ever_less_often(clock, capsys):
    work(clock, seconds=300, steps=300)
    said = capsys.readouterr()
    assert not said.out
    lines = said.err.splitlines()
    # After 5 s, 10 more, 20 more, 40 more, then every minute.
    done = [int(line.split(": ")[1].split("/")[0]) for line in lines]
    assert done == [5, 15, 35, 75, 135, 195, 255]
    assert lines[0] == "Factorizing: 5/300 · 5 min left" and lines[-1] == "Factorizing: 255/300 · 45 s left"


def test_what_is_short_says_nothing(clock, capsys, monkeypatch):
    work(clock, seconds=4)
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(clock, seconds=1)
    assert not sys.stderr.getvalue() and capsys.readouterr() == ("", "")


def test_what_is_done_has_no_line(clock, capsys):
    work(clock, seconds=100, steps=1)
    assert not capsys.readouterr().err


def test_on_a_terminal_it_is_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    for _ in Progress("Factorizing", range(3)):
        pass
    shown = sys.stderr.getvalue()
    assert "Factorizing:   0%" in shown and "\n" not in shown and not shown.rsplit("\r", 1)[1].strip()


def test_steps_notes_and_unknown_totals(clock, capsys):
    with Progress("Generating", total=40, initial=30, unit="rows") as bar:
        clock.now += 10
        bar.update(5, "7 tokens/s")
    for _ in Progress("Reading", iter(range(9)), unit="rows"):
        clock.now += 6
    with Progress("measuring") as bar:
        bar.at("100M", 0, 4)
        clock.now += 20
        bar.at("72M, nested", 1, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Generating: 35/40 rows · 10 s left · 7 tokens/s"
    assert lines[1] == "Reading: 1 rows"
    assert lines[-1] == "72M, nested: 1/4 · 60 s left"


def test_nothing_is_shown_where_one_around_it_says_so(clock, capsys, monkeypatch):
    with progress_shown(False), progress_shown(True):
        work(clock, seconds=100)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        monkeypatch.setattr(progress, "_DELAY", 0.0)
        work(clock, seconds=100)
    assert capsys.readouterr() == ("", "") and not terminal.getvalue()


def test_an_error_ends_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with pytest.raises(RuntimeError), Progress("Hashing", total=2) as bar:
        bar.update()
        raise RuntimeError
    assert not sys.stderr.getvalue().rsplit("\r", 1)[1].strip()


def test_a_step_that_takes_long_is_told_of(clock, capsys, monkeypatch):
    """Before its end, and nothing more once the work has ended."""
    monkeypatch.setattr(progress, "_LOOK", 0.001)
    with Progress("Collecting statistics", total=2):
        clock.now += 6
        for _ in range(2000):
            if "Collecting statistics: 0/2" in (shown := capsys.readouterr().err):
                break
            time.sleep(0.005)
    assert shown == "Collecting statistics: 0/2\n"
    clock.now += 60
    time.sleep(0.02)
    assert capsys.readouterr().err == ""
