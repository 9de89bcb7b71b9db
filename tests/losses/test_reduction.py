import pytest
import torch

from cbd_trl.losses.reduction import Scored, count_scored, cross_entropy, normalize, scored_mask, sums_per_row

LABELS = torch.tensor([[5, 1, 2, -100], [-100, -100, 3, 4]])


def test_a_position_is_scored_when_the_next_token_has_a_label() -> None:
    assert scored_mask(LABELS).tolist() == [[True, True, False], [False, True, True]]
    scored = Scored.of(LABELS)
    assert len(scored) == 4 == count_scored([{"labels": LABELS}])
    assert scored.select_next(LABELS).tolist() == [1, 2, 3, 4]
    values = torch.arange(8.0).reshape(2, 4, 1)
    assert scored.select(values).flatten().tolist() == [0, 1, 5, 6]
    assert len(Scored.of(LABELS[:, :1])) == len(Scored.of(LABELS[:0])) == 0


def test_cross_entropy_equals_the_model_loss_in_value_and_gradient() -> None:
    logits = torch.randn(2, 4, 9, requires_grad=True)
    twin = logits.detach().clone().requires_grad_()
    scored = Scored.of(LABELS)
    terms = cross_entropy(scored.select(logits), scored.select_next(LABELS))
    loss = normalize(terms.sum(), terms.numel(), None)
    expected = torch.nn.functional.cross_entropy(twin[:, :-1].reshape(-1, 9), LABELS[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, twin.grad)


def test_cross_entropy_is_zero_for_a_certain_model_and_log_v_for_a_clueless_one() -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0]])
    assert cross_entropy(certain, torch.tensor([0])).item() == 0.0
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(1.3862944)


def test_everything_masked_gives_zero_and_a_zero_gradient() -> None:
    labels = torch.full((2, 4), -100)
    logits = torch.randn(2, 4, 9, requires_grad=True)
    scored = Scored.of(labels)
    terms = cross_entropy(scored.select(logits), scored.select_next(labels))
    loss = normalize(terms.sum(), terms.numel(), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.abs().max() == 0


def test_shares_of_a_step_add_up_to_the_mean() -> None:
    whole = normalize(torch.tensor(15.0), 6, None)
    assert whole.item() == 2.5
    parts = torch.tensor(1.0), torch.tensor(14.0)
    assert sum(normalize(part, 3, 6) for part in parts).item() == pytest.approx(2.5)
    averaged_by_ddp = sum(normalize(part, 3, 6, 2) for part in parts) / 2
    assert averaged_by_ddp.item() == pytest.approx(2.5)


def test_sums_per_row_agree_for_padded_and_packed_rows() -> None:
    terms = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sums_per_row(terms, Scored.of(LABELS), LABELS.shape).tolist() == [3.0, 12.0]
    packed = torch.tensor([[-100, 1, 2, -100, -100, 3, 4, -100]])  # rows of 3 and 4 tokens, and padding
    assert sums_per_row(terms, Scored.of(packed), packed.shape, torch.tensor([3, 4])).tolist() == [3.0, 12.0]
