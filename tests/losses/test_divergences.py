import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_trl.losses import divergences as divergence_kernels
from cbd_trl.losses.divergence_table import DIVERGENCES, divergence_option
from cbd_trl.losses.divergences import (
    adaptive_kl,
    alpha_divergence,
    forward_kl,
    get_divergence,
    jsd,
    renyi_divergence,
    reverse_kl,
    sampled_forward_kl,
    skew_kl,
    skew_reverse_kl,
    tempered_log_probs,
    total_variation,
)
from cbd_trl.losses.teacher_outputs import top_k_log_probs

NAMES = list(DIVERGENCES)
# A value of each option that is not its default.
OPTIONS = {"beta": 0.3, "skew": 0.2, "head_share": 0.6, "alpha": 0.3, "order": 0.4}
# Two tokens: probabilities 1/2 against 3/4.
STUDENT = torch.tensor([[0.5, 0.5]]).log()
TEACHER = torch.tensor([[0.75, 0.25]]).log()
IMPOSSIBLE = float("-inf")


def _naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def _naive_head(p: Tensor, share: float) -> Tensor:
    # Sorts everything: an event is in the head while the more likely ones do not reach the share.
    ordered, order = p.sort(-1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < share)


def _naive_jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    mixture = beta * t + (1 - beta) * s
    return beta * _naive_kl(t, mixture) + (1 - beta) * _naive_kl(s, mixture)


def _naive_adaptive_kl(s: Tensor, t: Tensor, head_share: float) -> Tensor:
    off, head = (s - t).abs().detach(), _naive_head(t, head_share)
    share = (off * head).sum(-1) / off.sum(-1)
    return share * _naive_kl(t, s) + (1 - share) * _naive_kl(s, t)


def _naive_alpha(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    return (alpha * t + (1 - alpha) * s - t**alpha * s ** (1 - alpha)).sum(-1) / (alpha * (1 - alpha))


# Each divergence the simple way: of the probabilities of student and teacher, and its option.
TWINS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda s, t: _naive_kl(t, s),
    "reverse_kl": _naive_kl,
    "jsd": _naive_jsd,
    "skew_kl": lambda s, t, skew: _naive_kl(t, skew * t + (1 - skew) * s),
    "skew_reverse_kl": lambda s, t, skew: _naive_kl(s, (1 - skew) * t + skew * s),
    "adaptive_kl": _naive_adaptive_kl,
    "alpha_divergence": _naive_alpha,
    "renyi_divergence": lambda s, t, order: (t**order * s ** (1 - order)).sum(-1).log() / (order - 1),
    "total_variation": lambda s, t: (s - t).abs().sum(-1) / 2,
}
# f-divergences never rise where events are merged.
F_DIVERGENCES = [name for name in NAMES if name != "adaptive_kl"]


def _naive(name: str, student_log: Tensor, teacher_log: Tensor) -> Tensor:
    option = divergence_option(name)
    own = {} if option is None else {option: OPTIONS[option]}
    return TWINS[name](student_log.exp(), teacher_log.exp(), **own)


def logits(seed: int, n: int = 7, v: int = 11, scale: float = 3.0) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * scale


