"""The tables and the picture of `benchmarks.start_for_training`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.curves import Point, mean_loss, tokens_to_reach
from benchmarks.flops import CALIBRATION_TOKENS, Way, chain_flops, family_sizes, forward_flops
from benchmarks.starts import DIRECT, OPERATORS, SCRATCH, SUBCLONE
from benchmarks.tables import markdown

FAMILIES = (1, 5, 20)
MEAN = "mean of the texts"
LABELS = {
    "nested": "nested (default)",
    "slice": "slice: upper anchor alone",
    "expand": "expand: lower anchor alone",
    "linear": "linear: the paper's formula",
    SUBCLONE: "weight subcloning of the source",
    DIRECT: "direct one-shot distillation (tokens of the teacher)",
    SCRATCH: "scratch",
}
# Okabe and Ito's colors; marker and dash tell the lines apart in print as well.
_STYLES: dict[str, dict[str, Any]] = {
    "nested": {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.6, "zorder": 5},
    "slice": {"color": "#009E73", "marker": "s", "linestyle": "--"},
    "expand": {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    "linear": {"color": "#D55E00", "marker": "v", "linestyle": ":"},
    SUBCLONE: {"color": "#E69F00", "marker": "P", "linestyle": "--"},
    DIRECT: {"color": "#56B4E9", "marker": "D", "linestyle": "-"},
    SCRATCH: {"color": "#666666", "marker": "x", "linestyle": "-"},
}

Curves = Mapping[str, Sequence[Point]]


def thousands(tokens: float) -> str:
    """`24576` -> `25k`."""
    return f"{tokens / 1000:.0f}k" if tokens else "0"


def _texts(curves: Curves) -> list[str]:
    return list(next(iter(curves.values()))[0]["loss"])


def _loss(point: Point, text: str) -> float:
    return mean_loss(point) if text == MEAN else float(point["loss"][text])


def _columns(curves: Curves) -> list[int]:
    return sorted({point["tokens"] for curve in curves.values() for point in curve})


def loss_table(curves: Curves, text: str) -> str:
    """Held-out loss of every start at every point, as Markdown.

    Args:
        curves: {start: its curve}.
        text: one of the texts, or `MEAN`.
    """
    columns, lines = _columns(curves), []
    for name, curve in curves.items():
        losses = {point["tokens"]: f"{_loss(point, text):.3f}" for point in curve}
        lines.append([LABELS[name], *(losses.get(tokens, "") for tokens in columns)])
    return markdown([f"{text}, after tokens", *map(thousands, columns)], lines)


def scratch_needs(curves: Curves) -> dict[str, list[dict[str, float | None]]]:
    """Tokens scratch needs to come to the mean loss of each point of the other starts; None: more than it was given.

    Args:
        curves: {start: its curve}, scratch's among them.
    """
    return {
        name: [
            {"tokens": point["tokens"], "scratch": tokens_to_reach(curves[SCRATCH], mean_loss(point))}
            for point in curve
        ]
        for name, curve in curves.items()
        if name != SCRATCH
    }


def scratch_table(curves: Curves) -> str:
    """`scratch_needs` as Markdown."""
    others = {name: curve for name, curve in curves.items() if name != SCRATCH}
    columns, limit, lines = _columns(others), curves[SCRATCH][-1]["tokens"], []
    for name, needs in scratch_needs(curves).items():
        cells = {
            need["tokens"]: f"> {thousands(limit)}" if need["scratch"] is None else thousands(need["scratch"])
            for need in needs
        }
        lines.append([LABELS[name], *(cells.get(tokens, "") for tokens in columns)])
    return markdown(["tokens of scratch to equal, after tokens", *map(thousands, columns)], lines)


def ways(parameters: Sequence[float], tokens: Sequence[float], hybrids: Sequence[float]) -> dict[str, Way]:
    """What each start costs besides its own training.

    Args:
        parameters: N of the chain's anchors, the source first.
        tokens: that each was distilled on.
        hybrids: share of its steps that trained a hybrid too.
    """
    source = parameters[0]
    statistics = forward_flops(source, CALIBRATION_TOKENS)
    chain = Way(once=chain_flops(parameters, tokens, CALIBRATION_TOKENS, hybrids))
    return {
        **dict.fromkeys(OPERATORS, chain),
        SUBCLONE: Way(once=statistics),
        DIRECT: Way(once=statistics, teacher=source, refit_tokens=CALIBRATION_TOKENS),
        SCRATCH: Way(),
    }


def family_costs(
    curves: Curves, level: float, parameters: Sequence[float], tokens: Sequence[float], hybrids: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """FLOPs of families of `FAMILIES` sizes, each size trained until the target's curve is down at a loss.

    Every size is taken to need the tokens that the one measured target needs.

    Args:
        curves: {start: its curve}.
        level: mean held-out loss to come down to.
        parameters, tokens, hybrids: as in `ways`.

    Returns:
        {start: {"tokens" of each size, "reached": False where they were not enough, so that all of this is a lower
        bound, "flops": [for each of `FAMILIES`]}}
    """
    made, costs = ways(parameters, tokens, hybrids), {}
    for name, curve in curves.items():
        needed = tokens_to_reach(curve, level)
        spent = curve[-1]["tokens"] if needed is None else needed
        sizes = [family_sizes(parameters[-1], parameters[0], count) for count in FAMILIES]
        flops = [made[name].flops(family, spent) for family in sizes]
        costs[name] = {"tokens": spent, "reached": needed is not None, "flops": flops}
    return costs


def family_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """`family_costs` as Markdown."""
    lines = []
    for name, cost in costs.items():
        more = "" if cost["reached"] else "> "
        flops = [f"{more}{value:.2e}" for value in cost["flops"]]
        lines.append([LABELS[name], f"{more}{thousands(cost['tokens'])}", *flops])
    sizes = [f"FLOPs, {count} size{'s' if count > 1 else ''}" for count in FAMILIES]
    return markdown(["way", "tokens a size", *sizes], lines)


def plot_curves(curves: Curves, path: Path, title: str) -> None:
    """One panel for each text and one for their mean, a line for each start.

    Args:
        curves: {start: its curve}.
        path: of the PNG.
        title: above the panels.
    """
    panels = [*_texts(curves), MEAN]
    figure = Figure(figsize=(4.6 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, text in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, curve in curves.items():
            xs = [point["tokens"] / 1000 for point in curve]
            ys = [_loss(point, text) for point in curve]
            axes.plot(xs, ys, label=LABELS[name], **{"linewidth": 1.6, "markersize": 5, **_STYLES[name]})
        # Logarithmic: scratch begins at five times the loss at which the others differ.
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_yticks([tick for tick in (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12) if _inside(axes.get_ylim(), tick)])
        axes.set_title(text, fontsize=11)
        axes.set_xlabel("recovery tokens (thousands)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _inside(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]
