"""Depths between two anchors: which there are, and which blocks of the upper anchor give one."""

from collections.abc import Sequence

from cbd_trl.surgery.blocks import check_blocks

Blocks = Sequence[Sequence[int]]


def reachable_depths(upper_depth: int, block_map: Blocks) -> list[int]:
    """Depths that replacing whole blocks of the lower anchor by their upper layers can give, ascending.

    Raises:
        ValueError: the block map does not split the upper layers.
    """
    check_blocks(block_map, len(block_map), upper_depth)
    extra = _sums(block_map)[-1]
    return sorted(len(block_map) + more for more in extra)


def blocks_for_depth(block_map: Blocks, depth: int, costs: Sequence[float] | None = None) -> set[int]:
    """Which blocks to replace for a depth: those that cost the most, or, where costs are unknown, the last ones.

    Args:
        block_map: for each lower layer the upper layers it stands for.
        depth: wanted.
        costs: for each lower layer what it costs that it stands for them (`Block.cost`).

    Returns:
        indices of lower layers. With costs, of all sets that give the depth the one with the greatest sum; without,
        the last blocks or, where these do not add up, the latest that do, and with them the blocks of one layer after
        the first.

    Raises:
        ValueError: no set of blocks gives this depth.
    """
    sums = _sums(block_map)
    missing = depth - len(block_map)
    if missing not in sums[-1]:
        reachable = ", ".join(str(len(block_map) + more) for more in sorted(sums[-1]))
        raise ValueError(f"No set of whole blocks gives {depth} layers. Depths that blocks can give: {reachable}.")
    if missing == 0:
        return set()
    if missing == max(sums[-1]):
        return set(range(len(block_map)))
    if costs is not None:
        return _costliest(block_map, missing, costs)
    swapped = set()
    for i in reversed(range(len(block_map))):
        more = len(block_map[i]) - 1
        if more and missing - more in sums[i]:
            swapped.add(i)
            missing -= more
    first = min(swapped, default=len(block_map))
    return swapped | {i for i in range(first, len(block_map)) if len(block_map[i]) == 1}


def _costliest(block_map: Blocks, missing: int, costs: Sequence[float]) -> set[int]:
    """Of all sets of blocks that add `missing` layers the one with the greatest sum of costs."""
    best: dict[int, tuple[float, set[int]]] = {0: (0.0, set())}
    for i, block in enumerate(block_map):
        more = len(block) - 1
        if not more:
            continue
        for total, (cost, chosen) in sorted(best.items(), reverse=True):
            if total + more not in best or cost + costs[i] > best[total + more][0]:
                best[total + more] = (cost + costs[i], chosen | {i})
    return best[missing][1]


def _sums(block_map: Blocks) -> list[set[int]]:
    """Entry i: the numbers of layers that replacing some of the first i blocks can add."""
    sums = [{0}]
    for block in block_map:
        sums.append(sums[-1] | {total + len(block) - 1 for total in sums[-1]})
    return sums
