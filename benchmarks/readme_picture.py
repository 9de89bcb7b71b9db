"""Draw the picture of README.md from a stored report of `benchmarks.real_text_chain`: loss against size.

python -m benchmarks.readme_picture
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
# Operator, its label, where that stands (millions of parameters, nats), and its line.
LINES: list[tuple[str, str, tuple[float, float], dict[str, Any]]] = [
    ("linear", "average of the two neighbors\n(the paper's formula)", (58, 5.29), {"color": "#D55E00", "ls": ":"}),
    ("slice", "larger neighbor, cut", (104, 5.30), {"color": "#009E73", "ls": "--"}),
    ("expand", "smaller neighbor, grown", (93, 4.42), {"color": "#CC79A7", "ls": "-."}),
    ("nested", "from_chain", (96, 3.86), {"color": "#0072B2", "ls": "-", "lw": 3, "marker": "o", "ms": 7}),
]
HIGHEST = 5.55


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        report: anchors and targets of one text.
        path: of the PNG.
    """
    # A fixed size and no date: the same report leaves the same bytes.
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        anchors = [(anchor["num_parameters"] / 1e6, anchor["loss"]) for anchor in report["anchors"]]
        for operator, label, place, style in LINES:
            for (upper, _), (lower, _) in pairwise(anchors):
                points = [(target["num_parameters"] / 1e6, target["loss"][operator]) for target in report["targets"]]
                inside = sorted(point for point in points if lower < point[0] < upper)
                axes.plot(*zip(*inside, strict=True), **{"marker": ".", "lw": 1.5, **style})
            axes.text(*place, label, color=style["color"], weight="bold" if operator == "nested" else None)
        axes.plot(*zip(*anchors, strict=True), "*-", color="black", lw=0.6, ms=17, zorder=5)
        for anchor, (size, loss) in zip(report["anchors"], anchors, strict=True):
            axes.annotate(
                anchor["name"], (size, loss), (0, -24), textcoords="offset points", ha="center", weight="bold"
            )
        axes.set(
            xlim=(38, 141),
            ylim=(3.45, HIGHEST),
            xlabel="parameters (millions)",
            ylabel="loss on held-out WikiText-2\n(nats per token; lower is better)",
            title="Stars were trained. Dots were made from the two stars beside them, without training",
        )
        axes.grid(alpha=0.25)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=RESULTS / "smollm2-135m-real-text.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "loss-against-size.png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text())["WikiText-2"], arguments.output)


if __name__ == "__main__":
    main()
