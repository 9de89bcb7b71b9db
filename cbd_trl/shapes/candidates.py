"""Every shape on offer between two corner shapes, with its number of parameters in closed form.

The line between the corners is where depth, width and FFN width stand at the same fraction of the way from the small
corner (0) to the large one (1). A candidate's `strain` says how far its dimensions are apart on that way. Depth and
width climb the line as a staircase, so that neither shrinks as the size grows; the FFN width is the fine dial, which
starts over at every stair.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import axis_length, parse_axes
from cbd_trl.shapes.smaller import needs_width_multiple_of_heads, width_follows_heads

# Widths and FFN widths that kernels like; 64 candidates each are enough to hit any size with the FFN as the fine dial.
_MULTIPLE = 8
_MOST_WIDTHS = 64
# Strain that a relative error of the size is worth: 0.5 % off the size for a tenth of the way nearer to the line.
_STRAIN_OF_SIZE = 20.0
# A width off the multiple must bring the shape this much nearer to the line to be preferred.
_ODD_WIDTH_STRAIN = 0.05


@dataclass(frozen=True)
class Candidate:
    """One shape on offer.

    Args:
        depth, sizes: number of layers and every atomic size.
        num_parameters: a tied table counted once.
        strain: root mean square distance of its dimensions' fractions from their mean (0: on the line), at the FFN
            width that would give the size asked for exactly; for the part of the size that no FFN width gives, more.
        on_stair: whether depth and width are a stair of the staircase along the line.
    """

    depth: int
    sizes: dict[str, int]
    num_parameters: int
    strain: float
    on_stair: bool


class ParameterCount:
    """Closed form of `Architecture.num_parameters` for other sizes: `outer(sizes) + depth * layer(sizes)`."""

    def __init__(self, architecture: Architecture) -> None:
        family, config = architecture.family, architecture.config
        tensors = dict(family.tensors(config))
        if architecture.tied:
            tensors.pop(f"{family.head}.weight", None)
        self._outer = [parse_axes(text) for text in tensors.values()]
        self._layer = [parse_axes(text) for text in family.layer_tensors(config).values()]

    def outer(self, sizes: Mapping[str, int]) -> int:
        return sum(math.prod(axis_length(axis, sizes) for axis in axes) for axes in self._outer)

    def layer(self, sizes: Mapping[str, int]) -> int:
        return sum(math.prod(axis_length(axis, sizes) for axis in axes) for axes in self._layer)

    def __call__(self, depth: int, sizes: Mapping[str, int]) -> int:
        return self.outer(sizes) + depth * self.layer(sizes)


@dataclass(frozen=True)
class Grid:
    """What a target may choose from.

    Args:
        upper: architecture of the large corner.
        low: atomic sizes of the small corner (0 for a corner at the origin).
        low_depth: its number of layers.
        depths: depths on offer.
        fixed: dimensions whose value was asked for; "heads" is group x query.
    """

    upper: Architecture
    low: Mapping[str, int]
    low_depth: int
    depths: Sequence[int]
    fixed: Mapping[str, int]

    def fraction(self, dim: str, value: float) -> float | None:
        """How far along from the small to the large corner, None where they agree."""
        low, high = (self.low_depth, self.upper.depth) if dim == "layer" else (self.low[dim], self.upper.sizes[dim])
        return None if high == low else (value - low) / (high - low)

    def multiple(self, dim: str) -> int:
        """What values of this dimension are multiples of: 8 where both corners are, else what they have in common "
        "with 8."""
        return math.gcd(_MULTIPLE, self.low[dim], self.upper.sizes[dim])


def candidates(grid: Grid, num_parameters: float | None) -> Iterator[Candidate]:
    """All shapes of the grid; where the FFN width is free, those nearest to `num_parameters` (or to the line when it "
    "is None)."""
    count = ParameterCount(grid.upper)
    choices = list(_widths_and_heads(grid))
    stairs = _stairs(grid, sorted({sizes["width"] for sizes in choices}))
    for sizes in choices:
        empty = {**sizes, "ffn": 0}
        outer, layer = count.outer(empty), count.layer(empty)
        neuron = count.layer({**sizes, "ffn": 1}) - layer
        for depth in grid.depths:
            if num_parameters is None:
                wanted = _ffn_on_line(grid, depth, sizes)
            else:
                wanted = ((num_parameters - outer) / depth - layer) / neuron
            # Judged before rounding to an FFN width on offer, or neighbouring stairs would take turns.
            dial = _ffn_in_range(grid, wanted)
            strain = _strain(grid, depth, {**sizes, "ffn": dial})
            if num_parameters is not None:
                missed = outer + depth * (layer + dial * neuron) - num_parameters
                strain += _STRAIN_OF_SIZE * abs(missed) / num_parameters
            for ffn in _ffn_near(grid, dial):
                shape = {**sizes, "ffn": ffn}
                total = outer + depth * (layer + ffn * neuron)
                yield Candidate(depth, shape, total, strain, (depth, sizes["width"]) in stairs)


def _stairs(grid: Grid, widths: Sequence[int]) -> set[tuple[int, int]]:
    """The staircase: pairs of depth and width of which one is the nearest on offer to the other's fraction of the
    way, and a corner wherever both would change at once. Without a fine dial every pair is on it."""
    if len(grid.depths) == 1 or len(widths) <= 1 or "ffn" in grid.fixed or grid.fraction("ffn", 0) is None:
        return {(depth, width) for depth in grid.depths for width in widths}

    def nearest(values: Sequence[int], dim: str, fraction: float | None) -> int:
        return min(values, key=lambda value: abs((grid.fraction(dim, value) or 0.0) - (fraction or 0.0)))

    stairs = {(depth, nearest(widths, "width", grid.fraction("layer", depth))) for depth in grid.depths}
    stairs |= {(nearest(grid.depths, "layer", grid.fraction("width", width)), width) for width in widths}
    climb = sorted(stairs)
    return stairs | {(above[0], below[1]) for below, above in itertools.pairwise(climb)}


