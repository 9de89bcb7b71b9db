"""Tables for the terminal: what targets would be like, and what a sweep measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cbd_trl.architectures.registry import describe_shape
from cbd_trl.chain.measurements import table_rows, table_units
from cbd_trl.targets.many import TargetSummary
from cbd_trl.targets.request import ANCHOR
from cbd_trl.utils.formatting import format_bytes, format_count, with_active

_CAPTION = (
    "Parameters: in the token table, an untied head and learned positions + in all else; a tied table counts once. "
    "alpha: share of the lower anchor. KV cache: for each token of context and row. FLOPs: of a forward pass for each "
    "token, two for every weight of a matrix multiplied with, the head included; T: tokens attended to."
)

_LIMIT_CAPTION = (
    "For a limit of memory: weights as they will be kept + the cache of one row of so many tokens, in 16 bits."
)

_SCORE_CAPTION = (
    "Score: the share of what the lower anchor loses of the upper one, less is better, at the size or within "
    "the limit; ★ what is made without calibration text."
)


def target_table(summaries: Sequence[TargetSummary], title: str = "") -> Table:
    """Make a table of targets, one line each, in the order given.

    Args:
        summaries: from `describe_targets`.
        title: above the table.
    """
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title or None, caption=_CAPTION, caption_justify="left"
    )
    for name in ("requested", "parameters", "embedding + other", "shape", "made by", "between", "weights"):
        table.add_column(name, justify="left" if name in ("shape", "made by", "between") else "right")
    for name in ("KV cache", "FLOPs"):
        table.add_column(name, justify="right")
    limited = [summary for summary in summaries if summary.storage is not None]
    if limited:
        table.add_column(f"{limited[0].storage} + {limited[0].context_length:,} tokens", justify="right")
        table.caption = f"{_CAPTION} {_LIMIT_CAPTION}"
    searched = any(summary.score is not None for summary in summaries)
    if searched:
        table.add_column("score", justify="right")
        table.caption = f"{table.caption} {_SCORE_CAPTION}"
    best: dict[float | None, float] = {}
    for summary in summaries:
        if summary.score is not None:
            best[summary.requested] = min(summary.score, best.get(summary.requested, summary.score))
    for summary in summaries:
        chosen = summary.score is not None and summary.score == best[summary.requested]
        score = "" if summary.score is None else f"{'★ ' if chosen else ''}{summary.score:.3f}"
        table.add_row(*_cells(summary), *([score] if searched else []), style="bold" if chosen else None)
    return table


def _cells(summary: TargetSummary) -> list[str]:
    parts = (summary.embedding_parameters, summary.other_parameters)
    mixed = "" if summary.alpha is None else f", alpha {summary.alpha:.2f}"
    return [
        "" if summary.requested is None else format_count(summary.requested),
        with_active(format_count(summary.num_parameters), summary.num_parameters, summary.active_parameters),
        " + ".join(map(format_count, parts)),
        describe_shape(summary.shape, short=True),
        "the anchor itself" if summary.operator == ANCHOR else summary.operator + mixed,
        " and ".join(summary.anchors),
        f"{format_bytes(summary.weight_bytes)} {summary.dtype}",
        format_bytes(summary.cache_bytes),
        f"{format_count(summary.flops)} + {format_count(summary.attention_flops)} × T",
        *([] if summary.storage is None else [_memory(summary)]),
    ]


def _memory(summary: TargetSummary) -> str:
    parts = (summary.stored_bytes, summary.context_bytes)
    return f"{' + '.join(map(format_bytes, parts))} = {format_bytes(sum(parts))}"


def sweep_table(report: Mapping[str, Any], title: str = "") -> Table:
    """Make a table of a sweep, anchors in color and the best operator of a row in bold.

    Args:
        report: what `sweep` returned.
        title: above the table.
    """
    header, rows = table_rows(report, short=True)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        # Text: a name is not markup.
        title=Text(title) if title else None,
        caption=f"★ anchor. {table_units(report)}; seconds to build the first operator's model.",
    )
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if name == "shape" else "right", overflow="fold", no_wrap=column != 1)
    for row in rows:
        cells = [f"[bold]{cell}[/bold]" if column in row.best else cell for column, cell in enumerate(row.cells)]
        table.add_row(*cells, style="cyan" if row.anchor else None)
    return table
