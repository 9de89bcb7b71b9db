import pytest
import torch

from cbd_trl.losses.divergences import reverse_kl
from cbd_trl.losses.objective import DistillObjective
from cbd_trl.losses.reduction import cross_entropy

STUDENT, TEACHER = torch.randn(6, 12), torch.randn(6, 10)
TARGETS = torch.arange(6)


def test_terms_add_up_with_their_weights_on_the_shared_rows() -> None:
    objective = DistillObjective(2.0, 0.5, 3.0, divergence="reverse_kl", temperature=2.0, shared_rows=10)
    hidden = torch.rand(6)
    terms = objective.terms(STUDENT, TEACHER, TARGETS, hidden)
    assert list(terms) == ["kd", "ce", "hidden", "teacher_ce"]
    torch.testing.assert_close(terms["kd"], reverse_kl(STUDENT[:, :10], TEACHER, 2.0))
    torch.testing.assert_close(terms["ce"], cross_entropy(STUDENT, TARGETS))
    torch.testing.assert_close(terms["teacher_ce"], cross_entropy(TEACHER, TARGETS))
    torch.testing.assert_close(objective.combine(terms), 2 * terms["kd"] + 0.5 * terms["ce"] + 3 * hidden)


def test_a_term_without_weight_is_logged_without_a_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    terms = DistillObjective(0.0, 1.0, 0.0, shared_rows=10).terms(student, TEACHER, TARGETS, None)
    assert not terms["kd"].requires_grad and terms["ce"].requires_grad and "hidden" not in terms


def test_zero_when_the_teacher_is_the_student() -> None:
    objective = DistillObjective(1.0, 0.0, 0.0)
    assert (objective.combine(objective.terms(TEACHER, TEACHER, TARGETS, None)) == 0).all()


def test_no_weight_is_refused() -> None:
    objective = DistillObjective(0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="Nothing to minimise"):
        objective.combine({"kd": torch.zeros(2)})
