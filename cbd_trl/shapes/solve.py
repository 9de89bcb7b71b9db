"""Solve for the config fields of a shape with a number of parameters. Nothing here reads a weight."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from cbd_trl.architectures import FREE, Architecture
from cbd_trl.architectures.axes import Axes, axis_length, parse_axes
from cbd_trl.shapes.cut import cut_architecture, needs_width_multiple_of_heads, width_follows_heads
from cbd_trl.shapes.depths import Blocks, blocks_for_depth, reachable_depths
from cbd_trl.surgery.blocks import Fits, anywhere, check_blocks, fitting_layers, spaced_layers

# Widths and FFN widths that kernels like; 64 candidates each are enough to hit any size with the FFN as the fine dial.
_MULTIPLE = 8
_MOST_WIDTHS = 64
# Strain that a relative error of the size is worth: 0.5 % off the size for a tenth of the way nearer to the line.
_STRAIN_OF_SIZE = 20.0
# A width off the multiple must bring the shape this much nearer to the line to be preferred.
_ODD_WIDTH_STRAIN = 0.05
# Which depths there are: those of whole blocks, those that evenly spaced layers of the upper anchor leave in its
# pattern of layers, those to which the lower one can grow in its pattern, or every depth between.
DepthRule = Literal["blocks", "cut", "grown", "any"]
# An anchor further than this from the requested size is not returned (only at the small end of what can be cut).
_ANCHOR_TOLERANCE = 0.25


def solve_anchor(upper: Architecture, size: float) -> dict[str, int]:
    """Solve for the shape of an anchor of a given size: fewer layers down to half of those of `upper`, then narrower.

    Depths that leave the pattern of layers that engines have built in (`Architecture.fits`) are not on offer.

    Args:
        upper: architecture of the anchor above (or the source).
        size: above 1 a number of parameters, below 1 a ratio to that of `upper`.

    Returns:
        Config fields of the family.

    Raises:
        ValueError: the size is not a positive number, not smaller than `upper`, or smaller than anything that can be
            cut from it.
    """
    total = upper.num_parameters
    if not _is_positive(size) or size >= total or size == 1:
        raise ValueError(
            f"An anchor's size must be a number of parameters below the {total:,} of the anchor above, or a ratio "
            f"between 0 and 1, got {size!r}. List anchors from large to small."
        )
    wanted = size if size > 1 else size * total
    half = -(-upper.depth // 2)
    depths = [depth for depth in range(half, upper.depth) if _keeps_pattern(depth, upper.depth, upper.fits)]
    # Of a model in whose pattern no depth fits, only the width is changed.
    half = min(depths, default=upper.depth)
    stacks = {depth: spaced_layers(upper.depth, depth, upper.fits) for depth in (*depths, half)}
    shallower = Grid(upper, upper.sizes, upper.depth, {depth: stacks[depth] for depth in depths}, {})
    by_depth = list(candidates(shallower, wanted))
    if by_depth and min(option.num_parameters for option in by_depth) <= wanted:
        return _fields(upper, min(by_depth, key=lambda option: abs(option.num_parameters - wanted)))
    narrow = {**upper.sizes, "width": 0, "ffn": 0, "group": 0}
    options = by_depth + [
        option
        for option in candidates(Grid(upper, narrow, upper.depth, {half: stacks[half]}, {}), wanted)
        if option.num_parameters < total
    ]
    best = _nearest(options, wanted, _ANCHOR_TOLERANCE) if options else None
    if best is None or abs(best.num_parameters - wanted) > _ANCHOR_TOLERANCE * wanted:
        smallest = min((option.num_parameters for option in options), default=total)
        raise ValueError(
            f"No anchor of about {wanted:,.0f} parameters can be cut from one of {total:,} ({upper.shape}): the "
            f"smallest has {smallest:,}{f', the nearest {best.num_parameters:,}' if best else ''}. Choose one of "
            "these, or give the anchor's config fields."
        )
    return _fields(upper, best)


def nearest_architecture(upper: Architecture, wanted: Architecture) -> Architecture:
    """Cut an architecture to the shape nearest to that of another, which it may not have: no larger in any dimension,
    heads of its own size, as many of them as read as much.

    Args:
        upper: the architecture to cut from.
        wanted: of any family; with fewer parameters.

    Returns:
        that shape; where transformers does not take it, one of as many parameters (see `solve_anchor`).
    """
    had, sizes = upper.sizes, wanted.sizes
    heads = sizes["group"] * sizes["query"] * sizes["dim"] / had["dim"]
    group = min(sizes["group"] if had["query"] > 1 else max(1, round(heads)), had["group"])
    query = min(max(1, math.floor(heads / group + 0.5)), had["query"])
    found = {dim: min(sizes[dim], had[dim]) for dim in ("width", "ffn")}
    found |= {"layer": min(wanted.depth, upper.depth), "group": group, "query": query, "heads": group * query}
    fields = {field: found[dim] for field, dim in upper.family.shape_fields.items() if dim in found}
    with suppress(ValueError):
        target = cut_architecture(upper, fields)
        if target.num_parameters < upper.num_parameters:
            return target
    return cut_architecture(upper, solve_anchor(upper, wanted.num_parameters))


def solve_target(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    num_parameters: float | None = None,
    config: Mapping[str, Any] | None = None,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> dict[str, int]:
    """Solve for the shape of a target between two anchors: the fields given exactly, the others near the line.

    Args:
        upper, lower: architectures of the two anchors.
        block_map: for each lower layer the upper layers it stands for.
        num_parameters: size wanted; None: the fields that `config` leaves out go where those it gives are on the line.
        config: config fields to fix.
        tolerance: largest |size - num_parameters| / num_parameters.
        depth_rule: "blocks" for the depths that whole blocks give, "cut", "grown" or "any" for every depth between.
            Where engines tell layers apart by position (`Architecture.fits`), depths that would leave one elsewhere
            are made only if `config` has them, but for "any", which leaves the pattern to the caller.
        kept: for each lower layer the upper layer it was cut from; None: the last of its block.
        costs: as in `blocks_for_depth`; which layers a target has matters to its size where their tensors differ.

    Returns:
        All shape fields of the family.

    Raises:
        ValueError: nothing was requested, a field or size out of range, a shape that cannot be made, or none within
            `tolerance`; the message holds what is possible.
    """
    fields = dict(config or {})
    if num_parameters is None and not fields:
        raise ValueError(
            "Nothing was requested: give num_parameters, or config with fields such as " + ", ".join(upper.shape) + "."
        )
    if num_parameters is not None and not _is_positive(num_parameters):
        raise ValueError(f"num_parameters must be a positive number, got {num_parameters!r}.")
    _check_pair(upper, lower)
    _check_range(upper, lower, fields)
    if num_parameters is not None:
        _check_size_range(upper, lower, num_parameters, tolerance)
    grid = _grid(upper, lower, block_map, kept, fields, depth_rule, costs)
    options = list(candidates(grid, num_parameters))
    if not options:
        raise ValueError(_impossible(grid, fields))
    if num_parameters is None:
        return _fields(upper, min(options, key=lambda option: option.strain))
    best = _nearest(options, num_parameters, tolerance)
    if abs(best.num_parameters - num_parameters) > tolerance * num_parameters:
        raise ValueError(_too_far(upper, options, num_parameters, tolerance, fields))
    return _fields(upper, best)


def spread_targets(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    num_parameters: float,
    count: int,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> list[dict[str, int]]:
    """List shapes of one size between two anchors: that of `solve_target`, then others, each as far as can be from
    those before it.

    Of every depth and width (and heads and experts that go with it) the FFN width is taken that comes nearest to the
    size; far is meant in fractions of the way from the lower to the upper anchor.

    Args:
        upper, lower, block_map, num_parameters, tolerance, depth_rule, kept, costs: as of `solve_target`.
        count: the most shapes to list.

    Returns:
        All shape fields of the family, for 1 to `count` shapes.

    Raises:
        ValueError: as `solve_target`.
    """
    fields = solve_target(upper, lower, block_map, num_parameters, None, tolerance, depth_rule, kept, costs)
    grid = _grid(upper, lower, block_map, kept, {}, depth_rule, costs)
    nearest: dict[tuple[int, ...], Candidate] = {}
    for option in candidates(grid, num_parameters):
        place = (option.depth, *(size for dim, size in option.sizes.items() if dim != "ffn"))
        best = nearest.get(place, option)
        nearest[place] = min(best, option, key=lambda one: abs(one.num_parameters - num_parameters))
    allowed = tolerance * num_parameters
    options = [option for option in nearest.values() if abs(option.num_parameters - num_parameters) <= allowed]
    found, start = [fields], _place(grid, *upper.resolve_sizes(fields))
    places = [_place(grid, option.depth, option.sizes) for option in options]
    distances = [math.dist(start, one) for one in places]
    while len(found) < count and max(distances, default=0.0) > 0:
        furthest = distances.index(max(distances))
        if (shape := _fields(upper, options[furthest])) != fields:
            found.append(shape)
        distances = [min(had, math.dist(places[furthest], one)) for had, one in zip(distances, places, strict=True)]
    return found


def list_sizes(
    upper: Architecture, lower: Architecture, block_map: Blocks, kept: Sequence[int] | None = None
) -> dict[str, Any]:
    """List the shapes between two anchors, of the depths that whole blocks give.

    Returns:
        `num_parameters`: [smallest, largest]; `shape`: for every config field the values on offer, ascending.
    """
    _check_pair(upper, lower)
    grid = _grid(upper, lower, block_map, kept, {}, "blocks")
    low, high = lower.sizes, upper.sizes
    values = {
        "layer": list(grid.depths),
        "width": widths(grid),
        "ffn": list(range(low["ffn"], high["ffn"] + 1, grid.multiple("ffn"))),
        "group": list(range(low["group"], high["group"] + 1)),
        **{dim: list(range(low[dim], high[dim] + 1)) for dim in ("expert",) if dim in high},
    }
    groups_and_queries = [
        (group, query) for group in values["group"] for query in range(low["query"], high["query"] + 1)
    ]
    values["heads"] = sorted({group * query for group, query in groups_and_queries})
    return {
        "num_parameters": [lower.num_parameters, upper.num_parameters],
        "shape": {field: values[dim] for field, dim in upper.family.shape_fields.items()},
    }


@dataclass(frozen=True)
class Candidate:
    """One shape on offer.

    Args:
        depth, sizes: number of layers and every atomic size.
        num_parameters: a tied table counted once.
        strain: root mean square distance of its dimensions' fractions from their mean (0: on the line), at the FFN
            width that would give the requested size exactly; for the part of the size that no FFN width gives, more.
        on_stair: whether depth and width are a stair of the staircase along the line.
    """

    depth: int
    sizes: dict[str, int]
    num_parameters: int
    strain: float
    on_stair: bool


class ParameterCount:
    """Closed form of `Architecture.num_parameters` for other layers and sizes."""

    def __init__(self, architecture: Architecture) -> None:
        family, config = architecture.family, architecture.config
        tensors = dict(family.tensors(config))
        if architecture.tied:
            tensors.pop(f"{family.head}.weight", None)
        self._outer = [parse_axes(text) for text in tensors.values()]
        self._kinds = [architecture.kind(layer) for layer in range(architecture.depth)]
        first = {kind: self._kinds.index(kind) for kind in set(self._kinds)}
        self._layer: dict[str | None, list[Axes]] = {kind: [] for kind in first}
        for key in architecture.stored:
            for kind, layer in first.items():
                if architecture.split_name(key)[0] == layer:
                    self._layer[kind].append(architecture.tensors[key])

    def outer(self, sizes: Mapping[str, int]) -> int:
        """Count the parameters outside the layers."""
        return _count(self._outer, sizes)

    def stack(self, sizes: Mapping[str, int], layers: Iterable[int]) -> int:
        """Count the parameters of these layers."""
        kinds = Counter(self._kinds[layer] for layer in layers)
        return sum(number * _count(self._layer[kind], sizes) for kind, number in kinds.items())

    def __call__(self, layers: Iterable[int], sizes: Mapping[str, int]) -> int:
        """Count the parameters of a model of these layers."""
        return self.outer(sizes) + self.stack(sizes, layers)


def _count(tensors: Iterable[Axes], sizes: Mapping[str, int]) -> int:
    return sum(math.prod(axis_length(axis, sizes) for axis in axes) for axes in tensors)


@dataclass(frozen=True)
class Grid:
    """What a target may choose from.

    Args:
        upper: architecture of the large corner.
        low: atomic sizes of the small corner (0 for a corner at the origin).
        low_depth: its number of layers.
        depths: depths on offer, each with the upper layers that it is made of.
        fixed: dimensions whose value is fixed by the request; "heads" is group x query.
    """

    upper: Architecture
    low: Mapping[str, int]
    low_depth: int
    depths: Mapping[int, Sequence[int]]
    fixed: Mapping[str, int]

    def fraction(self, dim: str, value: float) -> float | None:
        """Compute how far along a value is from the small to the large corner; None where they agree."""
        low, high = (self.low_depth, self.upper.depth) if dim == "layer" else (self.low[dim], self.upper.sizes[dim])
        return None if high == low else (value - low) / (high - low)

    def multiple(self, dim: str) -> int:
        """Compute the step of this dimension's values: the greatest divisor that both corners share with 8."""
        return math.gcd(_MULTIPLE, self.low[dim], self.upper.sizes[dim])


