"""Progress of long work: a bar with the time left on a terminal, elsewhere a plain line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from cbd_trl.utils.formatting import format_seconds

# Seconds; work that is over sooner gets no bar.
_DELAY = 2.0
# Seconds between looks at whether a long step needs a line.
_LOOK = 1.0
_WIDE = 200
_SHOWN = ContextVar("shown", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Show progress only if this, and every such context around it, allows it.

    Args:
        shown: False where `disable_tqdm` is set, and in all processes but one.
    """
    token = _SHOWN.set(shown and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(token)


def make_console() -> Console:
    """Make the console that tables are printed to: as wide as the terminal, or wide where there is none."""
    console = Console()
    # A file or a pipe has no width to fit into.
    return console if console.is_terminal else Console(width=_WIDE)


class Ticker:
    """Decides when another plain line is due: after 5 seconds, then twice as long each time, at last every minute.

    Args:
        clock: seconds, from any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._pause = clock, clock(), 5.0

    def due(self) -> bool:
        """Whether a line is to be printed now; then the pause before the next one begins."""
        if self._clock() - self._last < self._pause:
            return False
        self._pause = min(2 * self._pause, 60.0)
        self.reset()
        return True

    def reset(self) -> None:
        """Begin the pause again, since something else was printed."""
        self._last = self._clock()


class Progress:
    """The progress of one piece of work: iterate over it, or enter it and `update` it at each step.

    On a terminal or in a notebook it is tqdm's bar, once the work takes two seconds. Where there is no terminal, a
    line on stderr when `Ticker` has one due: `Choosing layers: 12/62 · 3 min left`. Both come while a step takes long,
    too, from a thread of their own. See `progress_shown`.

    Args:
        description: what is being done.
        items: what is iterated over, if anything.
        total: number of steps; None for the number of items, where they have one.
        unit: what a step is.
        unit_scale: whether large numbers are shortened (12.3k).
        initial: steps that an earlier run did.
    """

    def __init__(
        self,
        description: str,
        items: Iterable[Any] = (),
        *,
        total: int | None = None,
        unit: str = "it",
        unit_scale: bool = False,
        initial: int = 0,
    ) -> None:
        self.description, self._items = description, items
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.steps = self._initial = initial
        self._began, self._unit, self._note, self._ticker = time.monotonic(), unit, "", Ticker()
        self._lines = _SHOWN.get() and not _on_screen()
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._bar = tqdm(
            desc=description,
            total=self.total,
            unit=unit,
            unit_scale=unit_scale,
            initial=initial,
            disable=self._lines or not _SHOWN.get(),
            leave=False,
            delay=_DELAY,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        if self._lines or not self._bar.disable:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._bar.close()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK):
            if self._lines:
                self._line_if_due()
            elif time.monotonic() - self._began > _DELAY:
                self._bar.refresh()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, steps: int = 1, note: str = "") -> None:
        """Count steps that are done.

        Args:
            steps: how many.
            note: shown beside them from now on.
        """
        self.steps += steps
        if note != self._note:
            self._note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(steps)
        self._line_if_due()

    def at(self, description: str, steps: int, total: int) -> None:
        """Set which step begins.

        Args:
            description: of it.
            steps: that are done.
            total: of all.
        """
        self.total, self.description = total, description
        self._bar.total = total
        self._bar.set_description(description, refresh=False)
        self.update(steps - self.steps)

    def line(self) -> str:
        """Format a plain line."""
        done = f"{self.steps:,}" if self.total is None else f"{self.steps:,}/{self.total:,}"
        parts = [f"{self.description}: {done}" + ("" if self._unit == "it" else f" {self._unit}")]
        made = self.steps - self._initial
        if self.total is not None and made > 0:
            left = (self.total - self.steps) * (time.monotonic() - self._began) / made
            parts.append(f"{format_seconds(left)} left")
        return " · ".join([*parts, self._note] if self._note else parts)

    def _line_if_due(self) -> None:
        # What is done needs no line: the next work has its own.
        with self._lock:
            if self._lines and self.steps != self.total and self._ticker.due():
                print(self.line(), file=sys.stderr, flush=True)


def _on_screen() -> bool:
    # By name: importing a notebook's tqdm imports IPython.
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return notebook or sys.stderr.isatty()