def log_probs(seed: int, n: int = 7, v: int = 11, scale: float = 3.0) -> Tensor:
    return logits(seed, n, v, scale).log_softmax(-1)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    "options",
    [
        {},
        OPTIONS,
        {"beta": 0.0, "skew": 0.0, "head_share": 1.0, "alpha": 0.0},
        {"beta": 1.0, "alpha": 1.0, "order": 1.0},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_exactly_zero_when_equal_with_no_gradient(name: str, options: dict) -> None:
    student = logits(0).requires_grad_()
    student_log = tempered_log_probs(student, 2.0)
    value = get_divergence(name, **options)(student_log, student_log.detach().clone())
    assert value.shape == (7,) and value.dtype == torch.float32
    assert (value == 0).all()
    value.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6


def _kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_hand_computed_values() -> None:
    expected = {
        forward_kl: _kl(0.75, 0.5),
        reverse_kl: _kl(0.5, 0.75),
        jsd: 0.5 * _kl(0.75, 0.625) + 0.5 * _kl(0.5, 0.625),
        partial(jsd, beta=0.2): 0.2 * _kl(0.75, 0.55) + 0.8 * _kl(0.5, 0.55),
        skew_kl: _kl(0.75, 0.525),  # 0.1 * 3/4 + 0.9 * 1/2
        partial(skew_kl, skew=0.6): _kl(0.75, 0.65),
        skew_reverse_kl: _kl(0.5, 0.725),  # 0.9 * 3/4 + 0.1 * 1/2
        partial(skew_reverse_kl, skew=0.6): _kl(0.5, 0.6),
        # Head: the first token, off by as much as the second.
        adaptive_kl: 0.5 * _kl(0.75, 0.5) + 0.5 * _kl(0.5, 0.75),
        alpha_divergence: 4 * (1 - math.sqrt(0.375) - math.sqrt(0.125)),
        renyi_divergence: -2 * math.log(math.sqrt(0.375) + math.sqrt(0.125)),
        total_variation: 0.25,
    }
    for function, value in expected.items():
        assert function(STUDENT, TEACHER).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_scored_gives_an_empty_value_and_a_zero_gradient(name: str) -> None:
    student = log_probs(0)[:0].requires_grad_()
    value = get_divergence(name)(student, log_probs(1)[:0])
    assert value.shape == (0,)
    value.sum().backward()


def _assert_equal_to_the_twin(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    ours, twin = student.clone().requires_grad_(), student.double().requires_grad_()
    teacher_log = tempered_log_probs(teacher, temperature)
    value = get_divergence(name, **OPTIONS)(tempered_log_probs(ours, temperature), teacher_log)
    # The twin's teacher is the same rounded numbers: where p is nearly q the rounding is most of the value.
    expected = _naive(name, (twin / temperature).log_softmax(-1), teacher_log.double())
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)
    slopes = torch.linspace(-1.0, 2.0, len(value))
    value.backward(slopes)
    expected.backward(slopes.double())
    assert ours.grad is not None and twin.grad is not None
    torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_naive_twin_agrees_in_value_and_gradient(name: str, temperature: float) -> None:
    _assert_equal_to_the_twin(name, logits(2), logits(3), temperature)
    near = logits(2) + 1e-2 * logits(3)
    _assert_equal_to_the_twin(name, near, logits(2), temperature)


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_that_of_the_formula_before_any_softmax(name: str) -> None:
    # The softmax takes out of a gradient what is in proportion to q, and would hide a mistake there.
    ours, twin = log_probs(2).requires_grad_(), log_probs(2).double().requires_grad_()
    get_divergence(name, **OPTIONS)(ours, log_probs(3)).sum().backward()
    _naive(name, twin, log_probs(3).double()).sum().backward()
    assert ours.grad is not None and twin.grad is not None
    torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for elements in (1, 33):
        monkeypatch.setattr(divergence_kernels, "_BLOCK_ELEMENTS", elements)
        _assert_equal_to_the_twin(name, logits(4), logits(5))


@pytest.mark.parametrize("name", NAMES)
def test_never_negative_even_for_nearly_equal_pairs(name: str) -> None:
    for seed in range(20):
        teacher = logits(seed, v=50)
        for step in (1e-4, 1e-2, 1.0):
            student_log = (teacher + step * logits(seed + 100, v=50)).log_softmax(-1)
            assert (get_divergence(name)(student_log, teacher.log_softmax(-1)) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_never_negative_and_zero_when_equal_for_top_k_events(name: str) -> None:
    divergence = get_divergence(name)
    for k in (1, 2, 5, 10, 11):
        student_log, teacher_log = log_probs(6, n=40), log_probs(7, n=40)
        indices = teacher_log.topk(k).indices
        kept = top_k_log_probs(teacher_log, indices)
        assert (divergence(top_k_log_probs(student_log, indices), kept) > 0).all()
        assert (divergence(kept.clone(), kept) == 0).all()


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_merging_events_never_raises_an_f_divergence(name: str) -> None:
    divergence = get_divergence(name, **OPTIONS)
    student_log, teacher_log = log_probs(8, n=40), log_probs(9, n=40)
    coarser = torch.zeros(40)
    # From one kept token to all of them: each partition refines the one before (data processing inequality).
    for k in (1, 2, 5, 9, 11):
        indices = teacher_log.topk(k).indices
        value = divergence(top_k_log_probs(student_log, indices), top_k_log_probs(teacher_log, indices))
        assert (value >= coarser - 1e-6).all()
        coarser = value
    torch.testing.assert_close(coarser, divergence(student_log, teacher_log))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name: str) -> None:
    student = torch.tensor([[500.0, -500.0, 0.0], [0.0, 0.0, 500.0]], requires_grad=True)
    teacher = torch.tensor([[-500.0, 500.0, 0.0], [500.0, -500.0, -500.0]])
    value = get_divergence(name, **OPTIONS)(tempered_log_probs(student), tempered_log_probs(teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and (value > 0.1).all()
    assert torch.isfinite(gradient).all()


def test_extreme_values_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, -1000.0]]), torch.tensor([[-1000.0, 0.0]])
    assert forward_kl(student, teacher).item() == 1000.0
    # Below the floor a teacher's probability counts as the smallest float32.
    assert reverse_kl(student, teacher).item() == pytest.approx(149 * math.log(2.0))
    # Disjoint: bounded by the share of the other one in the mixture.
    assert skew_kl(student, teacher, 0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)
    assert skew_reverse_kl(student, teacher, 0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)
    assert jsd(student, teacher).item() == pytest.approx(math.log(2.0), rel=1e-5)
    assert total_variation(student, teacher).item() == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_an_event_impossible_for_both_changes_nothing(name: str) -> None:
    def with_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.clone().requires_grad_()
        value = get_divergence(name, **OPTIONS)(student.log_softmax(-1), teacher.log_softmax(-1))
        return value, torch.autograd.grad(value.sum(), student)[0]

    value, gradient = with_gradient(logits(10), logits(11))
    impossible = torch.full((7, 2), IMPOSSIBLE)
    padded, padded_gradient = with_gradient(
        torch.cat([logits(10), impossible], -1), torch.cat([logits(11), impossible], -1)
    )
    torch.testing.assert_close(padded, value)
    torch.testing.assert_close(padded_gradient, F.pad(gradient, (0, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_an_event_impossible_for_the_teacher_stays_finite(name: str) -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher_log = logs(0.5, 0.5, 0.0)
    value = get_divergence(name, **OPTIONS)(student.log_softmax(-1), teacher_log)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    assert gradient[0, 2] > 0  # descent takes mass from what the teacher rules out


def test_values_with_an_event_impossible_for_one() -> None:
    student, teacher = logs(1 / 3, 1 / 3, 1 / 3), logs(0.5, 0.5, 0.0)
    assert forward_kl(student, teacher).item() == pytest.approx(math.log(1.5))
    expected = 2 / 3 * math.log(2 / 3) + (149 * math.log(2.0) - math.log(3.0)) / 3
    assert reverse_kl(student, teacher).item() == pytest.approx(expected)
    # The mixture has 1/2 * 1/3 there.
    middle = 0.5 * math.log(0.5 / (5 / 12)) + 0.5 * (2 / 3 * math.log((1 / 3) / (5 / 12)) + math.log(2.0) / 3)
    assert jsd(student, teacher).item() == pytest.approx(middle, rel=1e-5)
    assert jsd(teacher, student).item() == pytest.approx(middle, rel=1e-5)
    assert total_variation(teacher, student).item() == pytest.approx(1 / 3)
    assert skew_kl(teacher, student, 0.1).item() == pytest.approx(
        2 / 3 * math.log((1 / 3) / (1 / 30 + 0.45)) + math.log(10.0) / 3, rel=1e-5
    )
    assert skew_reverse_kl(teacher, student, 0.1).item() == pytest.approx(math.log(0.5 / 0.35), rel=1e-5)
    assert forward_kl(teacher, student).item() > 1e37  # infinite


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_model_is_not_hidden(name: str) -> None:
    student_log = log_probs(0)
    student_log[2, 3] = float("nan")
    assert get_divergence(name)(student_log, log_probs(1)).isnan().tolist() == [row == 2 for row in range(7)]


@pytest.mark.parametrize("share", [1e-300, 1e-20, 1e-9, 5e-8, 9e-7, 2e-6])
def test_shares_of_almost_0_stay_finite(share: float) -> None:
    student = torch.tensor([[90.0, 0.0, -90.0], [1.0, 0.0, -1.0]], requires_grad=True)
    student_log, teacher_log = student.log_softmax(-1), torch.tensor([[-90.0, 0.0, 90.0], [0.0, 0.0, 0.0]])
    teacher_log = teacher_log.log_softmax(-1)
    for value_N in (
        skew_kl(student_log, teacher_log, share),
        skew_reverse_kl(student_log, teacher_log, share),
        jsd(student_log, teacher_log, share),
        jsd(student_log, teacher_log, 1.0 - share),
    ):
        (gradient,) = torch.autograd.grad(value_N.sum(), student, retain_graph=True)
        assert torch.isfinite(value_N).all() and torch.isfinite(gradient).all()
    expected = reverse_kl(student_log, teacher_log)[1].item()
    assert skew_reverse_kl(student_log, teacher_log, share)[1].item() == pytest.approx(expected, rel=1e-4)


def test_beta_ends_are_forward_and_reverse_kl_as_in_trl() -> None:
    student, teacher = log_probs(4, scale=1.0), log_probs(5, scale=1.0)
    assert torch.equal(jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))
    torch.testing.assert_close(jsd(student, teacher, beta=1e-3) / 1e-3, forward_kl(student, teacher), rtol=0.1, atol=0)


@pytest.mark.parametrize(("skewed", "plain"), [(skew_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_without_skew_the_kl_remains(skewed, plain) -> None:
    student, teacher = log_probs(4, scale=1.0), log_probs(5, scale=1.0)
    assert torch.equal(skewed(student, teacher, skew=0.0), plain(student, teacher))
    torch.testing.assert_close(skewed(student, teacher, skew=1e-5), plain(student, teacher), rtol=1e-3, atol=1e-5)
    assert (skewed(student, teacher, skew=0.5) < plain(student, teacher)).all()


def test_alpha_ends_are_reverse_and_forward_kl() -> None:
    student, teacher = log_probs(4, scale=1.0), log_probs(5, scale=1.0)
    for alpha, limit in ((0.0, reverse_kl), (1.0, forward_kl)):
        assert torch.equal(alpha_divergence(student, teacher, alpha), limit(student, teacher))
        near = alpha_divergence(student, teacher, abs(alpha - 1e-3))
        torch.testing.assert_close(near, limit(student, teacher), rtol=1e-2, atol=0)
    disjoint = alpha_divergence(logs(1.0, 0.0), logs(0.0, 1.0), 0.2)
    assert disjoint.item() == pytest.approx(1 / 0.16)


def test_renyi_grows_with_the_order_up_to_forward_kl() -> None:
    student, teacher = log_probs(4, scale=1.0), log_probs(5, scale=1.0)
    values = [renyi_divergence(student, teacher, order) for order in (1e-9, 0.1, 0.5, 0.9, 1.0)]
    assert all((low < high).all() for low, high in pairwise(values))
    assert values[0].max() < 1e-4
    assert torch.equal(values[-1], forward_kl(student, teacher))
    torch.testing.assert_close(renyi_divergence(student, teacher, 1 - 1e-4), values[-1], rtol=1e-3, atol=0)
    torch.testing.assert_close(renyi_divergence(teacher, student), values[2])


def test_renyi_has_a_slope_where_student_and_teacher_hardly_meet() -> None:
    # Of the overlap the student's own event has e^-40 and the teacher's e^-30: the slope is that of a whole token.
    student = torch.tensor([[0.0, -50.0]], requires_grad=True)
    value = renyi_divergence(student.log_softmax(-1), torch.tensor([[-100.0, 0.0]]), 0.4)
    assert value.item() == pytest.approx(30 / 0.6, rel=1e-4)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], torch.tensor([[1.0, -1.0]]), rtol=0, atol=1e-4)
    disjoint = renyi_divergence(logs(1.0, 0.0), logs(0.0, 1.0), 0.4)
    assert disjoint.item() == pytest.approx(0.4 / 0.6 * 149 * math.log(2.0))


def test_adaptive_kl_weighs_by_where_the_student_is_off() -> None:
    teacher = logs(0.6, 0.2, 0.1, 0.1)
    in_head = logs(0.4, 0.4, 0.1, 0.1)  # head: the first token; off by 0.2 there and by 0.2 in the tail
    in_tail = logs(0.6, 0.1, 0.2, 0.1)
    both = 0.5 * forward_kl(in_head, teacher) + 0.5 * reverse_kl(in_head, teacher)
    torch.testing.assert_close(adaptive_kl(in_head, teacher), both)
    torch.testing.assert_close(adaptive_kl(in_tail, teacher), reverse_kl(in_tail, teacher))
    # The second token joins the head when 0.6 is not enough, and with it everything that is off.
    torch.testing.assert_close(adaptive_kl(in_head, teacher, head_share=0.7), forward_kl(in_head, teacher))
    # The first is always in it.
    torch.testing.assert_close(adaptive_kl(in_head, teacher, head_share=0.01), both)
    torch.testing.assert_close(adaptive_kl(in_tail, teacher, head_share=1.0), forward_kl(in_tail, teacher))


@pytest.mark.parametrize("kept", [1, 2, 64])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_looking_at_more_events_until_the_head_is_covered_equals_sorting_all(kept: int, share: float) -> None:
    # From sure to nearly uniform, so that rows are covered at different times.
    teacher_log = torch.cat([log_probs(12, n=4, v=100, scale=scale) for scale in (8.0, 2.0, 0.1)])
    values = logits(13, n=12, v=100).abs()
    head = _naive_head(teacher_log.double().exp(), share)
    found = divergence_kernels._head_sum(values, teacher_log, share, kept)
    torch.testing.assert_close(found, (values * head).sum(-1))
    # What a GPU does, for events of probability 0, and for one that is all, too.
    teacher_log = torch.cat([teacher_log, torch.full((12, 3), -math.inf)], 1)
    teacher_log[0] = torch.full((103,), -math.inf).index_fill(0, torch.tensor(7), 0.0)
    values = torch.cat([values, torch.ones(12, 3)], 1)
    head = _naive_head(teacher_log.double().exp(), share)
    found = divergence_kernels._head_sum_without_waiting(values, teacher_log, share)
    torch.testing.assert_close(found, (values * head).sum(-1))


def test_one_draw_has_the_forward_kl_as_its_expectation_in_value_and_gradient() -> None:
    ours, twin = logits(14).requires_grad_(), logits(14).requires_grad_()
    teacher_log = log_probs(15)
    # Every token as a draw of its own, weighted by how often it is drawn.
    every = [sampled_forward_kl(ours.log_softmax(-1)[:, [v]], teacher_log[:, [v]]) for v in range(11)]
    expectation = (torch.stack(every, -1) * teacher_log.exp()).sum(-1)
    expected = forward_kl(twin.log_softmax(-1), teacher_log)
    torch.testing.assert_close(expectation, expected)
    expectation.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)


def test_several_draws_are_averaged_and_may_be_negative() -> None:
    value = sampled_forward_kl(logs(0.5, 0.25), logs(0.25, 0.125))
    assert value.item() == pytest.approx(-math.log(2.0))
    assert sampled_forward_kl(logs(0.5, 0.25), logs(0.25, 0.5)).item() == pytest.approx(0.0)


def test_the_temperature_divides_the_logits_and_low_precision_is_computed_in_float32() -> None:
    torch.testing.assert_close(tempered_log_probs(logits(6), 2.0), (logits(6) / 2.0).log_softmax(-1))
    low = logits(6).bfloat16()
    assert torch.equal(tempered_log_probs(low, 1.0), low.float().log_softmax(-1))
    student, teacher = log_probs(6).bfloat16(), log_probs(7).bfloat16()
    for name in NAMES:
        assert torch.equal(
            get_divergence(name)(student, teacher), get_divergence(name)(student.float(), teacher.float())
        )
    assert sampled_forward_kl(student, teacher).dtype == torch.float32


def test_a_name_binds_its_own_option_and_ignores_the_others() -> None:
    student, teacher = log_probs(4), log_probs(5)
    defaults = {name: get_divergence(name)(student, teacher) for name in NAMES}
    for name in NAMES:
        for option, setting in OPTIONS.items():
            value = get_divergence(name, **{option: setting})(student, teacher)
            assert torch.equal(value, defaults[name]) == (option != divergence_option(name))
    assert [divergence_option(name) for name in ("jsd", "skew_kl", "adaptive_kl")] == ["beta", "skew", "head_share"]
    assert divergence_option("forward_kl") is None


@pytest.mark.parametrize("look_up", [get_divergence, divergence_option])
def test_unknown_name_lists_what_exists(look_up) -> None:
    with pytest.raises(
        ValueError, match=r"Unknown divergence 'forwardkl': there are forward_kl, .*Did you mean 'forw"
    ):
        look_up("forwardkl")


def test_different_events_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 11\) and the teacher of \(7, 12\): .*the same events"):
        forward_kl(log_probs(0), log_probs(1, v=12))


def test_a_second_backward_pass_is_refused() -> None:
    value = forward_kl(log_probs(0).requires_grad_(), log_probs(1)).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"kept for one backward pass. Compute the divergence again"):
        value.backward()


