"""A chart of values against sizes as SVG for a page: its colours come from the page, its numbers show on hovering."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from cbd_trl.utils.formatting import format_count

_MARKS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "up": "M0,-4.6L4.4,3.4H-4.4Z",
    "down": "M0,4.6L4.4,-3.4H-4.4Z",
    "plus": "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "diamond": "M0,-5L4.2,0L0,5L-4.2,0Z",
    "cross": "M-4,-2.6L-2.6,-4L0,-1.4L2.6,-4L4,-2.6L1.4,0L4,2.6L2.6,4L0,1.4L-2.6,4L-4,2.6L-1.4,0Z",
    "star": "M0,-9L2.3,-3.1L8.6,-2.8L3.7,1.2L5.3,7.3L0,3.8L-5.3,7.3L-3.7,1.2L-8.6,-2.8L-2.3,-3.1Z",
}
MARKS = tuple(_MARKS)
# How wide a letter of a label is.
_LETTER = 6.8


@dataclass(frozen=True)
class Point:
    """A value at a size.

    Args:
        x: number of parameters.
        y: the value; above the axis (or no number) it is marked at the upper edge.
        hover: shown when the pointer rests on it.
        spread: half the length of its error bar, 0 for none.
        label: written below it.
    """

    x: float
    y: float
    hover: str
    spread: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Args:
        name: in the legend.
        css: class of everything drawn; the page gives it a colour (`--c`) and dashes.
        mark: one of `MARKS`.
        runs: points from left to right, joined within a run.
        joined: whether they are.
    """

    name: str
    css: str
    mark: str
    runs: Sequence[Sequence[Point]] = field(default_factory=list)
    joined: bool = True


@dataclass(frozen=True)
class Frame:
    """The drawing area.

    Args:
        width, height: of the whole drawing, in pixels of text that is 12 high.
        x_range, y_range: lower and upper end of the axes.
    """

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 46
    right: float = 14
    top: float = 32
    bottom: float = 40

    def x(self, value: float) -> float:
        """From a size to a place."""
        return self.left + _share(value, self.x_range) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """From a value to a place; what is above the axis, or no number, to the upper edge."""
        share = _share(value, self.y_range) if value <= self.y_range[1] else 1.0
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)


def svg_chart(series: Sequence[Series], frame: Frame, title: str, y_label: str) -> str:
    """The chart as one <svg> element.

    Args:
        series: drawn in this order, the last on top.
        frame: size and axes.
        title: what it shows, for those who cannot see it.
        y_label: above the value axis.
    """
    parts = [
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" aria-label="{escape(title)}">',
        *_axes(frame, y_label),
    ]
    for each in series:
        parts.append(f'<g class="{escape(each.css)}">')
        for run in each.runs:
            parts += _run(each, run, frame)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """The legend as an HTML list."""
    items = []
    for each in series:
        line = '<path class="line" d="M0,8H30"/>' if each.joined else ""
        sample = f'<svg viewBox="0 0 30 16" aria-hidden="true">{line}{_mark(each.mark, 15, 8)}</svg>'
        items.append(f'<li class="{escape(each.css)}">{sample}{escape(each.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about `count` of them: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def widened(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """A range with some room at both ends; of a single value a range around it."""
    low, high = min(values), max(values)
    room = share * (high - low) or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room


def _share(value: float, ends: tuple[float, float]) -> float:
    return (value - ends[0]) / (ends[1] - ends[0])


def _axes(frame: Frame, y_label: str) -> list[str]:
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    # Room for a number every 34 pixels up and every 70 along.
    ys = ticks(*frame.y_range, count=max(2, int((bottom - frame.top) / 44)))
    decimals = max(0, -math.floor(math.log10(ys[1] - ys[0]) + 1e-9)) if len(ys) > 1 else 2
    # 2.5 and 0.25 need one more than 2 and 0.2.
    decimals += any(abs(round(y, decimals) - y) > 1e-9 * max(1.0, abs(y)) for y in ys)
    for value in ys:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left:g},{y:.1f}H{right:g}"/>')
        parts.append(f'<text x="{frame.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{value:.{decimals}f}</text>')
    for value in ticks(*frame.x_range, count=max(2, int((right - frame.left) / 90))):
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f},{bottom:g}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17:g}" text-anchor="middle">{format_count(value)}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:g},{bottom:g}H{right:g}"/>')
    parts.append(f'<text class="name" x="{right:g}" y="{frame.height - 5:g}" text-anchor="end">parameters</text>')
    parts.append(f'<text class="name" x="2" y="14">{escape(y_label)}</text>')
    return parts


def _run(series: Series, run: Sequence[Point], frame: Frame) -> list[str]:
    parts = []
    labels: list[tuple[float, float, float]] = []
    shown = [point for point in run if point.y <= frame.y_range[1]]
    if series.joined and len(shown) > 1:
        places = "L".join(f"{frame.x(point.x):.1f},{frame.y(point.y):.1f}" for point in shown)
        parts.append(f'<path class="line" d="M{places}"/>')
    for point in run:
        x, y = frame.x(point.x), frame.y(point.y)
        if point not in shown:
            parts.append(_marked("up", x, y + 5, point.hover, "above"))
            continue
        if point.spread:
            low, high = frame.y(point.y - point.spread), frame.y(min(point.y + point.spread, frame.y_range[1]))
            parts.append(f'<path class="spread" d="M{x:.1f},{low:.1f}V{high:.1f}"/>')
        parts.append(_marked(series.mark, x, y, point.hover))
        if point.label:
            labels.append(_label_place(point.label, x, y, frame, labels))
            place = 'x="{:.1f}" y="{:.1f}" text-anchor="middle"'.format(*labels[-1])
            parts.append(f'<text class="label" {place}>{escape(point.label)}</text>')
    return parts


def _label_place(
    text: str, x: float, y: float, frame: Frame, labels: Sequence[tuple[float, float, float]]
) -> tuple[float, float, float]:
    """Middle, base line and half the width of a label: below its mark, or else where no earlier one is."""
    half = len(text) * _LETTER / 2
    # To the left of the plot stand the numbers of the axis.
    middle = max(min(x, frame.width - half), frame.left + half)
    # Above the mark, then further down and up; the last place is taken whatever is there.
    for place in (y + 22, y - 14, y + 36, y - 28, y + 50):
        near = [each for each in labels if abs(each[0] - middle) < each[2] + half and abs(each[1] - place) < 13]
        if not near and place < frame.height - frame.bottom:
            break
    return middle, place, half


def _marked(mark: str, x: float, y: float, hover: str, css: str = "") -> str:
    # A circle that is not seen, so that a finger or a pointer need not hit the mark itself.
    target = f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'
    return f"<g><title>{escape(hover)}</title>{target}{_mark(mark, x, y, css)}</g>"


def _mark(mark: str, x: float, y: float, css: str = "") -> str:
    return f'<path class="{f"mark {css}".strip()}" transform="translate({x:.1f} {y:.1f})" d="{_MARKS[mark]}"/>'
