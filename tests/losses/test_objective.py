import pytest
import torch

from cbd_trl.losses.divergence_table import DIVERGENCES
from cbd_trl.losses.divergences import get_divergence, reverse_kl, tempered_log_probs
from cbd_trl.losses.objective import DistillObjective, TermWeights, combine
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.losses.teacher_outputs import LogitPrediction

DRAW = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(6, 12, generator=DRAW), torch.randn(6, 10, generator=DRAW)
TARGETS = torch.arange(6)
REVERSE = get_divergence("reverse_kl")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_terms_are_taken_on_the_shared_rows_and_at_the_temperature(temperature: float) -> None:
    objective = DistillObjective(REVERSE, temperature, shared_rows=10)
    terms = objective.terms(STUDENT, LogitPrediction([TEACHER]), TARGETS, TermWeights(1.0, 1.0))
    assert list(terms) == ["kd", "ce", "teacher_ce"]
    both = (tempered_log_probs(logits, temperature) for logits in (STUDENT[:, :10], TEACHER))
    torch.testing.assert_close(terms["kd"], reverse_kl(*both) * temperature**2)
    torch.testing.assert_close(terms["ce"], cross_entropy(STUDENT, TARGETS))
    torch.testing.assert_close(terms["teacher_ce"], cross_entropy(TEACHER, TARGETS))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_factor_of_the_temperature_keeps_the_gradient_of_a_small_difference(name: str) -> None:
    def slope(temperature: float) -> torch.Tensor:
        student = (TEACHER * 1e-2).requires_grad_()
        objective = DistillObjective(get_divergence(name), temperature)
        objective.terms(student, LogitPrediction([TEACHER * 2e-2]), TARGETS, TermWeights(1.0, 0.0))[
            "kd"
        ].sum().backward()
        return student.grad

    torch.testing.assert_close(slope(4.0), slope(1.0), rtol=0.1, atol=1e-4)


def test_terms_add_up_with_their_weights() -> None:
    terms = {name: torch.rand(4) for name in ("kd", "ce", "hidden", "teacher_ce")}
    expected = 2 * terms["kd"] + 0.5 * terms["ce"] + 3 * terms["hidden"]
    torch.testing.assert_close(combine(terms, TermWeights(2.0, 0.5, 3.0)), expected)
    torch.testing.assert_close(combine(terms, TermWeights(0.0, 0.5)), 0.5 * terms["ce"])
    assert (combine(terms, TermWeights(0.0, 0.0)) == 0).all()


def test_a_term_without_weight_is_logged_without_a_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    objective = DistillObjective(REVERSE, shared_rows=10)
    terms = objective.terms(student, LogitPrediction([TEACHER]), TARGETS, TermWeights(0.0, 1.0))
    assert not terms["kd"].requires_grad and terms["ce"].requires_grad
    terms = objective.terms(student, LogitPrediction([TEACHER]), TARGETS, TermWeights(1.0, 0.0))
    assert terms["kd"].requires_grad and not terms["ce"].requires_grad


def test_zero_when_the_teacher_is_the_student() -> None:
    terms = DistillObjective(REVERSE).terms(TEACHER, LogitPrediction([TEACHER]), TARGETS, TermWeights(1.0, 0.0))
    assert (terms["kd"] == 0).all() and torch.equal(terms["ce"], terms["teacher_ce"])
