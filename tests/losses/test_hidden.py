import pytest
import torch

from cbd_trl.losses.hidden import cosine_distance, mean_cosine_distance


def states(seed: int, n: int = 5, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_exactly_zero_when_equal() -> None:
    assert (cosine_distance(states(0), states(0)) == 0).all()


def test_hand_computed_value() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    teacher = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    expected = torch.tensor([1.0, 1.0 - 0.5**0.5, 2.0])
    torch.testing.assert_close(cosine_distance(student, teacher), expected)


def test_nothing_scored_gives_an_empty_value_and_a_gradient() -> None:
    student = states(0)[:0].requires_grad_()
    value = cosine_distance(student, states(1)[:0])
    assert value.shape == (0,)
    value.sum().backward()


def test_naive_twin_agrees_in_value_and_gradient_on_the_shared_prefix() -> None:
    ours, twin = states(0).requires_grad_(), states(0).requires_grad_()
    teacher = states(1, d=12)
    value = cosine_distance(ours, teacher)
    expected = 1 - torch.nn.functional.cosine_similarity(twin, teacher[:, :8], dim=-1)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)


def test_mean_over_layers() -> None:
    pairs = [(states(i), states(i + 10)) for i in range(3)]
    expected = sum(cosine_distance(*pair) for pair in pairs) / 3
    torch.testing.assert_close(mean_cosine_distance(pairs), expected)
    with pytest.raises(ValueError, match="No layer to compare"):
        mean_cosine_distance([])


def test_a_narrower_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"have 8 channels and the teacher's 4: .*set hidden_weight=0"):
        cosine_distance(states(0), states(1, d=4))