def _grid(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    kept: Sequence[int] | None,
    fields: Mapping[str, int],
    depth_rule: DepthRule,
    costs: Sequence[float] | None = None,
) -> Grid:
    check_blocks(block_map, lower.depth, upper.depth)
    fixed = {upper.family.shape_fields[field]: value for field, value in fields.items()}
    # A depth that is requested by name may leave the pattern that engines have built in.
    fits = anywhere if "layer" in fixed else upper.fits
    depths: Iterable[int] = range(lower.depth, upper.depth + 1)
    if depth_rule == "blocks":
        depths = reachable_depths(upper.depth, block_map, kept, fits)
    elif depth_rule == "cut":
        depths = [depth for depth in depths if _keeps_pattern(depth, upper.depth, fits)]
    elif depth_rule == "grown" and "layer" not in fixed:
        depths = [depth for depth in depths if _keeps_pattern(lower.depth, depth, lambda i, j: lower.fits(j, i))]
    if "layer" in fixed:
        if fixed["layer"] not in depths:
            raise ValueError(
                f"{upper.family.depth_field}={fixed['layer']} cannot be made of whole blocks, which give the depths "
                f"{', '.join(str(depth) for depth in depths)}. Choose one of these, or operator='slice' or 'expand'."
            )
        depths = [fixed["layer"]]
    if depth_rule == "blocks":
        stacks = {depth: _stack(block_map, depth, costs, kept, fits) for depth in depths}
    else:
        stacks = {depth: spaced_layers(upper.depth, depth, upper.fits) for depth in depths}
    return Grid(upper, lower.sizes, lower.depth, stacks, fixed)


