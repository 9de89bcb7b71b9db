"""Draw what was measured of chains, with matplotlib: pictures as files, and charts for the HTML page."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Annotation

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.report.findings import UNITS, curve, format_loss
from cbd_trl.report.sweep import RANDOM
from cbd_trl.targets.operators import DEFAULT_OPERATOR, OPERATORS
from cbd_trl.utils.formatting import format_count

# The colors of Okabe and Ito, which people with any kind of color vision can tell apart; marker and dash do so in
# print as well. Operators take them in the order of `OPERATORS`.
_PALETTE: list[dict[str, Any]] = [
    {"color": "#0072b2", "marker": "o", "linestyle": "-", "linewidth": 3.0, "markersize": 7, "zorder": 5},
    {"color": "#e69f00", "marker": "P", "linestyle": (0, (1, 1)), "linewidth": 1.6, "markersize": 6},
    {"color": "#d55e00", "marker": "v", "linestyle": ":", "linewidth": 1.9, "markersize": 6},
    {"color": "#009e73", "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 5},
    {"color": "#cc79a7", "marker": "^", "linestyle": "-.", "linewidth": 1.6, "markersize": 6},
    {"color": "#56b4e9", "marker": "D", "linestyle": "-", "linewidth": 1.4, "markersize": 5},
]
_RANDOM_STYLE = {"color": "#666666", "marker": "x", "linestyle": "none", "markersize": 6}
_STYLES = {**dict(zip(OPERATORS, cycle(_PALETTE), strict=False)), RANDOM: _RANDOM_STYLE}
_LABELS = {**{name: operator.label for name, operator in OPERATORS.items()}, RANDOM: "random: untrained"}
_INK, _SOFT, _GRID = "#16191d", "#5a6572", "#e9edf1"
# In the page, colors follow its light or dark style through these variables of page.css.
_VARIABLES = {style["color"]: f"var(--series-{number})" for number, style in enumerate(_PALETTE, 1)}
_VARIABLES |= {_RANDOM_STYLE["color"]: "var(--random)", _INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--grid)"}
_RC: Any = {
    # Without a date and with fixed ids, the same input gives the same bytes; text stays text.
    "svg.hashsalt": "cbd_trl",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "grid.color": _GRID,
    "text.color": _INK,
    # A name with dollars in it is not a formula.
    "text.parse_math": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}
# The axis reaches up to this many times the span that the anchors and the default operator need.
_HEADROOM = 1.2
# Width and height of the page's charts in its pixels, and columns of their legends: over the whole page, in one of two
# columns, on a phone.
_SIZES = {"wide": (860, 450, 3), "half": (600, 430, 2), "narrow": (370, 440, 1)}
# matplotlib's SVG counts in points, 72 an inch; in a page each of them is a pixel.
_POINTS = 72
# The longest name of an anchor in a label; tables have all of it.
_LONGEST_NAME = 14
_SVG = "http://www.w3.org/2000/svg"

Report = Mapping[str, Any]
Value = Callable[[Any], float]
# What the pointer shows on a mark, by the id of the mark.
Hovers = dict[str, str]


def plot_sweep(
    report: Report, path: Path | str, title: str = "", formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw a sweep: the anchors joined by straight lines, and one line per operator between each pair of anchors.

    Losses far above those of the anchors and of the default operator stand as numbers in a strip above the axis, so
    that they do not squash the range where the operators differ.

    Args:
        report: what `sweep` returned.
        path: of the picture; its suffix is replaced by each format.
        title: the first line above the picture.
        formats: file formats of matplotlib.

    Returns:
        the files written.

    Raises:
        ValueError: the report has no anchors.
    """
    return plot_side_by_side([report], [title], path, formats)


