"""Find the depths between two anchors, and the blocks of the upper anchor that give one.

Where an engine takes a layer's kind from its position (`Architecture.fits`), the depths and blocks on offer are those
that leave every layer where it belongs.
"""

from collections.abc import Iterator, Sequence

from cbd_trl.surgery.blocks import Fits, anywhere, check_blocks

Blocks = Sequence[Sequence[int]]


def reachable_depths(
    upper_depth: int, block_map: Blocks, kept: Sequence[int] | None = None, fits: Fits = anywhere
) -> list[int]:
    """List the depths that replacing whole blocks of the lower anchor by their upper layers can give, ascending.

    Args:
        upper_depth: layers of the upper anchor.
        block_map: for each lower layer the upper layers it stands for.
        kept: for each lower layer the upper layer it was cut from; None: the last of its block.
        fits: which upper layer may stand at which position; both anchors' own depths are on offer whatever it returns.

    Raises:
        ValueError: the block map does not split the upper layers.
    """
    check_blocks(block_map, len(block_map), upper_depth)
    return sorted({len(block_map), upper_depth} | _Stacks(block_map, kept, fits).depths[-1])


def blocks_for_depth(
    block_map: Blocks,
    depth: int,
    costs: Sequence[float] | None = None,
    kept: Sequence[int] | None = None,
    fits: Fits = anywhere,
) -> set[int]:
    """Choose the blocks to replace for a depth: those that cost the most, or, where costs are unknown, the last ones.

    Args:
        block_map: for each lower layer the upper layers it stands for.
        depth: wanted.
        costs: for each lower layer what it costs that it stands for them (`Block.cost`).
        kept, fits: as in `reachable_depths`; sets of blocks that leave a layer where it does not fit are taken only
            where all do.

    Returns:
        indices of lower layers. With costs, of all sets that give the depth the one with the greatest sum; without,
        the last blocks or, where these do not add up, the latest that do, and with them the blocks of one layer after
        the first.

    Raises:
        ValueError: no set of blocks gives this depth.
    """
    count = len(block_map)
    if depth == count:
        return set()
    if depth == sum(map(len, block_map)):
        return set(range(count))
    stacks = _Stacks(block_map, kept, fits)
    if depth not in stacks.depths[-1]:
        stacks = _Stacks(block_map, kept, anywhere)
    if depth not in stacks.depths[-1]:
        reachable = ", ".join(str(one) for one in sorted(stacks.depths[-1]))
        raise ValueError(f"No set of whole blocks gives {depth} layers. Depths that blocks can give: {reachable}.")
    if costs is not None:
        return stacks.costliest(depth, costs)
    swapped, position = set(), depth
    for i in reversed(range(count)):
        more = len(block_map[i])
        if more > 1 and stacks.may_swap(i, position - more) and position - more in stacks.depths[i]:
            swapped.add(i)
            position -= more
        else:
            position -= 1
    first = min(swapped, default=count)
    return swapped | {i for i in range(first, count) if len(block_map[i]) == 1}


class _Stacks:
    """The ways through the blocks, keeping the lower layer of each or taking its upper layers.

    Args:
        blocks, kept, fits: as in `reachable_depths`.
    """

    def __init__(self, blocks: Blocks, kept: Sequence[int] | None, fits: Fits) -> None:
        self._blocks, self._fits = blocks, fits
        self._kept = [block[-1] for block in blocks] if kept is None else kept
        # Entry i: the numbers of layers that the first i blocks can give.
        self.depths: list[set[int]] = [{0}]
        for i in range(len(blocks)):
            before = self.depths[-1]
            self.depths.append({start + more for start in before for more in self._lengths(i, start)})

    def may_swap(self, i: int, start: int) -> bool:
        """Check whether the upper layers of block i may stand at positions from `start` on."""
        return all(self._fits(layer, start + n) for n, layer in enumerate(self._blocks[i]))

    def _lengths(self, i: int, start: int) -> Iterator[int]:
        """Yield how many layers block i can give from position `start` on: that of the lower anchor first."""
        if self._fits(self._kept[i], start):
            yield 1
        if len(self._blocks[i]) > 1 and self.may_swap(i, start):
            yield len(self._blocks[i])

    def costliest(self, depth: int, costs: Sequence[float]) -> set[int]:
        """Find the set of blocks with the greatest sum of costs, of those that give the depth."""
        best: dict[int, tuple[float, set[int]]] = {0: (0.0, set())}
        for i in range(len(self._blocks)):
            found: dict[int, tuple[float, set[int]]] = {}
            for start, (cost, chosen) in best.items():
                for more in self._lengths(i, start):
                    way = (cost, chosen) if more == 1 else (cost + costs[i], chosen | {i})
                    if start + more not in found or way[0] > found[start + more][0]:
                        found[start + more] = way
            best = found
        return best[depth][1]
