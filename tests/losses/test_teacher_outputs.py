import pytest
import torch
from torch import Tensor

from cbd_trl.losses.divergences import forward_kl, sampled_forward_kl
from cbd_trl.losses.teacher_outputs import draw, teacher_top_k, top_k_log_probs


def logits(seed: int, n: int = 6, v: int = 9) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 3


def log_probs(seed: int, n: int = 6, v: int = 9) -> Tensor:
    return logits(seed, n, v).log_softmax(-1)


def _naive(log_NV: Tensor, indices_NK: Tensor) -> Tensor:
    rows = []
    for log_V, indices_K in zip(log_NV, indices_NK, strict=True):
        others = [v for v in range(len(log_V)) if v not in indices_K.tolist()]
        rows.append(torch.cat([log_V[indices_K], log_V[others].exp().sum(0, keepdim=True).log()]))
    return torch.stack(rows)


def test_hand_computed_events() -> None:
    log = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    events = top_k_log_probs(log, torch.tensor([[3, 0]]))
    torch.testing.assert_close(events.exp(), torch.tensor([[0.3, 0.1, 0.6]]))


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_naive_twin_agrees_in_value_and_gradient(k: int) -> None:
    ours, twin = logits(0).requires_grad_(), logits(0).double().requires_grad_()
    indices = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :k]
    events = top_k_log_probs(ours.log_softmax(-1), indices)
    expected = _naive(twin.log_softmax(-1), indices)
    assert events.shape == (6, k + 1) and events.dtype == torch.float32
    torch.testing.assert_close(events.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(events.exp().sum(-1), torch.ones(6))
    slopes = logits(2)[:, : k + 1]
    events.backward(slopes)
    expected.backward(slopes.double())
    assert ours.grad is not None and twin.grad is not None
    torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


def test_all_tokens_kept_leave_no_tail() -> None:
    log = log_probs(0)
    indices = log.argsort(-1)
    assert torch.equal(top_k_log_probs(log, indices), log.gather(-1, indices))


def test_a_tail_too_small_for_a_difference_is_exact() -> None:
    # 1 - sum would be 0, and the smallest float32 probability is e^-103.
    log = torch.tensor([[0.0, -200.0, -200.0, -300.0]])
    assert top_k_log_probs(log, torch.tensor([[0]]))[0, 1].item() == pytest.approx(-200.0 + 0.6931472)


def test_a_tail_of_impossible_tokens_has_no_gradient() -> None:
    log = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log().requires_grad_()
    events = top_k_log_probs(log, torch.tensor([[0, 1]]))
    assert events[0, 2].item() == float("-inf")
    (gradient,) = torch.autograd.grad(events, log, torch.tensor([[2.0, 3.0, 1.0]]))
    assert gradient.tolist() == [[2.0, 3.0, 0.0, 0.0]]


def test_nothing_scored_gives_no_events() -> None:
    log = log_probs(0)[:0].requires_grad_()
    events = top_k_log_probs(log, torch.zeros(0, 3, dtype=torch.int64))
    assert events.shape == (0, 4)
    events.sum().backward()


def test_a_cache_keeps_the_most_likely_tokens_and_the_rest() -> None:
    log = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    indices, kept, tail = teacher_top_k(log, 3)
    assert indices.tolist() == [[1, 3, 2]] and indices.dtype == torch.int64
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.4, 0.3, 0.2]]))
    torch.testing.assert_close(tail.exp(), torch.tensor([0.1]))
    assert torch.equal(torch.cat([kept, tail[:, None]], -1), top_k_log_probs(log, indices))


@pytest.mark.parametrize("k", [9, 50])
def test_a_cache_of_everything_has_an_impossible_tail(k: int) -> None:
    log = log_probs(3)
    indices, kept, tail = teacher_top_k(log, k)
    assert indices.shape == kept.shape == (6, 9)
    assert torch.equal(kept, log.sort(-1, descending=True).values)
    assert tail.tolist() == [float("-inf")] * 6


def test_draws_follow_the_distribution_and_the_generator() -> None:
    log = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7]]).log()
    indices = draw(log, 20_000, torch.Generator().manual_seed(0))
    assert indices.shape == (2, 20_000) and indices.dtype == torch.int64
    shares = torch.stack([(indices == v).float().mean(-1) for v in range(3)], -1)
    torch.testing.assert_close(shares, log.exp(), rtol=0, atol=0.015)
    assert torch.equal(indices, draw(log, 20_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(indices, draw(log, 20_000, torch.Generator().manual_seed(1)))


def test_many_draws_estimate_the_forward_kl() -> None:
    student, teacher = log_probs(4), log_probs(5)
    indices = draw(teacher, 50_000, torch.Generator().manual_seed(2))
    estimate = sampled_forward_kl(student.gather(-1, indices), teacher.gather(-1, indices))
    torch.testing.assert_close(estimate, forward_kl(student, teacher), rtol=0.03, atol=0.03)