def _stack(
    block_map: Blocks, depth: int, costs: Sequence[float] | None, kept: Sequence[int] | None, fits: Fits
) -> list[int]:
    """List the upper layers of a target of whole blocks."""
    swapped = blocks_for_depth(block_map, depth, costs, kept, fits)
    own = [block[-1] for block in block_map] if kept is None else kept
    return [layer for i, block in enumerate(block_map) for layer in (block if i in swapped else [own[i]])]


def _keeps_pattern(kept: int, total: int, fits: Fits) -> bool:
    """Check whether so many layers can be chosen that each comes to stand where it belongs."""
    return fitting_layers(spaced_layers(total, kept), total, fits) is not None


def candidates(grid: Grid, num_parameters: float | None) -> Iterator[Candidate]:
    """Yield all shapes of the grid; where the FFN width is free, those nearest to the size (None: to the line)."""
    count = ParameterCount(grid.upper)
    choices = list(_widths_and_heads(grid))
    stairs = _stairs(grid, sorted({sizes["width"] for sizes in choices}))
    for sizes in choices:
        empty = {**sizes, "ffn": 0}
        outer = count.outer(empty)
        for depth, layers in grid.depths.items():
            stack = count.stack(empty, layers)
            neurons = count.stack({**sizes, "ffn": 1}, layers) - stack
            if num_parameters is None:
                wanted = _ffn_on_line(grid, depth, sizes)
            else:
                wanted = (num_parameters - outer - stack) / neurons
            # Measured before rounding to an FFN width on offer, or neighboring stairs would take turns.
            dial = _ffn_in_range(grid, wanted)
            strain = _strain(grid, depth, {**sizes, "ffn": dial})
            if num_parameters is not None:
                missed = outer + stack + dial * neurons - num_parameters
                strain += _STRAIN_OF_SIZE * abs(missed) / num_parameters
            for ffn in _ffn_near(grid, dial):
                shape = {**sizes, "ffn": ffn}
                total = outer + stack + ffn * neurons
                yield Candidate(depth, shape, total, strain, (depth, sizes["width"]) in stairs)


