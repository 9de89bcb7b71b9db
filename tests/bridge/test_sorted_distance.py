"""ULD by hand, and its cut to the most likely tokens."""

import pytest
import torch

from cbd_trl.bridge.objectives.registry import get_objective
from cbd_trl.bridge.objectives.sorted_distance import SortedDistance, sorted_distance
from tests.bridge.objective_helpers import naive_distance, randn


def test_hand_computed_values() -> None:
    student = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    teacher = torch.tensor([[0.2, 0.0, 0.7, 0.1], [0.5, 0.0, 0.3, 0.2]])
    torch.testing.assert_close(sorted_distance(student, teacher), torch.tensor([0.2, 0.0]))
    # 0.6 against 0.7 and 0.4 against 0.3.
    torch.testing.assert_close(sorted_distance(student, teacher, 1), torch.tensor([0.2, 0.0]))
    teacher = torch.tensor([[0.45, 0.45, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(sorted_distance(student, teacher), torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(sorted_distance(student, teacher, 2), torch.tensor([0.3, 1.0]))


@pytest.mark.parametrize("rows", [(9, 14), (14, 9), (9, 9)])
def test_the_cut_is_never_more_and_exact_where_it_keeps_all(rows: tuple[int, int]) -> None:
    leaf = randn(6, rows[0], seed=0, scale=2.0).requires_grad_()
    student, teacher = leaf.softmax(-1), randn(6, rows[1], seed=1, scale=2.0).softmax(-1)
    whole = sorted_distance(student, teacher)
    (gradient,) = torch.autograd.grad(whole.sum(), leaf, retain_graph=True)
    for row, value in enumerate(whole):
        assert value.item() == pytest.approx(naive_distance(list(student[row]), list(teacher[row])).item(), rel=1e-5)
    for k in (1, 3, 9, 13):
        assert (sorted_distance(student, teacher, k) <= whole + 1e-6).all()
    assert (sorted_distance(student, teacher, 3) < whole - 1e-3).any()
    for k in (max(rows), max(rows) + 5):
        cut = sorted_distance(student, teacher, k)
        assert torch.equal(cut, whole)
        assert torch.equal(torch.autograd.grad(cut.sum(), leaf, retain_graph=True)[0], gradient)


def test_nothing_left_to_compare() -> None:
    nothing = torch.zeros(3, 0)
    assert torch.equal(sorted_distance(nothing, nothing), torch.zeros(3))
    torch.testing.assert_close(sorted_distance(nothing, torch.full((3, 2), 0.2), 1), torch.full((3,), 0.4))


def test_options_reach_the_objective() -> None:
    assert get_objective("uld", temperature=2.0, top_k=7) == SortedDistance(7, 2.0)
    assert get_objective("uld") == SortedDistance(None, 1.0)
