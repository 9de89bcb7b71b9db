"""The largest shapes between two anchors that keep a limit, such as the memory of a device."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Sizes
from cbd_trl.shapes.budget import ParameterCount
from cbd_trl.shapes.depths import Blocks
from cbd_trl.shapes.solve import (
    Candidate,
    DepthRule,
    Grid,
    candidates,
    fields_of,
    grid_between,
    nearest_candidate,
)
from cbd_trl.shapes.spread import far_apart

# What share of a limit a model takes that has these layers of the upper anchor, and these sizes.
Share = Callable[[Sequence[int], Sizes], float]


def largest_shapes(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    share: Share,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> Iterator[tuple[dict[str, int], bool]]:
    """Yield the shapes between two anchors that keep a limit, the largest first, and whether each is on the line.

    On the line are the shapes that `solve_target` finds for their own number of parameters. What they take of a limit
    need not grow with it (a wider row may be whole blocks of a quantization), so every shape on offer is looked at.

    Args:
        upper, lower, block_map, tolerance, depth_rule, kept, costs: as of `solve_target`.
        share: of the limit, at most 1 where it is kept.
    """
    grid = grid_between(upper, lower, block_map, kept, {}, depth_rule, costs)
    offered = sorted(_every_candidate(grid), key=lambda option: option.size)
    on_stairs = [option.size for option in offered if option.on_stair]
    for option in reversed(offered):
        if share(grid.depths[option.depth], option.sizes) > 1:
            continue
        on_line = option.on_stair or not _any_within(on_stairs, option.size, tolerance)
        if on_line:
            own = nearest_candidate(list(candidates(grid, option.size, ParameterCount)), option.size, tolerance)
            on_line = (own.depth, own.sizes) == (option.depth, option.sizes)
        yield fields_of(upper, option), on_line


def spread_within(
    upper: Architecture,
    lower: Architecture,
    block_map: Blocks,
    first: Mapping[str, int],
    share: Share,
    count: int,
    tolerance: float = 0.03,
    depth_rule: DepthRule = "blocks",
    kept: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> list[dict[str, int]]:
    """List shapes that fill a limit: the one given, the largest, then others, each as far as can be from those before
    it (see `spread_targets`).

    Args:
        upper, lower, block_map, depth_rule, kept, costs: as of `solve_target`.
        first: the first of them, as config fields.
        share: of the limit, at most 1 where it is kept.
        count: the most shapes to list.
        tolerance: largest share of the limit that one of the others leaves.
    """
    grid = grid_between(upper, lower, block_map, kept, {}, depth_rule, costs)
    found: dict[tuple[int, ...], Candidate] = {}
    for option in sorted(_every_candidate(grid), key=lambda option: -option.sizes["ffn"]):
        where = (option.depth, *(length for dim, length in option.sizes.items() if dim != "ffn"))
        if where not in found and share(grid.depths[option.depth], option.sizes) <= 1:
            found[where] = option
    full = [one for one in found.values() if share(grid.depths[one.depth], one.sizes) >= 1 - tolerance]
    firsts = [dict(first), fields_of(upper, max(found.values(), key=lambda option: option.size))]
    return far_apart(grid, firsts if firsts[0] != firsts[1] else firsts[:1], full, count)


def _every_candidate(grid: Grid) -> Iterator[Candidate]:
    """Yield all shapes of a grid, with every FFN width on offer."""
    count, seen = ParameterCount(grid.upper), set()
    step, high = grid.multiple("ffn"), grid.upper.sizes["ffn"]
    for option in candidates(grid, None, ParameterCount):
        empty = {**option.sizes, "ffn": 0}
        where = (option.depth, *empty.values())
        if where in seen:
            continue
        seen.add(where)
        layers = grid.depths[option.depth]
        base = count(layers, empty)
        neuron = count(layers, {**empty, "ffn": 1}) - base
        for ffn in range(max(grid.low["ffn"], step), high + 1, step):
            yield Candidate(option.depth, {**empty, "ffn": ffn}, base + ffn * neuron, 0.0, option.on_stair)


def _any_within(ascending: Sequence[int], size: int, tolerance: float) -> bool:
    """Check whether a size is within the tolerance of another."""
    place = bisect.bisect_left(ascending, size * (1 - tolerance))
    return place < len(ascending) and ascending[place] <= size * (1 + tolerance)