def plot_side_by_side(
    reports: Sequence[Report], titles: Sequence[str], path: Path | str, formats: Sequence[str] = ("png",)
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
        ValueError: a report has no anchors.
    """
    if not all(report["anchors"] for report in reports):
        raise ValueError("The report has no anchors, so there is nothing to draw: run the sweep on a built chain.")
    strip_height = max(_strip_height(report) for report in reports)
    written = []
    with _drawing():
        figure = Figure(figsize=(9.5 * len(reports), 5.6 + strip_height), layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(1, len(reports), squeeze=False)[0]
        for part, report, title in zip(parts, reports, titles, strict=True):
            _draw_sweep(part, report, title)
        _place_labels(figure)
        for name in formats:
            written.append(Path(path).with_suffix(f".{name}"))
            figure.savefig(written[-1], dpi=150, metadata={"Date": None} if name == "svg" else None)
    return written


def loss_chart(report: Report, ends: tuple[float, float], columns: int = 1) -> str:
    """Draw loss against size for the page: anchors, the straight line between them, and every operator.

    Args:
        report: one of `measure_chains`.
        ends: of the loss axis, from `loss_axis`.
        columns: of the page.

    Returns:
        a <figure>.
    """

    def draw(axes: Axes) -> Hovers:
        hovers = _draw_values(axes, report, ends[1], "loss", float, lambda loss: format_loss(report, loss))
        _finish(axes, ends, UNITS["loss"])
        return hovers

    return _chart(draw, f"Held-out loss of {report['name']} against size", _sizes(columns))


def task_chart(report: Report, task: str, ends: tuple[float, float], columns: int = 1) -> str:
    """Draw the score of a task against size for the page, with standard errors of the anchors and the first operator.

    Args:
        report: one of `measure_chains`.
        task: its name.
        ends: of the score axis, from `task_axis`.
        columns: of the page.

    Returns:
        a <figure>.
    """

    def words(probes: Any) -> str:
        score = probes[task]
        spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        return f"{score['metric']} {score['value']:.3f}{spread}"

    def draw(axes: Axes) -> Hovers:
        hovers = _draw_values(
            axes,
            report,
            ends[1],
            "probes",
            lambda probes: float(probes[task]["value"]),
            words,
            lambda probes: float(probes[task]["stderr"] or 0.0),
        )
        _finish(axes, ends, report["anchors"][0]["probes"][task]["metric"])
        return hovers

    return _chart(draw, f"{task} of {report['name']} against size", _sizes(columns))


def comparison_chart(reports: Sequence[Report], key: str) -> str:
    """Draw the anchors of several chains, and what the first operator makes of each, for the page.

    Args:
        reports: of `measure_chains`.
        key: "loss" or "bits_per_byte".

    Returns:
        a <figure>.
    """
    curves = [curve(report, key) for report in reports]
    values = [y for points in curves for _, y, _ in points if math.isfinite(y)]

    def draw(axes: Axes) -> Hovers:
        hovers: Hovers = {}
        for number, (report, points) in enumerate(zip(reports, curves, strict=True)):
            style = dict(_PALETTE[2 if number else 0], linewidth=2.4, marker="none")
            style["linestyle"] = "--" if number else "-"
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], **style)
            for index, (x, y, anchor) in enumerate(points):
                name = f"mark-{number}-{index}"
                hovers[name] = f"{report['name']}, {format_count(x)}: {y:.3f} {UNITS[key]}"
                mark = {"marker": "*", "markersize": 15} if anchor else {"marker": "o", "markersize": 6}
                _draw_mark(axes, x, y, {"color": style["color"], "zorder": 6, **mark}, name)
            label = f"{report['name']} (stars: anchors)"
            axes.plot([], [], **{**style, "marker": "*", "markersize": 12}, label=label)
        _finish(axes, _widen(values, 0.1), UNITS[key])
        return hovers

    title = f"{' and '.join(report['name'] for report in reports)}: {UNITS[key]} against size"
    return _chart(draw, title, ["wide", "narrow"])


def loss_axis(reports: Sequence[Report]) -> tuple[float, float]:
    """Return the ends of one loss axis for several chains, nats per token.

    The axis reaches as far up as the anchors and the default operator need, and a little further; below the lowest
    anchor there is room for its label.

    Args:
        reports: of `sweep`, in the same tokens, each with an anchor.
    """
    ends = [_loss_range(report) for report in reports]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return low - 0.14 * (high - low), high


def task_axis(reports: Sequence[Report], task: str) -> tuple[float, float]:
    """Return the ends of one score axis for several chains.

    Args:
        reports: of `measure_chains`.
        task: its name.
    """
    scores = [anchor["probes"][task] for report in reports for anchor in report["anchors"]]
    scores += [
        probes[task] for report in reports for target in report["targets"] for probes in target["probes"].values()
    ]
    spreads = [(score["value"], score["stderr"] or 0.0) for score in scores if math.isfinite(score["value"])]
    return _widen([value + sign * stderr for value, stderr in spreads for sign in (-1, 1)], 0.16)


def losses_above(report: Report, limit: float) -> str:
    """Name the losses that a chart only marks at its upper edge, in a sentence; empty where there are none.

    Args:
        report: one of `measure_chains`.
        limit: upper end of its axis.
    """
    words = []
    for name in _operators(report):
        losses = [target["loss"][name] for target in report["targets"] if _above(target["loss"].get(name), limit)]
        if losses:
            ends = sorted({f"{min(losses):.1f}", f"{max(losses):.1f}"}, key=float)
            words.append(f"{name} {' to '.join(ends)}")
    return f"Above the chart, marked at its upper edge: {', '.join(words)}." if words else ""


@contextmanager
def _drawing() -> Iterator[None]:
    with rc_context(_RC), warnings.catch_warnings():
        # A letter of a name that the font lacks is drawn as a box, which needs no warning.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _draw_sweep(figure: SubFigure, report: Report, title: str) -> None:
    """One sweep of a picture, with the strip of high losses above the axis."""
    ends = loss_axis([report])
    above = _operators_above(report, ends[1])
    if above:
        strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=[_strip_height(report), 5.0])
        _draw_strip(strip, report, above, ends[1])
    else:
        axes = figure.subplots()
    _draw_values(axes, report, ends[1], "loss", float)
    _finish(axes, ends, "held-out loss (nats per token)")
    axes.set_xlabel("parameters (a tied table counts once)")
    axes.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)


def _strip_height(report: Report) -> float:
    rows = len(_operators_above(report, loss_axis([report])[1]))
    return 0.32 * rows + 0.25 if rows else 0.0


def _draw_strip(strip: Axes, report: Report, names: Sequence[str], limit: float) -> None:
    """The losses above the axis as numbers, one row per operator."""
    colors = [_style(name)["color"] for name in names]
    for row, (name, color) in enumerate(zip(names, colors, strict=True)):
        for target in report["targets"]:
            loss = target["loss"].get(name)
            if _above(loss, limit):
                text = f"{loss:.1f}" if math.isfinite(loss) else "∞"
                strip.text(target["num_parameters"], row, text, ha="center", va="center", fontsize=8.5, color=color)
    strip.set_ylim(len(names) - 0.4, -0.6)
    strip.set_yticks(range(len(names)), names, fontsize=9)
    for label, color in zip(strip.get_yticklabels(), colors, strict=True):
        label.set_color(color)
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    strip.set_facecolor("#f4f4f4")
    strip.set_title("above the axis (nats per token)", fontsize=9, loc="left", color=_SOFT)


def _draw_values(
    axes: Axes,
    report: Report,
    limit: float,
    key: str,
    value: Value,
    words: Callable[[Any], str] = str,
    spread: Value | None = None,
) -> Hovers:
    """The anchors and every operator of a report.

    Args:
        limit: upper end of the axis; what lies above it is an arrow at the edge.
        key: of the values, in an anchor and (by operator) in a target.
        value: one of them -> its height.
        words: one of them -> its text for the pointer.
        spread: one of them -> half the length of its error bar.
    """
    anchors = sorted(report["anchors"], key=lambda anchor: anchor["num_parameters"])
    targets = sorted(report["targets"], key=lambda target: target["num_parameters"])
    hovers = _draw_anchors(axes, anchors, key, value, words, spread)
    for number, name in enumerate(_operators(report)):
        style = _style(name)
        for lower, upper in pairwise(anchors):
            between = [
                target
                for target in targets
                if name in target[key]
                and lower["num_parameters"] <= target["num_parameters"] <= upper["num_parameters"]
            ]
            line = [(target["num_parameters"], value(target[key][name])) for target in between]
            if not line:
                continue
            if name == DEFAULT_OPERATOR:
                # At an anchor's own shape it is that anchor, so its line runs from one to the other.
                start, end = ((anchor["num_parameters"], value(anchor[key])) for anchor in (lower, upper))
                line = [start, *line, end]
            axes.plot(*zip(*line, strict=True), **{**style, "marker": "none"})
        for index, target in enumerate(targets):
            if name not in target[key]:
                continue
            x, found, mark = target["num_parameters"], target[key][name], f"mark-{number}-{index}"
            y = value(found)
            hovers[mark] = f"{name}, {format_count(x)} ({describe_shape(target['shape'])}): {words(found)}"
            if _above(y, limit):
                _draw_arrow(axes, x, mark)
                continue
            _draw_mark(axes, x, y, style, mark)
            if spread is not None and number == 0:
                _draw_spread(axes, x, y, spread(found), style["color"])
        axes.plot([], [], **style, label=_LABELS.get(name, name))
    return hovers


def _draw_anchors(
    axes: Axes, anchors: Sequence[Any], key: str, value: Value, words: Callable[[Any], str], spread: Value | None
) -> Hovers:
    hovers = {}
    style: dict[str, Any] = {"color": _INK, "marker": "*", "markersize": 15, "linestyle": "none", "zorder": 6}
    line = [(anchor["num_parameters"], value(anchor[key])) for anchor in anchors]
    axes.plot(*zip(*line, strict=True), color=_INK, linewidth=1.0, alpha=0.6, zorder=3)
    for index, anchor in enumerate(anchors):
        x, y, mark = anchor["num_parameters"], value(anchor[key]), f"mark-anchor-{index}"
        shape = describe_shape(anchor["shape"])
        hovers[mark] = f"anchor {anchor['name']}, {format_count(x)} ({shape}): {words(anchor[key])}"
        _draw_mark(axes, x, y, style, mark)
        if spread is not None:
            _draw_spread(axes, x, y, spread(anchor[key]), _INK)
        name = anchor["name"]
        short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        text = axes.annotate(
            f"{short} · {y:.2f}",
            (x, y),
            xytext=(0, -16),
            textcoords="offset points",
            fontsize="small",
        )
        text.set(ha="center", va="center", zorder=7, in_layout=False)
    label = "anchors and the straight line between them"
    axes.plot([], [], **{**style, "linestyle": "-", "linewidth": 1.0, "markersize": 12}, label=label)
    return hovers


def _draw_mark(axes: Axes, x: float, y: float, style: Mapping[str, Any], name: str) -> None:
    axes.plot([x], [y], **{**style, "linestyle": "none"}, gid=name)


def _draw_spread(axes: Axes, x: float, y: float, spread: float, color: str) -> None:
    axes.plot([x, x], [y - spread, y + spread], color=color, linewidth=1.2, alpha=0.75)


def _draw_arrow(axes: Axes, x: float, name: str) -> None:
    """A mark at the upper edge of the axis, for a value above it."""
    axes.plot([x], [0.975], marker="^", markersize=6, color="#666666", transform=axes.get_xaxis_transform(), gid=name)


def _finish(axes: Axes, ends: tuple[float, float], label: str) -> None:
    """The axes of a chart, once everything is drawn."""
    axes.set_ylim(*ends)
    axes.margins(x=0.1)
    axes.set_xlabel("parameters")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(lambda x, _: format_count(x))
    axes.grid()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(figure: Figure) -> None:
    """Put the label of each anchor below its mark, or where it lies on no other label, and within the axes."""
    # Laid out once: neither labels nor what is drawn later move the axes.
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        placed: list[Any] = []
        for label in labels:
            box = label.get_window_extent()
            shift = max(axes.bbox.x0 - box.x0, 0) - max(box.x1 - axes.bbox.x1, 0)
            # A loss falls from left to right: above it is room for a label that moves to the right.
            for height in (14, -16, 27, -29) if shift > 0 else (-16, 14, -29, 27, -42):
                label.set_position((shift * _POINTS / figure.dpi, height))
                box = label.get_window_extent().expanded(1.05, 1.1)
                if box.y0 >= axes.bbox.y0 and not any(box.overlaps(other) for other in placed):
                    break
            placed.append(box)


def _sizes(columns: int) -> list[str]:
    return ["wide" if columns == 1 else "half", "narrow"]


def _chart(draw: Callable[[Axes], Hovers], title: str, sizes: Sequence[str]) -> str:
    """A <figure> with a drawing of each size, of which the page's style shows the one that fits."""
    drawings = []
    for size in sizes:
        width, height, columns = _SIZES[size]
        with _drawing(), rc_context({"font.size": 12}):
            figure = Figure(figsize=(width / _POINTS, height / _POINTS), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            hovers = draw(axes)
            # Room for the labels of the outermost anchors.
            axes.margins(x=60 / width)
            figure.legend(loc="outside lower left", ncols=columns, fontsize=11.5, frameon=False)
            _place_labels(figure)
            file = StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        drawings.append(f'<div class="{size}">{_inline(file.getvalue(), title, f"{size}-{title}", hovers)}</div>')
    return f'<figure class="chart">{"".join(drawings)}</figure>'


def _inline(svg: str, title: str, prefix: str, hovers: Hovers) -> str:
    """A drawing of matplotlib as an element of a page: with ids of its own, the page's colors and accessible text."""
    # Characters that XML does not have, of a name.
    root = ElementTree.fromstring(re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", svg))
    prefix = re.sub(r"\W+", "-", prefix)
    for parent in list(root.iter()):
        for child in list(parent):
            # The style would hold for the whole page, and the metadata only name matplotlib.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        name = element.get("id")
        if name in hovers:
            element.set("class", "mark")
            tooltip = ElementTree.Element("title")
            tooltip.text = hovers[name]
            element.insert(0, tooltip)
        for key, value in list(element.items()):
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key.endswith("}href"):
                del element.attrib[key]
                element.set("href", f"#{prefix}-{value.removeprefix('#')}")
            elif key == "clip-path":
                element.set(key, value.replace("#", f"#{prefix}-"))
            elif key == "style":
                element.set(key, re.sub(r"#[0-9a-f]{6}", lambda color: _VARIABLES.get(color[0], color[0]), value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _style(name: str) -> dict[str, Any]:
    # A stored report may hold an operator that is gone.
    return _STYLES.get(name, _PALETTE[-1])


def _operators(report: Report) -> list[str]:
    return list(dict.fromkeys(name for target in report["targets"] for name in target["loss"]))


def _operators_above(report: Report, limit: float) -> list[str]:
    """The operators with a loss above the axis."""
    targets = report["targets"]
    return [name for name in _operators(report) if any(_above(target["loss"].get(name), limit) for target in targets)]


def _above(value: float | None, limit: float) -> bool:
    """Whether a value lies above the axis; what is not a number does."""
    return value is not None and not value <= limit


def _loss_range(report: Report) -> tuple[float, float]:
    """Lowest and highest loss that the axis shows."""
    losses = {
        name: [target["loss"][name] for target in report["targets"] if name in target["loss"]]
        for name in _operators(report)
    }
    shown = [anchor["loss"] for anchor in report["anchors"]]
    shown += [loss for loss in losses.get(DEFAULT_OPERATOR, []) if math.isfinite(loss)]
    lowest, highest = min(shown), max(shown)
    allowed = lowest + (1 + _HEADROOM) * max(highest - lowest, 0.2)
    everything = [loss for values in losses.values() for loss in values if loss <= allowed]
    lowest, highest = min([*shown, *everything]), max([*shown, *everything])
    return lowest, highest + 0.08 * max(highest - lowest, 0.1)


def _widen(values: Sequence[float], share: float) -> tuple[float, float]:
    """A range with some room at both ends; of a single value a range around it."""
    low, high = min(values), max(values)
    room = share * (high - low) or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room