def _stairs(grid: Grid, widths: Sequence[int]) -> set[tuple[int, int]]:
    """List the stairs: pairs of depth and width of which one is the nearest on offer to the other's fraction of the
    way, and a corner wherever both would change at once. Without a fine dial every pair is on it."""
    if len(grid.depths) == 1 or len(widths) <= 1 or "ffn" in grid.fixed or grid.fraction("ffn", 0) is None:
        return {(depth, width) for depth in grid.depths for width in widths}

    def nearest(values: Iterable[int], dim: str, fraction: float | None) -> int:
        return min(values, key=lambda value: abs((grid.fraction(dim, value) or 0.0) - (fraction or 0.0)))

    stairs = {(depth, nearest(widths, "width", grid.fraction("layer", depth))) for depth in grid.depths}
    stairs |= {(nearest(grid.depths, "layer", grid.fraction("width", width)), width) for width in widths}
    climb = sorted(stairs)
    return stairs | {(above[0], below[1]) for below, above in itertools.pairwise(climb)}


def widths(grid: Grid) -> list[int]:
    """List the widths on offer, ascending."""
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
    """Yield the sizes for every width with every choice of heads and experts that goes with it; the FFN as in the
    upper corner."""
    divides = needs_width_multiple_of_heads(grid.upper)
    for width in widths(grid):
        # A convolution has as many channels as the stream.
        conv = {"conv": width} if "conv" in grid.upper.sizes else {}
        for heads in heads_for_width(grid, width):
            if not divides or width % _num_heads(heads) == 0:
                for experts in _experts_for_width(grid, width):
                    yield {**grid.upper.sizes, **heads, **experts, **conv, "width": width}


