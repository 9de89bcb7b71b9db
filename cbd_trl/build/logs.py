"""Where the logs of a build go: each anchor is a run of its own to whatever `report_to` names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback


@contextmanager
def own_run(trainer: Any, anchor: str, folder: Path) -> Iterator[None]:
    """Keep the logs of one training apart from those of the next.

    The run is called after the anchor, behind the `run_name` of the arguments. TensorBoard's files would go to the
    work folder, and with it: they are kept beside the anchors, unless TENSORBOARD_LOGGING_DIR says where. A run of
    Weights & Biases, which the Trainer leaves open for whatever comes next, is finished, unless the caller had begun
    it.

    Args:
        trainer: a `DistillTrainer`, with arguments that no other training has.
        anchor: its name.
        folder: of the chain.
    """
    trainer.args.run_name = " ".join(filter(None, (trainer.args.run_name, anchor)))
    begun = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "runs" / anchor)
        if isinstance(callback, WandbCallback) and callback._wandb.run is None:
            begun.append(callback._wandb)
    code = 1
    try:
        yield
        code = 0
    finally:
        for wandb in begun:
            if wandb.run is not None:
                wandb.finish(exit_code=code)
