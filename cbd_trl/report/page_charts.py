"""The charts of a report's page: what is drawn of the measurements of a chain, or of several."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.report.chart import Frame, Point, Series, legend, svg_chart, widened
from cbd_trl.report.findings import UNITS, curve, told_loss
from cbd_trl.report.plots import loss_range
from cbd_trl.report.sweep import RANDOM
from cbd_trl.utils.formatting import format_count

_MARK_OF = {"nested": "circle", "patch": "plus", "slice": "square", "expand": "up", "linear": "down", RANDOM: "cross"}
# A wide drawing, one for half of a wide page, and one whose text can be read on a phone: the page shows what fits.
_SIZES = {"wide": (860.0, 400.0), "half": (600.0, 360.0), "narrow": (370.0, 330.0)}
# An anchor's name in a label; the whole of it is in the table.
_LONGEST_NAME = 14

Value = Callable[[Any], float]


def loss_chart(report: Mapping[str, Any], y_range: tuple[float, float]) -> str:
    """Loss against size: anchors, the straight line between them, and every operator.

    Args:
        report: one of `measure_chains`.
        y_range: of the axis, from `loss_axis`.
    """
    names = _names(report)
    title = f"Held-out loss of {report['name']} against size"
    told = functools.partial(told_loss, report)
    series = [_operator(report, name, _loss, told) for name in reversed(names)]
    return _chart([*series, *_anchors(report, _loss, told)], [report], y_range, title, UNITS["loss"])


def task_chart(report: Mapping[str, Any], task: str, y_range: tuple[float, float]) -> str:
    """The score of a task against size.

    Args:
        report: one of `measure_chains`.
        task: its name.
        y_range: of the axis, from `task_axis`.
    """

    def value(scores: Any) -> float:
        return float(scores[task]["value"])

    def spread(scores: Any) -> float:
        return float(scores[task]["stderr"] or 0.0)

    def told(scores: Any) -> str:
        score = scores[task]
        around = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        return f"{score['metric']} {score['value']:.3f}{around}"

    names = _names(report)
    series = [_operator(report, name, value, told, "probes") for name in reversed(names[1:])]
    series += [_operator(report, name, value, told, "probes", spread) for name in names[:1]]
    series += _anchors(report, value, told, "probes", spread)
    metric = report["anchors"][0]["probes"][task]["metric"]
    return _chart(series, [report], y_range, f"{task} of {report['name']} against size", metric)


def comparison_chart(reports: Sequence[Mapping[str, Any]], key: str) -> str:
    """The anchors of several chains, and what the first operator makes of each.

    Args:
        reports: of `measure_chains`.
        key: "loss" or "bits_per_byte".
    """
    series = []
    for number, report in reversed(list(enumerate(reports, 1))):
        points = curve(report, key)
        hovers = [f"{report['name']}, {format_count(x)}: {y:.3f} {UNITS[key]}" for x, y, _ in points]
        line = [Point(x, y, hover) for (x, y, _), hover in zip(points, hovers, strict=True)]
        stars = [point for point, (_, _, anchor) in zip(line, points, strict=True) if anchor]
        series.append(Series(report["name"], f"chain-{number}", "circle", [line]))
        series.append(Series(f"{report['name']}: anchors", f"chain-{number}", "star", [stars], joined=False))
    values = [point.y for each in series for run in each.runs for point in run if math.isfinite(point.y)]
    title = f"{' and '.join(report['name'] for report in reports)}: {UNITS[key]} against size"
    return _chart(series, reports, widened(values, 0.1), title, UNITS[key])


def loss_axis(reports: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """One axis for the losses of several chains, nats per token.

    Args:
        reports: of `measure_chains`, in the same tokens.
    """
    ends = [loss_range(report["anchors"], report["targets"], _names(report)) for report in reports]
    high, low = max(end[0] for end in ends), min(end[1] for end in ends)
    # Below the lowest star there is to be room for its label.
    return low - 0.14 * (high - low), high


def task_axis(reports: Sequence[Mapping[str, Any]], task: str) -> tuple[float, float]:
    """One axis for the scores of several chains.

    Args:
        reports: of `measure_chains`.
        task: its name.
    """
    scores = [anchor["probes"][task] for report in reports for anchor in report["anchors"]]
    scores += [
        probes[task] for report in reports for target in report["targets"] for probes in target["probes"].values()
    ]
    around = [(score["value"], score["stderr"] or 0.0) for score in scores if math.isfinite(score["value"])]
    return widened([value + sign * stderr for value, stderr in around for sign in (-1, 1)], 0.16)


def above_axis(report: Mapping[str, Any], high: float) -> str:
    """The losses that the chart only marks at its upper edge, in words; empty where there are none.

    Args:
        report: one of `measure_chains`.
        high: upper end of its axis.
    """
    words = []
    for name in _names(report):
        losses = [target["loss"][name] for target in report["targets"] if name in target["loss"]]
        above = [loss for loss in losses if not loss <= high]
        if above:
            ends = sorted({f"{min(above):.1f}", f"{max(above):.1f}"}, key=float)
            words.append(f"{name} {' to '.join(ends)}")
    return f"Above the chart, marked at its upper edge: {', '.join(words)}." if words else ""


def _names(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for target in report["targets"] for name in target["loss"]))


def _loss(found: Any) -> float:
    return float(found)


def _no_spread(found: Any) -> float:
    return 0.0


def _operator(
    report: Mapping[str, Any],
    name: str,
    value: Value,
    told: Callable[[Any], str],
    key: str = "loss",
    spread: Value = _no_spread,
) -> Series:
    """What an operator makes, joined between each two neighbouring anchors."""
    sizes = sorted(anchor["num_parameters"] for anchor in report["anchors"])
    runs = []
    for lower, upper in pairwise(sizes) if len(sizes) > 1 else []:
        between = [
            target
            for target in report["targets"]
            if name in target["loss"] and lower <= target["num_parameters"] <= upper
        ]
        runs.append(
            [
                Point(
                    target["num_parameters"],
                    value(target[key][name]),
                    f"{name}, {format_count(target['num_parameters'])} ({describe_shape(target['shape'])}): "
                    f"{told(target[key][name])}",
                    spread(target[key][name]),
                )
                for target in sorted(between, key=lambda target: target["num_parameters"])
            ]
        )
    label = {"nested": "nested (default)", RANDOM: "random: untrained"}.get(name, name)
    return Series(label, f"op-{name}", _MARK_OF[name], runs, joined=name != RANDOM)


def _anchors(
    report: Mapping[str, Any],
    value: Value,
    told: Callable[[Any], str],
    key: str = "loss",
    spread: Value = _no_spread,
) -> list[Series]:
    anchors = sorted(report["anchors"], key=lambda anchor: anchor["num_parameters"])
    points = [
        Point(
            anchor["num_parameters"],
            value(anchor[key]),
            f"anchor {anchor['name']}, {format_count(anchor['num_parameters'])} ({describe_shape(anchor['shape'])}): "
            f"{told(anchor[key])}",
            spread(anchor[key]),
            f"{_short(anchor['name'])} · {value(anchor[key]):.2f}",
        )
        for anchor in anchors
    ]
    return [Series("anchors and the straight line between them", "anchor", "star", [points])]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _chart(
    series: Sequence[Series],
    reports: Sequence[Mapping[str, Any]],
    y_range: tuple[float, float],
    title: str,
    y_label: str,
) -> str:
    sizes = [entry["num_parameters"] for report in reports for entry in (*report["anchors"], *report["targets"])]
    x_range = widened(sizes, 0.05)
    drawings = "".join(
        f'<div class="{name}">{svg_chart(series, Frame(width, height, x_range, y_range), title, y_label)}</div>'
        for name, (width, height) in _SIZES.items()
    )
    return f'<figure class="chart">{drawings}{legend(list(reversed(series)))}</figure>'
