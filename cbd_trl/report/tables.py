"""A sweep as a table: for the terminal and for a Markdown report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

_SHORT = {
    "num_hidden_layers": "layers",
    "n_layer": "layers",
    "hidden_size": "wide",
    "n_embd": "wide",
    "num_attention_heads": "heads",
    "n_head": "heads",
    "num_key_value_heads": "kv",
    "intermediate_size": "ffn",
    "n_inner": "ffn",
}
# The order in which a shape is told.
_ORDER = ("layers", "wide", "heads", "ffn")


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


def describe_shape(shape: Mapping[str, int], short: bool = False) -> str:
    """A shape in a few words, such as `16 layers, 384 wide, 6/2 heads, ffn 1024`.

    Args:
        shape: config fields.
        short: `16×384, 6/2 heads, ffn 1024`.
    """
    parts = {_SHORT.get(name, name): value for name, value in shape.items()}
    groups = parts.pop("kv", None)
    parts = {name: parts[name] for name in sorted(parts, key=lambda name: (*_ORDER, name).index(name))}
    if short and "layers" in parts and "wide" in parts:
        words = [f"{parts.pop('layers')}×{parts.pop('wide')}"]
    else:
        words = []
    for name, value in parts.items():
        if name == "ffn":
            words.append(f"ffn {value}")
        elif name == "heads" and groups not in (None, value):
            words.append(f"{value}/{groups} heads")
        else:
            words.append(f"{value} {name}")
    return ", ".join(words)


def format_count(num_parameters: float) -> str:
    """A parameter count as people say it: 85.2M, 1.35B, 41.2k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num_parameters >= size:
            return f"{num_parameters / size:.4g}{unit}"
    return f"{num_parameters:.0f}"


def table_rows(report: Mapping[str, Any], short: bool = False) -> tuple[list[str], list[Row]]:
    """Header and lines of a sweep, largest model first.

    Args:
        report: what `sweep` returned.
        short: shapes in fewer words, anchors with a star instead of their name.

    Returns:
        the titles of the columns, and one `Row` per anchor and target.
    """
    names = list(dict.fromkeys(name for target in report["targets"] for name in target["loss"]))
    header = ["parameters", "shape", *names, "seconds"]
    lines: list[tuple[int, Row]] = []
    for anchor in report["anchors"]:
        count, shape = format_count(anchor["num_parameters"]), describe_shape(anchor["shape"], short)
        cells = [f"★ {count}", shape] if short else [count, f"{anchor['name']} (anchor): {shape}"]
        cells += [f"{anchor['loss']:.3f}", *[""] * (len(names) - 1)] if names else []
        lines.append((anchor["num_parameters"], Row([*cells, ""], anchor=True, best=frozenset())))
    for target in report["targets"]:
        losses = [target["loss"].get(name) for name in names]
        lowest = min(loss for loss in losses if loss is not None)
        cells = [format_count(target["num_parameters"]), describe_shape(target["shape"], short)]
        cells += ["" if loss is None else f"{loss:.3f}" for loss in losses]
        best = frozenset(2 + column for column, loss in enumerate(losses) if loss == lowest)
        row = Row([*cells, f"{target['seconds']:.1f}"], anchor=False, best=best)
        lines.append((target["num_parameters"], row))
    lines.sort(key=lambda line: -line[0])
    return header, [row for _, row in lines]


def rich_table(report: Mapping[str, Any], title: str = "") -> Table:
    """The table for the terminal.

    Args:
        report: what `sweep` returned.
        title: above the table.
    """
    header, rows = table_rows(report, short=True)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=title or None,
        caption="★ anchor. Held-out loss in nats per token; seconds to build the first operator's model.",
    )
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if name == "shape" else "right", overflow="fold", no_wrap=column != 1)
    for row in rows:
        cells = [f"[bold]{cell}[/bold]" if column in row.best else cell for column, cell in enumerate(row.cells)]
        table.add_row(*cells, style="cyan" if row.anchor else None)
    return table


def markdown_table(report: Mapping[str, Any]) -> str:
    """The same table as Markdown, anchors and the best operator in bold.

    Args:
        report: what `sweep` returned.
    """
    header, rows = table_rows(report)
    lines = [_line(header), _line(["---:" if name != "shape" else ":---" for name in header])]
    for row in rows:
        emphasised = range(len(row.cells)) if row.anchor else row.best
        lines.append(_line([f"**{cell}**" if n in emphasised and cell else cell for n, cell in enumerate(row.cells)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
