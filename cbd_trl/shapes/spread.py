"""Several shapes of one size, as different from each other as they can be: what a search of shapes compares."""

import math
from collections.abc import Iterable, Mapping, Sequence

from cbd_trl.architectures import Architecture
from cbd_trl.shapes.budget import Budget, ParameterCount
from cbd_trl.shapes.depths import Blocks
from cbd_trl.shapes.solve import (
    Candidate,
    DepthRule,
    Grid,
    candidates,
    fields_of,
    grid_between,
    keeps_pattern,
    nearest_candidate,
    place,
    solve_anchor,
    solve_target,
)
from cbd_trl.surgery.blocks import spaced_layers


def spread_targets(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    size: float,
    count: int,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    budget: type[Budget] = ParameterCount,
) -> list[dict[str, int]]:
    """List shapes of one size between two anchors: that of `solve_target`, then others, each as far as can be from
    those before it.

    Of every depth and width (and heads and experts that go with it) the FFN width is taken that comes nearest to the
    size; far is meant in fractions of the way from the lower to the upper anchor.

    Args:
        upper, lower, block_map, size, tolerance, depth_rule, kept, costs, budget: as of `solve_target`.
        count: the most shapes to list.

    Returns:
        All shape fields of the family, for 1 to `count` shapes.

    Raises:
        ValueError: as `solve_target`.
    """
    line = solve_target(upper, lower, block_map, size, None, tolerance, depth_rule, kept, costs, budget)
    grid = grid_between(upper, lower, block_map, kept, {}, depth_rule, costs)
    options = _of_size(candidates(grid, size, budget), size, tolerance)
    return far_apart(grid, [line], options, count)


def spread_anchors(
    upper: Architecture, size: float, count: int, tolerance: float = 0.03, budget: type[Budget] = ParameterCount
) -> list[dict[str, int]]:
    """List shapes of one size that an anchor may have: that of `solve_anchor`, the one whose dimensions are cut most
    alike, then others, each as far as can be from those before it.

    No dimension is cut to less of it than the size is of the whole, experts are not cut, and depths keep the pattern
    of layers that engines have built in, as in `solve_anchor`. Heads, stream and depth are chosen freely, and the FFN
    width that comes nearest to the size. Far is meant in fractions of what each dimension may lose.

    Args:
        upper: architecture of the anchor above (or the source).
        size: in the unit of `budget` above 1, below it a ratio to that of `upper`.
        count: the most shapes to list.
        tolerance: largest |size of the shape - size| / size, but for the first.
        budget: what size is meant.

    Returns:
        All shape fields of the family, for 1 to `count` shapes.

    Raises:
        ValueError: as `solve_anchor`.
    """
    first = solve_anchor(upper, size, budget)
    whole = budget.of(upper)
    wanted = size if size > 1 else size * whole
    share, had = wanted / whole, upper.sizes
    steps = {dim: math.gcd(8, had[dim]) for dim in ("width", "ffn")}
    low = {**had, **{dim: math.ceil(share * had[dim] / step) * step for dim, step in steps.items()}}
    low["group"] = math.ceil(share * had["group"])
    low_depth = math.ceil(share * upper.depth)
    stacks = {
        depth: spaced_layers(upper.depth, depth, upper.fits)
        for depth in range(low_depth, upper.depth + 1)
        if keeps_pattern(depth, upper.depth, upper.fits)
    }
    # On the line of a grid from nothing to the whole every dimension keeps the same share.
    nothing = Grid(upper, {**had, "width": 0, "ffn": 0, "group": 0}, 0, stacks, {})
    alike = [option for option in candidates(nothing, wanted, budget) if option.size < whole]
    grids = [Grid(upper, low, low_depth, stacks, {"group": group}) for group in range(low["group"], had["group"] + 1)]
    found = [option for grid in grids for option in candidates(grid, wanted, budget)]
    # Widths that kernels like, even where the family takes others.
    found = [option for option in found if option.sizes["width"] % steps["width"] == 0 and option.size < whole]
    firsts = [first]
    if alike and (diagonal := fields_of(upper, nearest_candidate(alike, wanted, tolerance))) != first:
        firsts.append(diagonal)
    box = Grid(upper, low, low_depth, stacks, {})
    return far_apart(box, firsts, _of_size(found, wanted, tolerance), count)


def _of_size(options: Iterable[Candidate], size: float, tolerance: float) -> list[Candidate]:
    """Keep of every depth and width, with its heads and experts, the FFN width nearest to the size, if it is near."""
    nearest: dict[tuple[int, ...], Candidate] = {}
    for option in options:
        where = (option.depth, *(length for dim, length in option.sizes.items() if dim != "ffn"))
        best = nearest.get(where, option)
        nearest[where] = min(best, option, key=lambda one: abs(one.size - size))
    return [option for option in nearest.values() if abs(option.size - size) <= tolerance * size]


def far_apart(
    grid: Grid, first: Sequence[Mapping[str, int]], options: Sequence[Candidate], count: int
) -> list[dict[str, int]]:
    """Choose up to `count` shapes: the first ones, then the option that is furthest from all that are chosen.

    Args:
        grid: in whose fractions distances are measured.
        first: shapes that are chosen whatever the distances, as config fields.
        options: the others on offer.
        count: of all.
    """
    upper = grid.upper
    found = [dict(fields) for fields in first[:count]]
    starts = [place(grid, *upper.resolve_sizes(fields)) for fields in found]
    places = [place(grid, option.depth, option.sizes) for option in options]
    distances = [min(math.dist(start, one) for start in starts) for one in places]
    while len(found) < count and max(distances, default=0.0) > 0:
        furthest = distances.index(max(distances))
        if (shape := fields_of(upper, options[furthest])) not in found:
            found.append(shape)
        distances = [min(had, math.dist(places[furthest], one)) for had, one in zip(distances, places, strict=True)]
    return found
