"""A report as files: report.json, report.html, report.png."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cbd_trl import __version__
from cbd_trl.report.page import page
from cbd_trl.report.plots import plot_side_by_side
from cbd_trl.utils.results import write_text

_LIBRARIES = ("torch", "transformers", "trl")


def write_report(
    chains: Sequence[Mapping[str, Any]], output: Path | str, data: str, tasks: Sequence[str] = ()
) -> list[Path]:
    """Write what was measured of chains.

    Args:
        chains: from `measure_chains`.
        output: the folder.
        data: what the held-out text is called.
        tasks: that were asked for.

    Returns:
        report.html, report.png and report.json. In the latter a loss that is no number is null.
    """
    folder = Path(output)
    report = {
        "version": __version__,
        "versions": {name: version(name) for name in (*_LIBRARIES, *(["lm-eval"] if tasks else []))},
        "data": data,
        "tasks": list(tasks),
        "chains": list(chains),
    }
    paths = [folder / f"report.{kind}" for kind in ("html", "png", "json")]
    write_text(paths[0], page(report))
    plot_side_by_side(chains, [f"{chain['name']}: held-out {data}" for chain in chains], paths[1])
    write_text(paths[2], json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    return paths


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
