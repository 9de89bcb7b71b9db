"""What is shown while a long measurement runs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the step that is under way, how many there are, and the time left.

    Args:
        console: where it is shown.

    Yields:
        what `sweep` calls as `on_step`: label, number from 0, total.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def show(label: str, number: int, total: int) -> None:
            progress.update(task, description=label, completed=number, total=total)

        yield show
        progress.update(task, description="measured", completed=progress.tasks[0].total)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within it transformers shows no bars: hundreds of weights load in a blink, and one bar is enough."""
    # TRL's configs set the old name; transformers warns about it on every config, the user can do nothing.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
