"""The losses at the end of a training, as a table."""

from collections.abc import Mapping

from cbd_trl.cards.card import plain, table

# Logged terms, by what they are called on a card. A unit only where it is the same for every divergence and weight.
_TERMS = {
    "loss": "loss",
    "kd": "divergence from the teacher",
    "ce": "cross-entropy (nats)",
    "hidden": "distance of the layers (no unit)",
    "teacher_ce": "cross-entropy of the teacher (nats)",
    "unaligned": "share that the teacher has no tokens for",
}


def losses_table(columns: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """A table of logged terms, per token.

    Args:
        columns: prefix of the terms' names (empty, or such as "eval_") -> title of the column, and where they are.

    Returns:
        Markdown; empty where there are no columns.
    """
    if not columns:
        return ""
    rows = []
    for name, text in _TERMS.items():
        values = [entry.get(f"{prefix}{name}") for prefix, (_, entry) in columns.items()]
        if any(value is not None for value in values):
            rows.append([text, *("" if value is None else f"{value:.4g}" for value in values)])
    return table(["per token", *(title for title, _ in columns.values())], rows)


def evaluation_prefix(key: str) -> str | None:
    """Of the name of a loss: empty in training, "eval_" or "eval_<set>_" in an evaluation; None of anything else."""
    prefix = key.removesuffix("loss")
    return prefix if prefix != key and (prefix == "" or prefix.startswith("eval_")) else None


def recorded_losses(losses: Mapping[str, float]) -> str:
    """The losses that chain.json has of an anchor.

    Args:
        losses: as an `Anchor` has them.
    """
    prefixes = [prefix for key in losses if (prefix := evaluation_prefix(key)) is not None]
    return losses_table({prefix: (plain(prefix.strip("_") or "training"), losses) for prefix in prefixes})
