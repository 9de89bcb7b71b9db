"""Named axes: a stored tensor seen through its atomic dimensions."""

import pytest
import torch

from cbd_trl.architectures.axes import from_dims, parse_axes, prefix, prefix_index, select, tensor_shape, to_dims

SIZES = {"group": 2, "query": 3, "dim": 4, "width": 5}
QUERY = parse_axes("group.query.dim width")


def test_parse_axes_splits_stored_axes_and_dimensions():
    assert QUERY == (("group", "query", "dim"), ("width",))
    assert tensor_shape(QUERY, SIZES) == (24, 5)


def test_dimensions_are_views_of_the_stored_order():
    stored = torch.arange(120).reshape(24, 5)
    array = to_dims(stored, QUERY, SIZES)
    assert array.shape == (2, 3, 4, 5)
    assert array[1, 2, 3, 4] == stored[1 * 12 + 2 * 4 + 3, 4]
    assert torch.equal(from_dims(array, QUERY), stored)


def test_wrong_shape_names_both_shapes_and_the_way_out():
    with pytest.raises(ValueError, match=r"shape \(24, 6\).*\(24, 5\).*load both from the same folder"):
        to_dims(torch.zeros(24, 6), QUERY, SIZES)


def test_select_moves_whole_groups():
    stored = torch.arange(120).reshape(24, 5)
    swapped = select(stored, QUERY, SIZES, {"group": torch.tensor([1, 0])})
    assert torch.equal(swapped, torch.cat([stored[12:], stored[:12]]))


def test_prefix_and_its_index_take_the_same_rows():
    stored = torch.arange(120).reshape(24, 5)
    new = {**SIZES, "group": 1, "query": 2, "width": 3}
    rows = prefix_index(QUERY[0], SIZES, new)
    assert rows.tolist() == list(range(8))
    assert torch.equal(prefix(stored, QUERY, SIZES, new), stored[rows][:, :3])


def test_prefix_of_queries_takes_some_of_every_group():
    rows = prefix_index(QUERY[0], SIZES, {**SIZES, "query": 1})
    assert rows.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