def widths(grid: Grid) -> list[int]:
    """Widths on offer, ascending."""
    low, high = grid.low["width"], grid.upper.sizes["width"]
    if "width" in grid.fixed:
        return [grid.fixed["width"]]
    if low == high:
        return [high]
    if width_follows_heads(grid.upper):
        return [width for width in range(low, high + 1, grid.upper.sizes["dim"]) if heads_for_width(grid, width)]
    if needs_width_multiple_of_heads(grid.upper):
        return [
            width
            for width in range(max(low, 1), high + 1)
            if any(width % _num_heads(s) == 0 for s in heads_for_width(grid, width))
        ]
    step = grid.multiple("width")
    while (high - low) // step > _MOST_WIDTHS and low % (2 * step) == high % (2 * step) == 0:
        step *= 2
    return [width for width in range(low, high + 1, step) if width > 0]


def _widths_and_heads(grid: Grid) -> Iterator[dict[str, int]]:
    """Sizes for every width with every choice of heads that goes with it; the FFN as in the upper corner."""
    divides = needs_width_multiple_of_heads(grid.upper)
    for width in widths(grid):
        for heads in heads_for_width(grid, width):
            if not divides or width % _num_heads(heads) == 0:
                yield {**grid.upper.sizes, **heads, "width": width}


def _num_heads(heads: Mapping[str, int]) -> int:
    return heads["group"] * heads["query"]


def heads_for_width(grid: Grid, width: int) -> list[dict[str, int]]:
    """Key/value groups and queries per group for a width: on the line, rounded up, unless they are fixed or the only "
    "thing that varies."""
    high = grid.upper.sizes
    if width_follows_heads(grid.upper):
        queries = [
            query for query in range(grid.low["query"], high["query"] + 1) if width % (query * high["dim"]) == 0
        ]
        pairs = [{"group": width // (query * high["dim"]), "query": query} for query in queries]
        pairs = [pair for pair in pairs if max(grid.low["group"], 1) <= pair["group"] <= high["group"]]
    else:
        along = grid.fraction("width", width)
        free = along is None or grid.fixed.keys() & {"group", "heads"}
        along = 1.0 if along is None else along
        options = {}
        for dim in ("group", "query"):
            on_line = math.ceil(grid.low[dim] + along * (high[dim] - grid.low[dim]) - 1e-9)
            options[dim] = range(max(grid.low[dim], 1), high[dim] + 1) if free else [on_line]
        pairs = [{"group": group, "query": query} for group in options["group"] for query in options["query"]]
    wanted = grid.fixed
    return [
        pair
        for pair in pairs
        if pair["group"] == wanted.get("group", pair["group"])
        and _num_heads(pair) == wanted.get("heads", _num_heads(pair))
    ]


def _ffn_on_line(grid: Grid, depth: int, sizes: Mapping[str, int]) -> float:
    """The FFN width at the mean fraction of depth and width, or of the heads where nothing else varies."""
    known = [grid.fraction("layer", depth), grid.fraction("width", sizes["width"])]
    if known == [None, None]:
        known = [grid.fraction("group", sizes["group"])]
    fractions = [fraction for fraction in known if fraction is not None]
    along = sum(fractions) / len(fractions) if fractions else 1.0
    return grid.low["ffn"] + along * (grid.upper.sizes["ffn"] - grid.low["ffn"])


def _ffn_in_range(grid: Grid, wanted: float) -> float:
    """The FFN width nearest to the wanted one, before rounding."""
    if "ffn" in grid.fixed:
        return grid.fixed["ffn"]
    return min(max(wanted, grid.low["ffn"]), grid.upper.sizes["ffn"])


def _ffn_near(grid: Grid, wanted: float) -> Iterable[int]:
    """The FFN widths just below and above the wanted one that are on offer."""
    if "ffn" in grid.fixed:
        return [grid.fixed["ffn"]]
    step, low, high = grid.multiple("ffn"), grid.low["ffn"], grid.upper.sizes["ffn"]
    if low == high:
        return [high]
    low = max(low, step)
    below = min(max(math.floor(wanted / step) * step, low), high)
    return {below, min(below + step, high)}


def _strain(grid: Grid, depth: int, sizes: Mapping[str, float]) -> float:
    fractions = [
        grid.fraction("layer", depth),
        grid.fraction("width", sizes["width"]),
        grid.fraction("ffn", sizes["ffn"]),
    ]
    if grid.low["width"] == grid.upper.sizes["width"] or grid.fixed.keys() & {"group", "heads"}:
        fractions += [grid.fraction("group", sizes["group"]), grid.fraction("query", sizes["query"])]
    known = [fraction for fraction in fractions if fraction is not None]
    if not known:
        return 0.0
    mean = sum(known) / len(known)
    strain = math.sqrt(sum((fraction - mean) ** 2 for fraction in known) / len(known))
    odd = "width" not in grid.fixed and sizes["width"] % grid.multiple("width") != 0
    return strain + (_ODD_WIDTH_STRAIN if odd else 0.0)
