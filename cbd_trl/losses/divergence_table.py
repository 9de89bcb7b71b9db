"""The table of divergences and their options. It imports no torch, so that the command line reads it at once.

A new divergence is one function in `cbd_trl.losses.divergences` and one row here, under its name: the arguments of the
trainers, their checks, the command line and the cards follow from the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cbd_trl.utils.formatting import did_you_mean


@dataclass(frozen=True)
class Option:
    """The option of a divergence: an argument of its function, of the trainers' configs and of the command line.

    Attributes:
        name: of the argument.
        default: its value where none is given.
        low, high: the bounds of its values, themselves allowed unless open.
        help: what it means, a sentence.
        low_open, high_open: whether the bound itself is excluded.
    """

    name: str
    default: float
    low: float
    high: float
    help: str
    low_open: bool = False
    high_open: bool = False

    def check(self, value: float) -> None:
        """Check that a value lies within the bounds.

        Raises:
            ValueError: it does not, or is not a number.
        """
        inside = self.low <= value <= self.high and not (
            (self.low_open and value == self.low) or (self.high_open and value == self.high)
        )
        if not inside:
            low = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
            high = f"below {self.high:g}" if self.high_open else f"at most {self.high:g}"
            raise ValueError(f"{self.name}={value} must be {low} and {high}. {self.help}")


@dataclass(frozen=True)
class DivergenceRow:
    """One divergence: the function of that name in `cbd_trl.losses.divergences`.

    Attributes:
        option: None where it has none. Several divergences may share one.
        temperature_power: see `Divergence`.
    """

    option: Option | None = None
    temperature_power: int = 2


_BETA = Option("beta", 0.5, 0.0, 1.0, "The teacher's share of the mixture, as in TRL: 0 is forward KL, 1 reverse KL.")
_SKEW = Option(
    "skew",
    0.1,
    0.0,
    1.0,
    "How much of the one distribution is mixed into the other: 0 is plain KL, at 1 nothing would be left to compare.",
    high_open=True,
)
_HEAD_SHARE = Option(
    "head_share",
    0.5,
    0.0,
    1.0,
    "The teacher's mass that counts as the head of its distribution.",
    low_open=True,
    high_open=True,
)
_ALPHA = Option("alpha", 0.5, 0.0, 1.0, "Where it stands between reverse KL (0) and forward KL (1).")
_ORDER = Option("order", 0.5, 0.0, 1.0, "The order of the Renyi divergence: 1 is forward KL.", low_open=True)

DIVERGENCES: dict[str, DivergenceRow] = {
    "forward_kl": DivergenceRow(),
    "reverse_kl": DivergenceRow(),
    "jsd": DivergenceRow(_BETA),
    "skew_kl": DivergenceRow(_SKEW),
    "skew_reverse_kl": DivergenceRow(_SKEW),
    "adaptive_kl": DivergenceRow(_HEAD_SHARE),
    "alpha_divergence": DivergenceRow(_ALPHA),
    "renyi_divergence": DivergenceRow(_ORDER),
    "total_variation": DivergenceRow(temperature_power=1),
}
OPTIONS: dict[str, Option] = {row.option.name: row.option for row in DIVERGENCES.values() if row.option is not None}


def divergence_option(name: str) -> str | None:
    """Look up the name of the option that a divergence has.

    Args:
        name: a key of `DIVERGENCES`.

    Returns:
        a key of `OPTIONS`, or None.

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    option = divergence_row(name).option
    return None if option is None else option.name


def divergences_with(option: str) -> list[str]:
    """List the divergences that have an option.

    Args:
        option: a key of `OPTIONS`.
    """
    return [name for name in DIVERGENCES if divergence_option(name) == option]


def check_divergence(name: str | None, options: Mapping[str, float]) -> None:
    """Check the name of a divergence and the values of all options.

    Args:
        name: a key of `DIVERGENCES`; None where the divergence is chosen elsewhere, and with it the default options.
        options: a value for each of `OPTIONS`.

    Raises:
        ValueError: for an unknown name, a value out of bounds, or one that this divergence would ignore.
    """
    own = None if name is None else divergence_option(name)
    for option in OPTIONS.values():
        value = options[option.name]
        option.check(value)
        if option.name != own and value != option.default:
            having = divergences_with(option.name)
            raise ValueError(
                f"{option.name}={value} is an option of {' and '.join(having)}, which divergence={name!r} does "
                f"not have: it would be ignored. Set divergence={having[0]!r}, or leave {option.name} out."
            )


def divergence_row(name: str) -> DivergenceRow:
    """Look up the row of a divergence.

    Raises:
        ValueError: for an unknown name; the message lists those that exist.
    """
    if name not in DIVERGENCES:
        hint = did_you_mean(name, DIVERGENCES)
        raise ValueError(f"Unknown divergence {name!r}: there are {', '.join(DIVERGENCES)}.{hint}")
    return DIVERGENCES[name]
