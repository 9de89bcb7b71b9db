"""The picture of a sweep: held-out loss against the number of parameters."""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; marker and dash tell them apart in
# print as well.
_STYLES: dict[str, dict[str, Any]] = {
    "nested": {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 3.0, "markersize": 8, "zorder": 5},
    "patch": {"color": "#E69F00", "marker": "P", "linestyle": (0, (1, 1)), "linewidth": 1.6, "markersize": 6},
    "slice": {"color": "#009E73", "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 6},
    "expand": {"color": "#CC79A7", "marker": "^", "linestyle": "-.", "linewidth": 1.6, "markersize": 6},
    "linear": {"color": "#D55E00", "marker": "v", "linestyle": ":", "linewidth": 1.9, "markersize": 6},
    "random": {"color": "#666666", "marker": "x", "linestyle": "none", "linewidth": 1.2, "markersize": 6},
}
_OTHER = {"color": "#56B4E9", "marker": "D", "linestyle": "-", "linewidth": 1.4, "markersize": 5}
_LABELS = {
    "nested": "nested (default)",
    "slice": "slice: upper anchor alone",
    "expand": "expand: lower anchor alone",
    "linear": "linear: the paper's formula",
    "random": "random initialisation",
}
# An operator is worth a place on the axis up to this many times the span that the anchors and nested need.
_HEADROOM = 1.2


def plot_sweep(
    report: Mapping[str, Any], path: Path | str, title: str = "", formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw a sweep: the anchors joined by straight lines, one line per operator between each pair of anchors.

    Losses far above those of the anchors and the first operator stand as numbers in a strip above the axis, so that
    they do not squash the range where the operators differ.

    Args:
        report: what `sweep` returned.
        path: of the picture; its suffix is replaced by each format.
        title: the first line above the picture.
        formats: file formats of matplotlib.

    Returns:
        the files written.

    Raises:
        ValueError: if the report has no anchors.
    """
    return plot_side_by_side([report], [title], path, formats)


def plot_side_by_side(
    reports: Sequence[Mapping[str, Any]], titles: Sequence[str], path: Path | str, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Draw several sweeps beside each other, each as `plot_sweep` draws it.

    Args:
        reports: what `sweep` returned.
        titles: the first line above each.
        path: of the picture; its suffix is replaced by each format.
        formats: file formats of matplotlib.

    Returns:
        the files written.

    Raises:
        ValueError: if a report has no anchors.
    """
    if not all(report["anchors"] for report in reports):
        raise ValueError("The report has no anchors, so there is nothing to draw: run the sweep on a built chain.")
    strip_height = max(_strip_height(report) for report in reports)
    figure = Figure(figsize=(9.5 * len(reports), 5.6 + strip_height), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1, len(reports), squeeze=False)[0]
    for part, report, title in zip(parts, reports, titles, strict=True):
        _draw_sweep(part, report, title)
    written = []
    for name in formats:
        written.append(Path(path).with_suffix(f".{name}"))
        # Without a date, and with fixed ids, the same sweep gives the same SVG.
        with rc_context({"svg.hashsalt": "cbd_trl"}), warnings.catch_warnings():
            # A letter of a name that the font lacks is drawn as a box, which needs no warning.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(written[-1], dpi=150, metadata={"Date": None} if name == "svg" else None)
    return written


def _draw_sweep(figure: SubFigure, report: Mapping[str, Any], title: str) -> None:
    anchors, targets, names = _sorted(report)
    limit, lowest = loss_range(anchors, targets, names)
    clipped = _clipped(report)
    if clipped:
        strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=[_strip_height(report), 5.0])
        _draw_strip(strip, targets, clipped, limit)
    else:
        axes = figure.subplots()
    _draw_operators(axes, anchors, targets, names, limit)
    _draw_anchors(axes, anchors)
    axes.set_ylim(lowest - 0.14 * (limit - lowest), limit)
    axes.set_xlabel("parameters (millions; a tied table counts once)" if _millions(anchors) else "parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    if title:
        # A name with dollars in it is no formula.
        figure.suptitle(title, fontsize=12, parse_math=False)


def _sorted(report: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[str]]:
    """Anchors and targets by size, and the operators."""
    anchors = sorted(report["anchors"], key=lambda anchor: anchor["num_parameters"])
    targets = sorted(report["targets"], key=lambda target: target["num_parameters"])
    return anchors, targets, list(dict.fromkeys(name for target in targets for name in target["loss"]))


def _clipped(report: Mapping[str, Any]) -> list[str]:
    """The operators with a loss above the axis."""
    anchors, targets, names = _sorted(report)
    limit, _ = loss_range(anchors, targets, names)
    return [name for name in names if any(_off(target["loss"].get(name), limit) for target in targets)]


def _strip_height(report: Mapping[str, Any]) -> float:
    clipped = len(_clipped(report))
    return 0.32 * clipped + 0.25 if clipped else 0.0


def _millions(anchors: Sequence[Mapping[str, Any]]) -> bool:
    return anchors[-1]["num_parameters"] >= 1e5


def _x(entry: Mapping[str, Any], anchors: Sequence[Mapping[str, Any]]) -> float:
    return entry["num_parameters"] / 1e6 if _millions(anchors) else entry["num_parameters"]


def _off(loss: float | None, limit: float) -> bool:
    return loss is not None and not loss <= limit


def loss_range(anchors: Sequence[Any], targets: Sequence[Any], names: Sequence[str]) -> tuple[float, float]:
    """Upper and lower end of the loss axis: as far up as the anchors and nested need, and a little further.

    Args:
        anchors, targets: of what `sweep` returned; the anchors are at least one.
        names: of the operators.

    Returns:
        nats per token.
    """
    losses = {name: [target["loss"][name] for target in targets if name in target["loss"]] for name in names}
    shown = [anchor["loss"] for anchor in anchors] + [loss for loss in losses.get("nested", []) if math.isfinite(loss)]
    lowest, highest = min(shown), max(shown)
    allowed = lowest + (1 + _HEADROOM) * max(highest - lowest, 0.2)
    everything = [loss for values in losses.values() for loss in values if loss <= allowed]
    lowest, highest = min([*shown, *everything]), max([*shown, *everything])
    return highest + 0.08 * max(highest - lowest, 0.1), lowest


def _style(name: str) -> dict[str, Any]:
    return {**_STYLES.get(name, _OTHER)}


def _draw_operators(axes: Axes, anchors: Any, targets: Any, names: Sequence[str], limit: float) -> None:
    for name in names:
        label: str | None = _LABELS.get(name, name)
        for lower, upper in pairwise(anchors):
            between = [
                target
                for target in targets
                if name in target["loss"]
                and lower["num_parameters"] <= target["num_parameters"] <= upper["num_parameters"]
            ]
            if not between:
                continue
            xs = [_x(target, anchors) for target in between]
            ys = [target["loss"][name] for target in between]
            axes.plot(xs, ys, label=label, **_style(name))
            label = None
            if name == "nested":
                # At an anchor's own shape nested is that anchor, so its line runs from one to the other.
                ends = {**_style(name), "marker": "none", "linewidth": 1.5}
                axes.plot([_x(lower, anchors), xs[0]], [lower["loss"], ys[0]], **ends)
                axes.plot([xs[-1], _x(upper, anchors)], [ys[-1], upper["loss"]], **ends)
            for x in (x for x, y in zip(xs, ys, strict=True) if _off(y, limit)):
                axes.annotate(
                    "",
                    xy=(x, 1.0),
                    xytext=(x, 0.955),
                    xycoords=("data", "axes fraction"),
                    arrowprops={"arrowstyle": "-|>", "color": "#666666", "lw": 1.4},
                )


def _draw_anchors(axes: Axes, anchors: Any) -> None:
    xs = [_x(anchor, anchors) for anchor in anchors]
    ys = [anchor["loss"] for anchor in anchors]
    axes.plot(xs, ys, color="black", linewidth=1.0, alpha=0.6, label="straight line between the anchors", zorder=3)
    axes.plot(xs, ys, color="black", marker="*", markersize=17, linestyle="none", label="anchors", zorder=6)
    for x, anchor in zip(xs, anchors, strict=True):
        axes.annotate(
            f"{anchor['name']}\n{anchor['loss']:.2f}",
            (x, anchor["loss"]),
            xytext=(0, -13),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            zorder=7,
            parse_math=False,
        )
    axes.margins(x=0.08)


def _draw_strip(strip: Axes, targets: Any, clipped: Sequence[str], limit: float) -> None:
    """The losses above the axis, in numbers: one row per operator."""
    millions = max(target["num_parameters"] for target in targets) >= 1e5
    for row, name in enumerate(clipped):
        for target in targets:
            loss = target["loss"].get(name)
            if not _off(loss, limit):
                continue
            x = target["num_parameters"] / 1e6 if millions else target["num_parameters"]
            text = f"{loss:.1f}" if math.isfinite(loss) else "∞"
            strip.text(x, row, text, ha="center", va="center", fontsize=8.5, color=_style(name)["color"])
    strip.set_ylim(len(clipped) - 0.4, -0.6)
    strip.set_yticks(range(len(clipped)), clipped, fontsize=9)
    for label, name in zip(strip.get_yticklabels(), clipped, strict=True):
        label.set_color(_style(name)["color"])
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    strip.set_facecolor("#f4f4f4")
    strip.set_title("above the axis (nats per token)", fontsize=9, loc="left", color="#444444")
