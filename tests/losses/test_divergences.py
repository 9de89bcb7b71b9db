import math

import pytest
import torch
import torch.nn.functional as F

from cbd_trl.losses.divergences import DIVERGENCES, forward_kl, get_divergence, jsd, reverse_kl

NAMES = list(DIVERGENCES)
# Two tokens: probabilities 1/2 against 3/4.
STUDENT = torch.tensor([[0.0, 0.0]])
TEACHER = torch.tensor([[math.log(3.0), 0.0]])


def logits(seed: int, n: int = 7, v: int = 11, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_zero_when_equal_with_no_gradient(name: str, beta: float) -> None:
    student = logits(0).requires_grad_()
    value = DIVERGENCES[name](student, student.detach().clone(), 2.0, beta)
    assert value.shape == (7,) and value.dtype == torch.float32
    assert (value == 0).all()
    value.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6


def test_hand_computed_values() -> None:
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    mixture = (0.625, 0.375)
    middle = 0.5 * (0.75 * math.log(0.75 / mixture[0]) + 0.25 * math.log(0.25 / mixture[1]))
    middle += 0.5 * (0.5 * math.log(0.5 / mixture[0]) + 0.5 * math.log(0.5 / mixture[1]))
    assert forward_kl(STUDENT, TEACHER).item() == pytest.approx(forward, rel=1e-6)
    assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(reverse, rel=1e-6)
    assert jsd(STUDENT, TEACHER, beta=0.5).item() == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_scored_gives_an_empty_value_and_a_zero_gradient(name: str) -> None:
    student = logits(0)[:0].requires_grad_()
    value = DIVERGENCES[name](student, logits(1)[:0], 1.0, 0.5)
    assert value.shape == (0,)
    value.sum().backward()


def _naive(name: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: float) -> torch.Tensor:
    s, t = F.softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - q.log())).sum(-1)

    if name == "jsd":
        m = beta * t + (1 - beta) * s
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)
    else:
        value = kl(t, s) if name == "forward_kl" else kl(s, t)
    return value * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_naive_twin_agrees_in_value_and_gradient(name: str, temperature: float) -> None:
    ours, twin = logits(2).requires_grad_(), logits(2).double().requires_grad_()
    teacher = logits(3)
    value = DIVERGENCES[name](ours, teacher, temperature, 0.3)
    expected = _naive(name, twin, teacher.double(), temperature, 0.3)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


def test_beta_ends_are_forward_and_reverse_kl_as_in_trl() -> None:
    student, teacher = logits(4, scale=1.0), logits(5, scale=1.0)
    assert torch.equal(jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))
    torch.testing.assert_close(jsd(student, teacher, beta=1e-3) / 1e-3, forward_kl(student, teacher), rtol=0.1, atol=0)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-500.0, 500.0, 0.0]])
    for function in DIVERGENCES.values():
        value = function(student, teacher, 1.0, 0.3)
        assert torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(gradient).all()


def test_low_precision_is_computed_in_float32() -> None:
    student, teacher = logits(6).bfloat16(), logits(7).bfloat16()
    assert torch.equal(forward_kl(student, teacher), forward_kl(student.float(), teacher.float()))


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"Unknown divergence 'forwardkl': there are forward_kl, .*Did you mean"):
        get_divergence("forwardkl")
