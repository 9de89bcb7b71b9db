"""What the results of a demo depend on besides its plan: kept in its folder, where a run goes on with no others."""

from dataclasses import dataclass
from pathlib import Path

from cbd_trl.demo.plan import Plan, default_steps
from cbd_trl.recipe.step_cost import bf16_pays
from cbd_trl.utils.results import Results


@dataclass(frozen=True)
class Settings:
    """What the results of a demo depend on, besides its plan.

    Args:
        steps: optimiser steps per anchor.
        seed: of the distillation and of the random models.
        bf16: whether the anchors are distilled in mixed precision.
    """

    steps: int
    seed: int
    bf16: bool


def settle(results: Results, output: Path, plan: Plan, steps: int | None, seed: int | None) -> Settings:
    """The settings of the demo in a folder, or of a new one, which are then kept there.

    Args:
        results: of the demo.
        output: its folder.
        plan: anchors and targets.
        steps: asked for; None for those that are there, or what fits the machine.
        seed: likewise; None is 0 in a new demo.

    Raises:
        ValueError: for less than one step, or if the folder holds a demo with other settings.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: an anchor needs at least one step of distillation. Give 1 or more.")
    known = results.get("settings")
    if known is None:
        bf16 = bf16_pays()
        settings = Settings(default_steps(bf16) if steps is None else steps, seed or 0, bf16)
        results.put("settings", {**vars(settings), "plan": plan.name})
        return settings
    settings = Settings(known["steps"], known["seed"], known["bf16"])
    asked = {"--steps": (steps, settings.steps), "--seed": (seed, settings.seed)}
    changed = [f"{flag} {new} (there: {old})" for flag, (new, old) in asked.items() if new not in (None, old)]
    if known["plan"] != plan.name:
        changed.append("another plan")
    if changed:
        raise ValueError(
            f"{output} holds a demo with other settings than {', '.join(changed)}, and a chain is not built "
            "anew over another one. Choose another --output, or delete that folder."
        )
    return settings