def _experts_for_width(grid: Grid, width: int) -> list[dict[str, int]]:
    """List numbers of experts for a width: on the line, rounded up, unless they are fixed or no width but theirs is
    free; nothing to choose where the FFN is one."""
    if "expert" not in grid.upper.sizes:
        return [{}]
    low, high, along = grid.low["expert"], grid.upper.sizes["expert"], grid.fraction("width", width)
    if "expert" in grid.fixed:
        return [{"expert": grid.fixed["expert"]}]
    if along is None or "ffn" in grid.fixed or grid.fraction("ffn", 0) is None:
        return [{"expert": number} for number in range(low, high + 1)]
    return [{"expert": math.ceil(low + along * (high - low) - 1e-9)}]


def _num_heads(heads: Mapping[str, int]) -> int:
    return heads["group"] * heads["query"]


def heads_for_width(grid: Grid, width: int) -> list[dict[str, int]]:
    """List key/value groups and queries per group for a width: on the line, rounded up, unless they are fixed or the
    only thing that varies."""
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
    """Compute the FFN width at the mean fraction of depth and width, or of heads and experts where neither varies."""
    known = [grid.fraction("layer", depth), grid.fraction("width", sizes["width"])]
    if known == [None, None]:
        known = [grid.fraction(dim, sizes[dim]) for dim in ("group", "expert") if dim in sizes]
    fractions = [fraction for fraction in known if fraction is not None]
    along = sum(fractions) / len(fractions) if fractions else 1.0
    return grid.low["ffn"] + along * (grid.upper.sizes["ffn"] - grid.low["ffn"])


def _ffn_in_range(grid: Grid, wanted: float) -> float:
    """Clip the FFN width to the range on offer, before rounding."""
    if "ffn" in grid.fixed:
        return grid.fixed["ffn"]
    return min(max(wanted, grid.low["ffn"]), grid.upper.sizes["ffn"])


def _ffn_near(grid: Grid, wanted: float) -> Iterable[int]:
    """List the FFN widths on offer just below and above the wanted one."""
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
    if "expert" in sizes:
        fractions.append(grid.fraction("expert", sizes["expert"]))
    if grid.low["width"] == grid.upper.sizes["width"] or grid.fixed.keys() & {"group", "heads"}:
        fractions += [grid.fraction("group", sizes["group"]), grid.fraction("query", sizes["query"])]
    known = [fraction for fraction in fractions if fraction is not None]
    if not known:
        return 0.0
    mean = sum(known) / len(known)
    strain = math.sqrt(sum((fraction - mean) ** 2 for fraction in known) / len(known))
    odd = "width" not in grid.fixed and sizes["width"] % grid.multiple("width") != 0
    return strain + (_ODD_WIDTH_STRAIN if odd else 0.0)


def _place(grid: Grid, depth: int, sizes: Mapping[str, int]) -> list[float]:
    """Compute how far along the way every dimension is; 0 where the anchors agree."""
    values = {**{dim: size for dim, size in sizes.items() if dim in FREE}, "layer": depth}
    return [grid.fraction(dim, value) or 0.0 for dim, value in values.items()]


