"""Solve for the config fields of a shape with a number of parameters. Nothing here reads a weight."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from cbd_trl.architectures import FREE, Architecture
from cbd_trl.shapes.budget import Budget, ParameterCount
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


def solve_anchor(upper: Architecture, size: float, budget: type[Budget] = ParameterCount) -> dict[str, int]:
    """Solve for the shape of an anchor of a given size: fewer layers down to half of those of `upper`, then narrower.

    Depths that leave the pattern of layers that engines have built in (`Architecture.fits`) are not on offer.

    Args:
        upper: architecture of the anchor above (or the source).
        size: above 1 a number of parameters, below 1 a ratio to that of `upper`.
        budget: what else the size is a number of.

    Returns:
        Config fields of the family.

    Raises:
        ValueError: the size is not a positive number, not smaller than `upper`, or smaller than anything that can be
            cut from it.
    """
    total = budget.of(upper)
    if not _is_positive(size) or size >= total or size == 1:
        raise ValueError(
            f"An anchor's size must be a number of {budget.unit} below the {total:,} of the anchor above, or a ratio "
            f"between 0 and 1, got {size!r}. List anchors from large to small."
        )
    wanted = size if size > 1 else size * total
    half = -(-upper.depth // 2)
    depths = [depth for depth in range(half, upper.depth) if keeps_pattern(depth, upper.depth, upper.fits)]
    # Of a model in whose pattern no depth fits, only the width is changed.
    half = min(depths, default=upper.depth)
    stacks = {depth: spaced_layers(upper.depth, depth, upper.fits) for depth in (*depths, half)}
    shallower = Grid(upper, upper.sizes, upper.depth, {depth: stacks[depth] for depth in depths}, {})
    by_depth = list(candidates(shallower, wanted, budget))
    if by_depth and min(option.size for option in by_depth) <= wanted:
        return fields_of(upper, min(by_depth, key=lambda option: abs(option.size - wanted)))
    narrow = {**upper.sizes, "width": 0, "ffn": 0, "group": 0}
    options = by_depth + [
        option
        for option in candidates(Grid(upper, narrow, upper.depth, {half: stacks[half]}, {}), wanted, budget)
        if option.size < total
    ]
    best = nearest_candidate(options, wanted, _ANCHOR_TOLERANCE) if options else None
    if best is None or abs(best.size - wanted) > _ANCHOR_TOLERANCE * wanted:
        smallest = min((option.size for option in options), default=total)
        raise ValueError(
            f"No anchor of about {wanted:,.0f} {budget.unit} can be cut from one of {total:,} ({upper.shape}): the "
            f"smallest has {smallest:,}{f', the nearest {best.size:,}' if best else ''}. Choose one of "
            "these, or give the anchor's config fields."
        )
    return fields_of(upper, best)


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
    size: float | None = None,
    config: Mapping[str, Any] | None = None,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    budget: type[Budget] = ParameterCount,
) -> dict[str, int]:
    """Solve for the shape of a target between two anchors: the fields given exactly, the others near the line.

    Args:
        upper, lower: architectures of the two anchors.
        block_map: for each lower layer the upper layers it stands for.
        size: size wanted, in the unit of `budget`; None: the fields that `config` leaves out go where those it gives
            are on the line.
        config: config fields to fix.
        tolerance: largest |size of the shape - size| / size.
        depth_rule: "blocks" for the depths that whole blocks give, "cut", "grown" or "any" for every depth between.
            Where engines tell layers apart by position (`Architecture.fits`), depths that would leave one elsewhere
            are made only if `config` has them, but for "any", which leaves the pattern to the caller.
        kept: for each lower layer the upper layer it was cut from; None: the last of its block.
        costs: as in `blocks_for_depth`; which layers a target has matters to its size where their tensors differ.
        budget: what size is meant: parameters, or FLOPs a token.

    Returns:
        All shape fields of the family.

    Raises:
        ValueError: nothing was requested, a field or size out of range, a shape that cannot be made, or none within
            `tolerance`; the message holds what is possible.
    """
    fields = dict(config or {})
    if size is None and not fields:
        raise ValueError(
            f"Nothing was requested: give {budget.name}, or config with fields such as " + ", ".join(upper.shape) + "."
        )
    if size is not None and not _is_positive(size):
        raise ValueError(f"{budget.name} must be a positive number, got {size!r}.")
    _check_pair(upper, lower)
    _check_range(upper, lower, fields)
    if size is not None:
        _check_size_range(upper, lower, size, tolerance, budget)
    grid = grid_between(upper, lower, block_map, kept, fields, depth_rule, costs)
    options = list(candidates(grid, size, budget))
    if not options:
        raise ValueError(_impossible(grid, fields))
    if size is None:
        return fields_of(upper, min(options, key=lambda option: option.strain))
    best = nearest_candidate(options, size, tolerance)
    if abs(best.size - size) > tolerance * size:
        raise ValueError(_too_far(upper, options, size, tolerance, fields, budget))
    return fields_of(upper, best)


def list_sizes(
    upper: Architecture, lower: Architecture, block_map: Blocks, kept: Sequence[int] | None = None
) -> dict[str, Any]:
    """List the shapes between two anchors, of the depths that whole blocks give.

    Returns:
        `num_parameters`: [smallest, largest]; `shape`: for every config field the values on offer, ascending.
    """
    _check_pair(upper, lower)
    grid = grid_between(upper, lower, block_map, kept, {}, "blocks")
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
        size: in the unit of the budget.
        strain: root mean square distance of its dimensions' fractions from their mean (0: on the line), at the FFN
            width that would give the requested size exactly; for the part of the size that no FFN width gives, more.
        on_stair: whether depth and width are a stair of the staircase along the line.
    """

    depth: int
    sizes: dict[str, int]
    size: int
    strain: float
    on_stair: bool


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


