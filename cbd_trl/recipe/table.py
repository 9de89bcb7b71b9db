"""What a recipe would build and what that would take, as a table for the terminal."""

from rich import box
from rich.table import Table

from cbd_trl.recipe.check import Check
from cbd_trl.recipe.estimate import Cost
from cbd_trl.recipe.speed import Speed
from cbd_trl.report.tables import describe_shape, format_count
from cbd_trl.utils.durations import format_seconds


def recipe_table(check: Check) -> Table:
    """One line an anchor, and one for all.

    Args:
        check: of a recipe.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"What {check.recipe.name} would build")
    for name in ("anchor", "parameters", "shape", "disk", "checkpoints", "tokens", "memory", "time"):
        table.add_column(name, justify="left" if name in ("anchor", "shape") else "right")
    for number, cost in enumerate(check.costs):
        table.add_row(*_cells(cost, finished=number < check.finished))
    left = check.costs[check.finished :]
    seconds = [cost.seconds for cost in left]
    table.add_section()
    table.add_row(
        "all" if not check.finished else "left",
        "",
        "",
        _bytes(sum(cost.disk for cost in left)),
        _bytes(max((cost.checkpoints for cost in left), default=0)),
        _count([cost.tokens for cost in left]),
        _bytes(max((cost.memory for cost in left), default=0)),
        _time(None if None in seconds else sum(second or 0 for second in seconds)),
    )
    return table


def how_estimated(check: Check) -> str:
    """Where the numbers of the table come from, in a few sentences.

    Args:
        check: of a recipe.
    """
    lines = [
        "Disk: weights and statistics (0.15 of the weights in bfloat16); checkpoints are there while an anchor is "
        f"trained. Free: {_bytes(check.disk_free)}.",
        "Tokens: those of full rows; shorter rows that are not packed have fewer.",
        "Memory: weights of teacher and student, gradients, AdamW's moments, the activations of a micro-batch and "
        "0.5 GB of libraries, on one device, with nothing sharded.",
    ]
    if check.speed is not None:
        lines.append(_speed(check.speed))
    limits = [(cost.name, cost.architecture.engine_limit(chosen=False)) for cost in check.costs]
    lines += [f"{name}: {limit}" for name, limit in limits if limit]
    return "\n".join(lines)


def _speed(speed: Speed) -> str:
    products = speed.products / 1e9
    told = f"{products:,.0f}" if products >= 10 else f"{products:.2g}"
    measured = f"a matrix product does {told} GFLOP/s on {speed.device} now"
    share = f"{speed.training / speed.products:.2g} of that is assumed in training"
    known = "within a factor of two or so" if speed.device == "cpu" else "not compared with any run on such a device"
    return f"Time: {measured}, {share}, {known}; evaluation is not counted."


def _cells(cost: Cost, finished: bool) -> list[str]:
    cells = [cost.name, format_count(cost.architecture.num_parameters), describe_shape(cost.architecture.shape)]
    if finished:
        return [*cells, *["finished", "", "", "", ""]]
    return [
        *cells,
        _bytes(cost.disk),
        _bytes(cost.checkpoints),
        _count([cost.tokens]),
        _bytes(cost.memory),
        _time(cost.seconds),
    ]


def _count(tokens: list[int | None]) -> str:
    known = [count for count in tokens if count is not None]
    return format_count(sum(known)) if len(known) == len(tokens) else "by epochs"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else f"about {format_seconds(seconds)}"