@pytest.mark.parametrize(
    ("divergence", "option"),
    # At an order of 0 the Renyi divergence itself is 0.
    [(alpha_divergence, option) for option in (1e-5, 1e-3, 0.5, 0.999, 0.99999)]
    + [(renyi_divergence, option) for option in (0.5, 0.999, 0.99999)],
)
def test_near_its_ends_an_option_costs_no_precision(divergence, option):
    """There the formula is a difference of nearly equal numbers over a small one."""
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(64, 200, generator=generator) for _ in range(2))
    student_NV = (teacher_NV + 1e-2 * student_NV).log_softmax(-1).requires_grad_()
    teacher_NV = teacher_NV.log_softmax(-1)
    exact_NV = student_NV.detach().double().requires_grad_()
    log_overlap_N = ((1 - option) * exact_NV.log_softmax(-1) + option * teacher_NV.double().log_softmax(-1)).logsumexp(
        -1
    )
    missing_N = -torch.expm1(log_overlap_N) if divergence is alpha_divergence else -log_overlap_N * option
    exact_N = missing_N / (option * (1 - option))
    found_N = divergence(student_NV.log_softmax(-1), teacher_NV, option)
    assert ((found_N - exact_N) / exact_N).abs().max() < 1e-3
    (found,) = torch.autograd.grad(found_N.sum(), student_NV)
    (exact,) = torch.autograd.grad(exact_N.sum(), exact_NV)
    assert (found - exact).norm() < 1e-4 * exact.norm()
