"""Which tokens two vocabularies share, and the hybrid by hand and at its ends."""

import math

import pytest
import torch
from torch import Tensor

from cbd_trl.bridge.objectives.groups import GroupPrediction
from cbd_trl.bridge.objectives.inputs import Places
from cbd_trl.bridge.objectives.shared_tokens import SharedHybrid, SharedTokens
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.losses.divergences import get_divergence
from tests.bridge.objective_helpers import randn
from tests.bridge.tokenizers_of_kinds import make_tokenizer

KL = get_divergence("forward_kl")


def hybrid(objective: SharedHybrid, student: Tensor, teacher: Tensor) -> Tensor:
    """A group for each row of logits."""
    nothing, group_BT = torch.zeros(len(student)), torch.arange(-1, len(student))[None]
    places = Places.of_student(group_BT, group_BT, torch.zeros_like(group_BT))
    prediction = GroupPrediction(places, slice(0, len(student)), nothing, teacher)
    return objective.compare(student, nothing, prediction)


@pytest.mark.parametrize("student", ["byte_level", "byte_fallback", "unigram"])
@pytest.mark.parametrize("teacher", ["byte_level", "byte_fallback"])
def test_shared_tokens_are_pairs_of_the_same_bytes_or_role(student: str, teacher: str) -> None:
    one, other = make_tokenizer(student, 400), make_tokenizer(teacher, 500, seed=1)
    found = SharedTokens.of(one, other)
    ours, theirs = token_bytes(one), token_bytes(other)
    pairs = list(zip(found.student_S.tolist(), found.teacher_S.tolist(), strict=True))
    assert (one.eos_token_id, other.eos_token_id) in pairs
    assert all(ours[i] == theirs[j] for i, j in pairs)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert {ours[i] for i, _ in pairs} - {None} == (set(ours) & set(theirs)) - {None, b""}


def test_hand_computed_value() -> None:
    # Shared: 1/2 of both against 1/4 and 1/2; the rest: 1/4, 1/4 against 1/4.
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.25, 0.5, 0.25]]).log()
    tokens = SharedTokens(torch.tensor([0]), torch.tensor([1]))
    found = hybrid(SharedHybrid(tokens, KL), student, teacher)
    # 1/2 against 1/2, and all others 1/2 against 1/2: the divergence is 0, and so is the distance of {1/4, 1/4}.
    assert found.item() == pytest.approx(0.0, abs=1e-6)
    tokens = SharedTokens(torch.tensor([0]), torch.tensor([0]))
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = hybrid(SharedHybrid(tokens, KL), student, teacher)
    assert found.item() == pytest.approx(0.25 * kl + 0.75 * 0.25, rel=1e-5)


@pytest.mark.parametrize("name", ["jsd", "reverse_kl"])
def test_with_one_vocabulary_it_is_the_divergence(name: str) -> None:
    student, teacher, order = randn(5, 8, seed=0), randn(5, 8, seed=1), torch.randperm(8)
    tokens = SharedTokens(torch.arange(8), order.argsort())
    found = hybrid(SharedHybrid(tokens, get_divergence(name), 2.0), student, teacher[:, order])
    logs = [(side / 2.0).log_softmax(-1) for side in (student, teacher)]
    torch.testing.assert_close(found, get_divergence(name)(*logs) * 4.0)


def test_a_vocabulary_within_the_other_is_compared_given_a_shared_token() -> None:
    student, teacher = randn(5, 4, seed=0).requires_grad_(), randn(5, 9, seed=1)
    tokens = SharedTokens(torch.arange(4), torch.tensor([8, 2, 0, 5]))
    found = hybrid(SharedHybrid(tokens, KL), student, teacher)
    p = teacher.softmax(-1)
    mass = p[:, tokens.teacher_S].sum(-1)
    named = KL(student.log_softmax(-1), teacher[:, tokens.teacher_S].log_softmax(-1))
    torch.testing.assert_close(found, mass * named + (1 - mass) * (1 - mass))
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_a_token_with_two_partners_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher_S.*\b2\b.*\b1\b"):
        SharedTokens(torch.tensor([0, 1]), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"teacher_S.*\b1\b.*\b2\b.*student_S"):
        SharedTokens(torch.tensor([0, 1]), torch.tensor([3]))
