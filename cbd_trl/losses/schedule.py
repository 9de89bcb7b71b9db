"""How the weight of a loss term changes over the run."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cbd_trl.utils.formatting import did_you_mean

# Share of the way from start to end, at a progress in [0, 1].
_SHARES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    # Half a cosine, as learning rates decay (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5).
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
}
SCHEDULES = tuple(_SHARES)


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of a loss term from the start of the run to its end.

    Args:
        start: weight at the start, finite and at least 0.
        end: weight at the end, likewise; `constant` never gets there.
        shape: one of `SCHEDULES`: `constant` stays at the start, `linear` and `cosine` go to the end.

    Raises:
        ValueError: for a weight or a shape that has no meaning.
    """

    start: float
    end: float
    shape: str

    def __post_init__(self) -> None:
        """Check every value."""
        if self.shape not in _SHARES:
            hint = did_you_mean(self.shape, SCHEDULES)
            raise ValueError(f"Unknown schedule {self.shape!r}: there are {', '.join(SCHEDULES)}.{hint}")
        for name, value in (("start", self.start), ("end", self.end)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"A schedule with {name}={value}: a weight of the loss must be finite and at least 0 (0 switches "
                    "the term off)."
                )

    def at(self, progress: float) -> float:
        """The weight at a point of the run.

        Args:
            progress: share of the optimiser steps done; below 0 counts as 0, above 1 as 1.

        Returns:
            the weight, exactly `start` at 0 and, unless constant, exactly `end` at 1.
        """
        share = _SHARES[self.shape](min(max(progress, 0.0), 1.0))
        return self.start * (1.0 - share) + self.end * share

    @property
    def highest(self) -> float:
        """The highest weight of the run: 0 for a term that is never on."""
        return max(self.at(0.0), self.at(1.0))