def _is_positive(value: object) -> bool:
    """Check whether a value is a positive number; True is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def _nearest(options: Sequence[Candidate], wanted: float, tolerance: float) -> Candidate:
    """Choose the shape of least strain within the tolerance, on the staircase along the line if any is; else that of
    the nearest size."""

    def error(option: Candidate) -> float:
        return abs(option.num_parameters - wanted) / wanted

    within = [option for option in options if error(option) <= tolerance]
    if not within:
        return min(options, key=error)
    return min(within, key=lambda option: (not option.on_stair, option.strain, error(option)))


def _fields(upper: Architecture, option: Candidate) -> dict[str, int]:
    values = {**option.sizes, "layer": option.depth, "heads": option.sizes["group"] * option.sizes["query"]}
    return {field: values[dim] for field, dim in upper.family.shape_fields.items()}


def _check_pair(upper: Architecture, lower: Architecture) -> None:
    kinds = upper.config.model_type, lower.config.model_type
    shared = upper.sizes.keys() - set(FREE)
    different = sorted(dim for dim in shared if upper.sizes[dim] != lower.sizes.get(dim))
    if kinds[0] != kinds[1] or different or upper.tied != lower.tied:
        raise ValueError(
            f"The anchors do not belong to one chain: model types {kinds}, tied heads {(upper.tied, lower.tied)}, "
            f"different sizes of {different or 'nothing else'}. Only depth, width, FFN width and the numbers of heads "
            "and experts may differ."
        )


def _check_range(upper: Architecture, lower: Architecture, fields: Mapping[str, Any]) -> None:
    upper.resolve_sizes({field: upper.shape.get(field, 1) for field in fields})
    low, high = lower.shape, upper.shape
    for field, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{field} must be a positive integer, got {value!r}.")
        if not low[field] <= value <= high[field]:
            raise ValueError(
                f"{field}={value} is outside what lies between the two anchors, {low[field]} to {high[field]}. Choose "
                "a value in that range."
            )


def _check_size_range(upper: Architecture, lower: Architecture, wanted: float, tolerance: float) -> None:
    low, high = lower.num_parameters, upper.num_parameters
    if not low * (1 - tolerance) <= wanted <= high * (1 + tolerance):
        raise ValueError(
            f"num_parameters={wanted:,.0f} is outside what lies between the two anchors, {low:,} to {high:,}. Choose "
            "a size in that range (sizes above 1 are parameter counts: 138e6 is 138M)."
        )


def _impossible(grid: Grid, fields: Mapping[str, int]) -> str:
    """Explain why no shape has these fields; a width that the config class does not take has its own message."""
    upper, on_line = grid.upper, {}
    if "width" in grid.fixed and "heads" not in grid.fixed and "group" not in grid.fixed:
        on_line = next(iter(heads_for_width(grid, grid.fixed["width"])), {})
    values = {**on_line, "heads": on_line["group"] * on_line["query"]} if on_line else {}
    heads = {field: values[dim] for field, dim in upper.family.shape_fields.items() if dim in values}
    try:
        cut_architecture(upper, {**heads, **fields})
    except ValueError as error:
        return str(error)
    return (
        f"No shape between the two anchors has {dict(fields)}: heads come in whole key/value groups of "
        f"{upper.sizes['query']}. Widths on offer: {', '.join(str(width) for width in widths(grid))}. Choose other "
        "values or leave one of these fields out."
    )


def _too_far(
    upper: Architecture, options: Sequence[Candidate], wanted: float, tolerance: float, fields: Mapping[str, int]
) -> str:
    below = max((o for o in options if o.num_parameters <= wanted), key=lambda o: o.num_parameters, default=None)
    above = min((o for o in options if o.num_parameters > wanted), key=lambda o: o.num_parameters, default=None)
    sides = [f"{o.num_parameters:,} ({_fields(upper, o)})" for o in (below, above) if o is not None]
    given = f" with {dict(fields)}" if fields else ""
    depth = next(field for field, dim in upper.family.shape_fields.items() if dim == "layer")
    others = ""
    if upper.engine_pattern and not upper.off_pattern and depth not in fields:
        others = (
            f" Sizes have depths whose layers llama.cpp takes for what they are; others are made where config names "
            f"one ({{{depth!r}: ...}})."
        )
    return (
        f"No reachable size{given} is within tolerance={tolerance:g} of num_parameters={wanted:,.0f}. Nearest: "
        f"{' and '.join(sides)}. Choose one of these{',' if fields else ' or'} raise "
        f"tolerance{', or leave fields of config free' if fields else ''}.{others}"
    )
