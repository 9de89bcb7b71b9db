"""Shapes that keep a limit, in families whose layers differ in their tensors, their windows or their experts."""

import pytest

from cbd_trl.shapes.largest import largest_shapes, spread_within
from cbd_trl.shapes.solve import solve_target
from cbd_trl.shapes.storage import Memory
from tests.shapes.test_solve import anchors, target_of

CONTEXT = 5000


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gemma3_text", "qwen3_5_text", "lfm2"])
@pytest.mark.parametrize("what", ["depth", "both"])
def test_shapes_that_keep_a_limit(family, what):
    """What they take as cuts of the upper anchor is what they take as models; those on the line are those that a
    request for their size gives; the largest come first."""
    upper, lower, blocks = anchors(family, what)
    memory = Memory(upper, "q4_k_m", CONTEXT)
    limit = (sum(Memory.of(upper, "q4_k_m", CONTEXT)) + sum(Memory.of(lower, "q4_k_m", CONTEXT))) // 2

    def share(layers, sizes):
        return memory(layers, sizes) / limit

    found = []
    for fields, on_line in largest_shapes(upper, lower, blocks, share):
        found.append((target_of(upper, fields, blocks), on_line))
        if on_line:
            break
    sizes = [one.num_parameters for one, _ in found]
    assert sizes == sorted(sizes, reverse=True)
    for one, on_line in (*found[:5], found[-1]):
        assert sum(Memory.of(one, "q4_k_m", CONTEXT)) <= limit
        assert on_line == (solve_target(upper, lower, blocks, one.num_parameters) == one.shape)
    line, on_line = found[-1]
    assert on_line
    spread = [target_of(upper, fields, blocks) for fields in spread_within(upper, lower, blocks, line.shape, share, 6)]
    assert [one.shape for one in spread[:1]] == [line.shape]
    assert max(one.num_parameters for one in spread) == sizes[0]
    assert all(sum(Memory.of(one, "q4_k_m", CONTEXT)) <= limit for one in spread)
