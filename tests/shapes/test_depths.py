"""Which depths lie between two anchors, and which blocks give one."""

import itertools

import pytest
import torch

from cbd_trl.shapes.depths import blocks_for_depth, reachable_depths
from cbd_trl.surgery.blocks import blocks_of


@pytest.mark.parametrize(
    ("kept", "depths"), [([0, 2, 4, 6, 8, 10, 11], [7, 8, 9, 10, 11, 12]), ([2, 5, 8, 11], [4, 6, 8, 10, 12])]
)
def test_reachable_depths(kept, depths):
    assert reachable_depths(12, blocks_of(kept)) == depths


def test_block_map_that_does_not_split_the_layers_is_refused():
    with pytest.raises(ValueError, match=r"\b12 layers"):
        reachable_depths(12, [[0, 1], [3]])


def test_last_blocks_are_swapped_first():
    blocks = blocks_of([0, 2, 4, 6, 8, 10, 11])
    assert blocks_for_depth(blocks, 7) == set()
    # The last block has one layer: it goes with the others.
    assert blocks_for_depth(blocks, 8) == {5, 6}
    assert blocks_for_depth(blocks, 10) == {3, 4, 5, 6}
    assert blocks_for_depth(blocks, 12) == set(range(7))


def test_nothing_is_swapped_where_only_width_differs():
    assert blocks_for_depth([[i] for i in range(12)], 12) == set()


def test_where_the_last_blocks_do_not_add_up_the_latest_that_do():
    blocks = [[0, 1], [2], [3, 4], [5, 6, 7], [8, 9, 10]]
    # 6 = 5 + 1 layers: the last two blocks add 2 each, so block 2 is the latest that fits.
    assert blocks_for_depth(blocks, 6) == {2}
    assert blocks_for_depth(blocks, 8) == {2, 4}
    assert blocks_for_depth(blocks, 7) == {4}
    assert blocks_for_depth(blocks, 10) == {2, 3, 4}
    with pytest.raises(ValueError, match=r"\b12 layers.* 5, 6, 7"):
        blocks_for_depth(blocks, 12)


def test_the_costliest_blocks_are_swapped_first():
    blocks = [[0], [1, 2], [3, 4], [5, 6], [7]]
    costs = [0.0, 0.2, 0.5, 0.1, 0.0]
    swaps = [blocks_for_depth(blocks, depth, costs) for depth in range(5, 9)]
    # Blocks of one layer stay the lower anchor's until everything is the upper one's.
    assert swaps == [set(), {2}, {1, 2}, {0, 1, 2, 3, 4}]


def test_of_all_sets_that_give_the_depth_the_one_that_costs_most():
    """Against every set, for blocks of one to four layers."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 1, 4, 3, 2, 1, 3, 2]
    ends = list(itertools.accumulate(lengths))
    blocks = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    costs = (torch.rand(8, generator=generator) * (torch.tensor(lengths) > 1)).tolist()
    for depth in range(9, sum(lengths)):
        chosen = blocks_for_depth(blocks, depth, costs)
        assert sum(lengths[i] if i in chosen else 1 for i in range(8)) == depth
        sets = [s for n in range(9) for s in itertools.combinations(range(8), n)]
        fitting = [s for s in sets if sum(lengths[i] if i in s else 1 for i in range(8)) == depth]
        assert sum(costs[i] for i in chosen) == pytest.approx(max(sum(costs[i] for i in s) for s in fitting))
