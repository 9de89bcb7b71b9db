"""One training of a build, resumable in a folder of its own."""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel

from cbd_trl.architectures import describe
from cbd_trl.chain.model import stock_model

_LOGGED = ("loss", "kd", "ce", "hidden", "teacher_ce", "num_tokens")
_EVALUATED = ("loss", "_kd", "_ce", "_hidden")


@dataclass(frozen=True)
class Trained:
    """A model that is to be an anchor.

    Args:
        model: a stock causal LM.
        tokens_seen: tokens it was trained on here.
        losses: as an `Anchor` has them.
    """

    model: PreTrainedModel
    tokens_seen: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def work_folder(output_dir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Where an anchor's checkpoints are; those of a run with other settings are removed, not gone on from.

    Args:
        output_dir: the chain's folder.
        name: of the anchor.
        settings: what decides the training, as JSON values.
    """
    work = output_dir / ".work" / name
    state = PartialState()
    if state.is_main_process:
        text, file = json.dumps(settings), work / "settings.json"
        if file.exists() and file.read_text() != text:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    state.wait_for_everyone()
    return work


def remove_work_folder(output_dir: Path, name: str) -> None:
    """Remove what `work_folder` made, if anything, once the anchor is stored."""
    work = output_dir / ".work" / name
    if PartialState().is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            work.parent.rmdir()


def train(
    trainer: Any, student: PreTrainedModel, checkpoint: str | None, generation_config: GenerationConfig | None
) -> Trained:
    """Train to the end, and evaluate where there is text for it.

    Args:
        trainer: a `DistillTrainer`.
        student: the model that it was given.
        checkpoint: where to go on from; None to begin.
        generation_config: for the trained model.

    Returns:
        the model in eval mode, on the CPU and apart from the trainer.
    """
    architecture, dtype = describe(student.config), student.dtype
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = _last_losses(trainer.state.log_history)
    if trainer.eval_dataset is not None:
        losses |= {key: value for key, value in trainer.evaluate().items() if key.endswith(_EVALUATED)}
    state = trainer.accelerator.get_state_dict(trainer.model)
    state = {name: state[name].detach().cpu() for name in architecture.state_shapes}
    model: Any = stock_model(architecture.config, state, dtype)
    model.generation_config = generation_config
    return Trained(model, int(losses.pop("num_tokens", 0)), losses)


def _last_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The latest value of each logged term."""
    losses: dict[str, float] = {}
    for entry in history:
        losses |= {key: value for key, value in entry.items() if key in _LOGGED}
    return losses
