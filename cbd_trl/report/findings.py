"""Say in sentences what the numbers of a report mean."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from cbd_trl.chain.measurements import best_of
from cbd_trl.report.measure import bits_per_byte
from cbd_trl.report.sweep import RANDOM
from cbd_trl.utils.formatting import format_count

UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}


def findings(report: Mapping[str, Any]) -> list[str]:
    """Sum up the losses of a chain, one sentence each.

    Args:
        report: one of `measure_chains`.
    """
    targets, (source, *lower) = report["targets"], _by_size(report["anchors"])[::-1]
    sentences = []
    if lower:
        last = lower[-1]
        share = last["num_parameters"] / source["num_parameters"]
        sentences.append(
            f"The smallest anchor ({format_count(last['num_parameters'])}, {share:.0%} of the source) is at "
            f"{format_loss(report, last['loss'])}, the source at {format_loss(report, source['loss'])}."
        )
    if not targets:
        return sentences
    first = next(iter(targets[0]["loss"]))
    rivals = len(targets[0]["loss"]) > 1
    ahead = sum(first in best_of(target["loss"]) for target in targets)
    if rivals:
        sentences.append(f"{first} has the lowest loss of all operators at {ahead} of {len(targets)} sizes.")
    line = [(anchor["num_parameters"], anchor["loss"]) for anchor in _by_size(report["anchors"])]
    gaps = [target["loss"][first] - (on_line(line, target["num_parameters"]) or 0.0) for target in targets]
    below = sum(gap <= 0 for gap in gaps)
    sentences.append(
        f"It is at or below the straight line between the anchors at {below} of {len(targets)} sizes"
        f" (worst: {max(gaps):+.3f} nats)."
        if rivals
        else f"{first} is at or below the straight line between the anchors at {below} of {len(targets)} sizes."
    )
    random = [target["loss"][RANDOM] for target in targets if RANDOM in target["loss"]]
    if random:
        sentences.append(
            f"Untrained models of these shapes are at {format_loss(report, min(random))} to "
            f"{format_loss(report, max(random))}."
        )
    return sentences


def format_loss(report: Mapping[str, Any], loss: float) -> str:
    """Write a loss in nats per token, with bits per byte beside it where the bytes of the tokens are known.

    Args:
        report: one of `measure_chains`.
        loss: measured on its text.
    """
    text = report["text"]
    bits = f" ({bits_per_byte(loss, text['tokens'], text['bytes']):.3f} bits per byte)" if text["bytes"] else ""
    return f"{loss:.3f} nats per token{bits}"


def compare_chains(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Compare the second chain with the first at the sizes both cover, in a sentence.

    Args:
        reports: two of `measure_chains`.

    Returns:
        None where no size lies within both, or their losses are in different tokens and bits per byte are not known.
    """
    key = shared_unit(reports)
    if key is None:
        return None
    one, other = ([(x, y) for x, y, _ in curve(report, key)] for report in reports)
    pairs = [(y, on_line(one, x)) for x, y in other]
    gaps = [y - against for y, against in pairs if against is not None]
    if not gaps:
        return None
    unit, mean = UNITS[key], sum(gaps) / len(gaps)
    names = [report["name"] for report in reports]
    return (
        f"{names[1]} is ahead of {names[0]} at {sum(gap < 0 for gap in gaps)} of the {len(gaps)} sizes that lie "
        f"within both, and on average {abs(mean):.3f} {unit} {'below' if mean < 0 else 'above'} it; between measured "
        f"sizes {names[0]} is read off a straight line."
    )


def shared_unit(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the measure that compares chains: "loss" where they read the same tokens, otherwise "bits_per_byte".

    Args:
        reports: of `measure_chains`.

    Returns:
        None if they read different tokens and the bytes of one of them are not known.
    """
    if len({(report["tokenizer"], report["text"]["block_length"]) for report in reports}) == 1:
        return "loss"
    return "bits_per_byte" if all(report["text"]["bytes"] for report in reports) else None


def curve(report: Mapping[str, Any], key: str) -> list[tuple[int, float, bool]]:
    """Return a chain's anchors and what the first operator makes, by size: (parameters, value, is an anchor).

    Args:
        report: one of `measure_chains`.
        key: "loss" or "bits_per_byte".
    """
    points = [(anchor["num_parameters"], anchor[key], True) for anchor in report["anchors"]]
    points += [(target["num_parameters"], next(iter(target[key].values())), False) for target in report["targets"]]
    return sorted(points)


def on_line(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the height at x of the line through points.

    Args:
        points: from left to right.
        x: where.

    Returns:
        None outside the points.
    """
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    if len(points) == 1:
        return points[0][1]
    place = min(max(bisect_left([point[0] for point in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = list(pairwise(points))[place - 1]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _by_size(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(entries, key=lambda entry: entry["num_parameters"])