def grid_between(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    kept: Sequence[int] | None,
    fields: Mapping[str, int],
    depth_rule: DepthRule,
    costs: Sequence[float] | None = None,
) -> Grid:
    """Find what a target between two anchors may choose from; arguments as of `solve_target`."""
    check_blocks(block_map, lower.depth, upper.depth)
    fixed = {upper.family.shape_fields[field]: value for field, value in fields.items()}
    # A depth that is requested by name may leave the pattern that engines have built in.
    fits = anywhere if "layer" in fixed else upper.fits
    depths: Iterable[int] = range(lower.depth, upper.depth + 1)
    if depth_rule == "blocks":
        depths = reachable_depths(upper.depth, block_map, kept, fits)
    elif depth_rule == "cut":
        depths = [depth for depth in depths if keeps_pattern(depth, upper.depth, fits)]
    elif depth_rule == "grown" and "layer" not in fixed:
        depths = [depth for depth in depths if keeps_pattern(lower.depth, depth, lambda i, j: lower.fits(j, i))]
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


def keeps_pattern(kept: int, total: int, fits: Fits) -> bool:
    """Check whether so many layers can be chosen that each comes to stand where it belongs."""
    return fitting_layers(spaced_layers(total, kept), total, fits) is not None


def candidates(grid: Grid, size: float | None, budget: type[Budget]) -> Iterator[Candidate]:
    """Yield all shapes of the grid; where the FFN width is free, those nearest to the size (None: to the line)."""
    count = budget(grid.upper)
    choices = list(_widths_and_heads(grid))
    stairs = _stairs(grid, sorted({sizes["width"] for sizes in choices}))
    for sizes in choices:
        empty = {**sizes, "ffn": 0}
        outer = count.outer(empty)
        for depth, layers in grid.depths.items():
            stack = count.stack(empty, layers)
            neurons = count.stack({**sizes, "ffn": 1}, layers) - stack
            if size is None:
                wanted = _ffn_on_line(grid, depth, sizes)
            else:
                wanted = (size - outer - stack) / neurons
            # Measured before rounding to an FFN width on offer, or neighboring stairs would take turns.
            dial = _ffn_in_range(grid, wanted)
            strain = _strain(grid, depth, {**sizes, "ffn": dial})
            if size is not None:
                missed = outer + stack + dial * neurons - size
                strain += _STRAIN_OF_SIZE * abs(missed) / size
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


def place(grid: Grid, depth: int, sizes: Mapping[str, int]) -> list[float]:
    """Compute how far along the way every dimension is; 0 where the anchors agree."""
    values = {**{dim: size for dim, size in sizes.items() if dim in FREE}, "layer": depth}
    return [grid.fraction(dim, value) or 0.0 for dim, value in values.items()]


def _is_positive(value: object) -> bool:
    """Check whether a value is a positive number; True is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def nearest_candidate(options: Sequence[Candidate], wanted: float, tolerance: float) -> Candidate:
    """Choose the shape of least strain within the tolerance, on the staircase along the line if any is; else that of
    the nearest size."""

    def error(option: Candidate) -> float:
        return abs(option.size - wanted) / wanted

    within = [option for option in options if error(option) <= tolerance]
    if not within:
        return min(options, key=error)
    return min(within, key=lambda option: (not option.on_stair, option.strain, error(option)))


def fields_of(upper: Architecture, option: Candidate) -> dict[str, int]:
    """List the config fields of a shape on offer."""
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


def _check_size_range(
    upper: Architecture, lower: Architecture, wanted: float, tolerance: float, budget: type[Budget]
) -> None:
    low, high = budget.of(lower), budget.of(upper)
    if not low * (1 - tolerance) <= wanted <= high * (1 + tolerance):
        raise ValueError(
            f"{budget.name}={wanted:,.0f} is outside what lies between the two anchors, {low:,} to {high:,}. Choose "
            f"a size in that range (sizes above 1 are {budget.unit}: 138e6 is 138M)."
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
    upper: Architecture,
    options: Sequence[Candidate],
    wanted: float,
    tolerance: float,
    fields: Mapping[str, int],
    budget: type[Budget],
) -> str:
    below = max((o for o in options if o.size <= wanted), key=lambda o: o.size, default=None)
    above = min((o for o in options if o.size > wanted), key=lambda o: o.size, default=None)
    sides = [f"{o.size:,} ({fields_of(upper, o)})" for o in (below, above) if o is not None]
    given = f" with {dict(fields)}" if fields else ""
    depth = next(field for field, dim in upper.family.shape_fields.items() if dim == "layer")
    others = ""
    if upper.engine_pattern and not upper.off_pattern and depth not in fields:
        others = (
            f" Sizes have depths whose layers llama.cpp takes for what they are; others are made where config names "
            f"one ({{{depth!r}: ...}})."
        )
    return (
        f"No reachable size{given} is within tolerance={tolerance:g} of {budget.name}={wanted:,.0f}. Nearest: "
        f"{' and '.join(sides)}. Choose one of these{',' if fields else ' or'} raise "
        f"tolerance{', or leave fields of config free' if fields else ''}.{others}"
    )
