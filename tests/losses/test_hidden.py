import pytest
import torch

from cbd_trl.losses.hidden import (
    HIDDEN_LOSSES,
    cosine_distance,
    get_hidden_loss,
    mean_hidden_distance,
    normalized_mse,
)

NAMES = list(HIDDEN_LOSSES)


def states(seed: int, n: int = 5, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def naive(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    rows = []
    for ours, theirs in zip(student, teacher[:, : student.shape[1]], strict=True):
        if name == "cosine":
            rows.append(1 - ours @ theirs / (ours.norm() * theirs.norm()))
        else:
            rows.append(sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / sum(b * b for b in theirs))
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_zero_when_equal_with_no_gradient(name: str) -> None:
    student = states(0).requires_grad_()
    value = HIDDEN_LOSSES[name](student, states(0, d=8))
    assert value.shape == (5,) and value.dtype == torch.float32
    assert (value == 0).all()
    value.sum().backward()
    assert student.grad is not None and (student.grad == 0).all()


def test_hand_computed_values() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    teacher = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    expected = torch.tensor([1.0, 1.0 - 0.5**0.5, 2.0])
    torch.testing.assert_close(cosine_distance(student, teacher), expected)
    torch.testing.assert_close(normalized_mse(student, teacher), torch.tensor([10 / 9, 1.0, 9.0]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_scored_gives_an_empty_value_and_a_gradient(name: str) -> None:
    student = states(0)[:0].requires_grad_()
    value = HIDDEN_LOSSES[name](student, states(1)[:0])
    assert value.shape == (0,)
    value.sum().backward()


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("name", NAMES)
def test_naive_twin_agrees_in_value_and_gradient_on_the_shared_prefix(name: str, width: int) -> None:
    ours, twin = states(0).requires_grad_(), states(0).requires_grad_()
    teacher = states(1, d=width)
    value, expected = HIDDEN_LOSSES[name](ours, teacher), naive(name, twin, teacher)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_channels_behind_the_prefix_do_not_count(name: str) -> None:
    student, teacher, other = states(0), states(1, d=12), states(2, d=12)
    other[:, :8] = teacher[:, :8]
    assert torch.equal(HIDDEN_LOSSES[name](student, teacher), HIDDEN_LOSSES[name](student, other))


def test_mse_sees_the_size_of_a_state_and_the_cosine_does_not() -> None:
    teacher = states(1)
    torch.testing.assert_close(cosine_distance(3 * teacher, teacher), torch.zeros(5))
    torch.testing.assert_close(normalized_mse(3 * teacher, teacher), torch.full((5,), 4.0))


def test_mse_is_one_for_a_student_of_zeros_however_large_the_teacher() -> None:
    teacher = states(1) * torch.tensor([[1e-2], [1.0], [1e2], [1e4], [1e-1]])
    torch.testing.assert_close(normalized_mse(torch.zeros(5, 8), teacher), torch.ones(5))


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_state_of_zeros_gives_a_finite_value_and_gradient(name: str) -> None:
    student = states(0).requires_grad_()
    value = HIDDEN_LOSSES[name](student, torch.zeros(5, 8))
    value.sum().backward()
    assert student.grad is not None and value.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_states_are_compared_in_float32(name: str) -> None:
    student, teacher = states(0).bfloat16(), states(1).bfloat16()
    value = HIDDEN_LOSSES[name](student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, HIDDEN_LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", NAMES)
def test_mean_over_layers(name: str) -> None:
    pairs = [(states(i), states(i + 10)) for i in range(3)]
    expected = sum(HIDDEN_LOSSES[name](*pair) for pair in pairs) / 3
    torch.testing.assert_close(mean_hidden_distance(pairs, name), expected)
    with pytest.raises(ValueError, match="No layer to compare"):
        mean_hidden_distance([], name)


def test_the_cosine_is_the_default_of_the_mean() -> None:
    pairs = [(states(0), states(1))]
    assert torch.equal(mean_hidden_distance(pairs), mean_hidden_distance(pairs, "cosine"))


@pytest.mark.parametrize("name", NAMES)
def test_a_narrower_teacher_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"have 8 channels and the teacher's 4: .*set hidden_weight=0"):
        HIDDEN_LOSSES[name](states(0), states(1, d=4))


def test_an_unknown_loss_is_refused() -> None:
    assert get_hidden_loss("mse") is normalized_mse
    with pytest.raises(
        ValueError, match=r"Unknown hidden loss 'cosin': there are cosine, mse\. Did you mean 'cosine'"
    ):
        get_hidden_loss("cosin")
