"""Chunk likelihood by hand and at the ends of its range."""

import math

import pytest
import torch
from torch import Tensor

from cbd_trl.bridge.objectives.chunk_likelihood import ChunkLikelihood, chunk_likelihood
from cbd_trl.bridge.objectives.registry import get_objective
from cbd_trl.losses.divergence_table import DIVERGENCES
from cbd_trl.losses.divergences import get_divergence

KL = get_divergence("forward_kl")
STUDENT, TEACHER = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def test_hand_computed_values() -> None:
    # One chunk of two tokens at 1/2 each, and of one at 3/4.
    kl = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert chunk_likelihood(logs(0.25), logs(0.75), KL, 1.0).item() == pytest.approx(kl, rel=1e-5)
    # The square roots: 1/2 and 1/10.
    kl = 2 * (0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9))
    assert chunk_likelihood(logs(0.01), logs(0.25), KL, 2.0).item() == pytest.approx(kl, rel=1e-5)
    variation = get_divergence("total_variation")
    assert chunk_likelihood(logs(0.25), logs(0.75), variation, 1.0).item() == pytest.approx(0.5, rel=1e-5)


def test_a_high_temperature_compares_rates_of_surprise() -> None:
    student, teacher = torch.tensor([-0.3, -4.0, -30.0]), torch.tensor([-1.0, -2.0, -29.0])
    r, q = -teacher, -student
    torch.testing.assert_close(
        chunk_likelihood(student, teacher, KL, 1e4), r * (r / q).log() - r + q, rtol=2e-2, atol=1e-3
    )


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_float32_is_enough_in_value_and_gradient(temperature: float) -> None:
    chunks = torch.tensor([-1e-3, -0.05, -0.7, -3.0, -12.0, -60.0])
    student, teacher = chunks.repeat_interleave(6).requires_grad_(), chunks.repeat(6)
    exact = student.detach().double().requires_grad_()
    p, q = (teacher.double() / temperature).exp(), (exact / temperature).exp()
    value = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) * temperature
    found = chunk_likelihood(student, teacher, KL, temperature)
    torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-5)
    (slope,), (expected,) = torch.autograd.grad(found.sum(), student), torch.autograd.grad(value.sum(), exact)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_when_equal_and_finite_at_both_ends(name: str, temperature: float) -> None:
    ends = torch.tensor([0.0, -1e-8, -1e-5, -0.7, -40.0, -900.0, -math.inf])
    student, teacher = ends.repeat_interleave(7).requires_grad_(), ends.repeat(7)
    divergence = get_divergence(name)
    value = chunk_likelihood(student, teacher, divergence, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and (value >= 0).all() and gradient.isfinite().all()
    equal = chunk_likelihood(student, student.detach().clone(), divergence, temperature)
    (gradient,) = torch.autograd.grad(equal.sum(), student)
    assert (equal == 0).all()
    moderate = (student <= -1e-5) & student.isfinite()
    assert gradient[moderate].abs().max() < 1e-2


def test_a_student_that_is_too_sure_is_still_corrected() -> None:
    # In float32 the probability is 1, and yet the others' logits must rise.
    logits = torch.tensor([[25.0, 0.0, 0.0]], requires_grad=True)
    value = chunk_likelihood(logits.log_softmax(-1)[:, 0], logs(0.5), KL, 1.0)
    value.sum().backward()
    assert logits.grad is not None and (logits.grad[0, 1:] < 0).all() and logits.grad.abs().max() < 1.0


def test_the_defaults_are_those_of_the_paper() -> None:
    objective = get_objective("alm", temperature=None, divergence=None, top_k=5)
    assert isinstance(objective, ChunkLikelihood) and objective.temperature == 100.0
    assert objective.divergence(STUDENT, TEACHER).item() == KL(STUDENT, TEACHER).item()
    assert chunk_likelihood(logs(0.2), logs(0.6), KL) == chunk_likelihood(logs(0.2), logs(0.6), KL, 100.0)
