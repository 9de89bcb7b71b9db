"""What a sweep measured of a chain, as the rows of a table and in Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.utils.formatting import format_count, markdown_table

# The file beside a chain that holds what a sweep measured of it.
MEASURED = "loss-against-size.json"

_BITS = "bits/byte"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        cells: the text of every column.
        anchor: whether the line is an anchor's.
        best: columns that hold the lowest loss of the line.
    """

    cells: list[str]
    anchor: bool
    best: frozenset[int]


def table_rows(report: Mapping[str, Any], short: bool = False, task: str | None = None) -> tuple[list[str], list[Row]]:
    """Return the header and the rows of a sweep, largest model first.

    Args:
        report: what `sweep` returned; with "bits_per_byte" these get a column, of the first operator.
        short: shapes in fewer words, anchors with a star instead of their name.
        task: the scores of this probe instead of the losses.

    Returns:
        the titles of the columns, and one `Row` per anchor and target.
    """
    names = list(dict.fromkeys(name for target in report["targets"] for name in target["loss"]))
    last = ([_BITS] if _has_bits(report) else []) + ["seconds"] if task is None else []
    lines: list[tuple[int, Row]] = []
    for anchor in report["anchors"]:
        count, shape = format_count(anchor["num_parameters"]), describe_shape(anchor["shape"], short)
        cells = [f"★ {count}", shape] if short else [count, f"{anchor['name']} (anchor): {shape}"]
        score = anchor["loss"] if task is None else anchor["probes"][task]
        cells += [_score(score), *[""] * (len(names) - 1)] if names else []
        cells += [_score(anchor["bits_per_byte"])] if _BITS in last else []
        lines.append((anchor["num_parameters"], Row([*cells, *[""] * (task is None)], True, frozenset())))
    for target in report["targets"]:
        found = target["loss"] if task is None else {name: probes[task] for name, probes in target["probes"].items()}
        cells = [format_count(target["num_parameters"]), describe_shape(target["shape"], short)]
        cells += [_score(found.get(name)) for name in names]
        cells += [_score(target["bits_per_byte"][names[0]])] if _BITS in last else []
        cells += [f"{target['seconds']:.1f}"] if task is None else []
        best = frozenset(2 + names.index(name) for name in best_of(found))
        lines.append((target["num_parameters"], Row(cells, False, best)))
    lines.sort(key=lambda line: -line[0])
    return ["parameters", "shape", *names, *last], [row for _, row in lines]


def measurements_table(report: Mapping[str, Any]) -> str:
    """Write a sweep as a table in Markdown, with anchors and the best operator of a row in bold.

    Args:
        report: what `sweep` returned.
    """
    header, rows = table_rows(report)
    cells = []
    for row in rows:
        bold = range(len(row.cells)) if row.anchor else row.best
        cells.append([f"**{cell}**" if n in bold and cell else cell for n, cell in enumerate(row.cells)])
    return markdown_table(header, cells, ["left" if name == "shape" else "right" for name in header]) + "\n"


def table_units(report: Mapping[str, Any]) -> str:
    """Name the units of the table: held-out loss in nats per token and, where it has them, bits per byte.

    Args:
        report: what `sweep` returned.
    """
    bits = f"; {_BITS}: the same of the anchors and the first operator, in bits per byte of text"
    return f"Held-out loss in nats per token{bits if _has_bits(report) else ''}"


def best_of(found: Mapping[str, Any]) -> list[str]:
    """Return the operators with the best value.

    Args:
        found: operator -> loss, or the score of a task with "value" and "higher_is_better".
    """
    ranks = {
        name: score if isinstance(score, float) else score["value"] * (-1 if score["higher_is_better"] else 1)
        for name, score in found.items()
    }
    return [name for name, rank in ranks.items() if rank == min(ranks.values())]


def _has_bits(report: Mapping[str, Any]) -> bool:
    return all(anchor.get("bits_per_byte") is not None for anchor in report["anchors"])


def _score(score: Any) -> str:
    """A loss, or the score of a task with its standard error, in a cell."""
    if score is None:
        return ""
    if isinstance(score, float):
        return f"{score:.3f}"
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{spread}"
