"""Dense = fused: the same value and gradient, whatever the divergence, the teacher's form, the head and the mask."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head
from cbd_trl.losses.divergence_table import DIVERGENCES
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.fused import _parts, default_chunk, fused_terms
from cbd_trl.losses.objective import METRICS, DistillObjective, TermWeights
from cbd_trl.losses.reduction import Scored
from cbd_trl.losses.teacher_outputs import (
    HiddenOutputs,
    MixtureOutputs,
    SampledOutputs,
    TeacherOutputs,
    TopKOutputs,
    draw,
    teacher_top_k,
)

N, V, STUDENT, TEACHER, K = 11, 23, 5, 7, 4
NAMES = list(DIVERGENCES)


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


HIDDEN, TEACHER_HIDDEN = randn(N, STUDENT, seed=0, scale=2.0), randn(N, TEACHER, seed=1, scale=2.0)
TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
TEACHER_HEAD = Head(randn(V, TEACHER, seed=3))
HEADS = {
    "plain": Head(randn(V, STUDENT, seed=4)),
    "bias": Head(randn(V, STUDENT, seed=4), randn(V, seed=5)),
    "scaled": Head(randn(V, STUDENT, seed=4), None, scale=0.3),
    "capped": Head(randn(V, STUDENT, seed=4), randn(V, seed=5), scale=1.5, softcap=2.0),
}


def naive_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight_VD.to(hidden.dtype).T + (0 if head.bias_V is None else head.bias_V)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature) - (logits / temperature).exp().sum(-1, keepdim=True).log()


def power(name: str) -> int:
    return 1 if name == "total_variation" else 2


def naive(
    head: Head, teacher_log: Tensor, objective: DistillObjective, weights: TermWeights, power: int = 2
) -> tuple[Tensor, list[Tensor]]:
    """All logits at once, in float64, differentiated by autograd."""
    hidden = HIDDEN.double().requires_grad_()
    weight = head.weight_VD.detach().double().requires_grad_()
    bias = None if head.bias_V is None else head.bias_V.detach().double().requires_grad_()
    logits = naive_logits(hidden, Head(weight, bias, head.scale, head.softcap))
    student_log = log_probs(logits, objective.temperature)
    kd = objective.divergence(student_log.float(), teacher_log.float()).double()
    kd = kd * objective.temperature**power
    ce = -log_probs(logits, 1.0)[torch.arange(N), TARGETS]
    total = (weights.kd * kd + weights.ce * ce).sum()
    leaves = [hidden, weight] + ([] if bias is None else [bias])
    return total, list(torch.autograd.grad(total, leaves))


def fused(
    head: Head, teacher: TeacherOutputs, objective: DistillObjective, weights: TermWeights, chunk: int
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    hidden = HIDDEN.clone().requires_grad_()
    leaf = Head(*(None if t is None else t.clone().requires_grad_() for t in (head.weight_VD, head.bias_V)),
                head.scale, head.softcap)  # fmt: skip
    total, terms = fused_terms(hidden, leaf, TARGETS, teacher, objective, weights, chunk)
    leaves = [hidden, leaf.weight_VD] + ([] if leaf.bias_V is None else [leaf.bias_V])
    return total, list(torch.autograd.grad(total, leaves)), terms


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_dense_is_fused(name: str, temperature: float, head: str, chunk: int) -> None:
    objective = DistillObjective(get_divergence(name), temperature)
    weights = TermWeights(kd=0.7, ce=0.4)
    teacher_log = log_probs(naive_logits(TEACHER_HIDDEN.double(), TEACHER_HEAD), temperature)
    expected, gradients = naive(HEADS[head], teacher_log, objective, weights, power(name))
    total, ours, terms = fused(HEADS[head], HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), objective, weights, chunk)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, gradients)
    assert {name: term.shape for name, term in terms.items()} == dict.fromkeys(
        ("kd", "ce", "teacher_ce", *METRICS), (N,)
    )
    assert not any(term.requires_grad for term in terms.values())
    teacher_ce = -log_probs(naive_logits(TEACHER_HIDDEN, TEACHER_HEAD), 1.0)[torch.arange(N), TARGETS]
    torch.testing.assert_close(terms["teacher_ce"], teacher_ce, rtol=1e-5, atol=1e-5)


def coarse(log: Tensor, indices: Tensor) -> Tensor:
    """The kept events and one for the rest, by plain sums of probabilities."""
    kept = log.gather(1, indices)
    rest = 1 - torch.zeros_like(log).scatter(1, indices, 1.0)
    return torch.cat([kept, (log.exp() * rest).sum(1, keepdim=True).log()], 1)


@pytest.mark.parametrize("name", NAMES)
def test_top_k_cached_or_not_is_the_divergence_of_the_kept_events(name: str) -> None:
    divergence, weights = get_divergence(name), TermWeights(kd=1.0, ce=0.5)
    teacher_log = log_probs(naive_logits(TEACHER_HIDDEN.double(), TEACHER_HEAD), 1.5)
    indices = teacher_log.topk(K).indices
    # The naive twin sees the events through a divergence that makes them.
    twin = DistillObjective(
        dataclasses.replace(divergence, function=lambda s, t: divergence(coarse(s, indices), coarse(t, indices))), 1.5
    )
    expected, gradients = naive(HEADS["bias"], teacher_log, twin, weights, power(name))
    dense = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    target = -dense.at(slice(None)).cross_entropy(TARGETS)
    kept = TopKOutputs(*teacher_top_k(teacher_log.float(), K), target)
    more = TopKOutputs(*teacher_top_k(teacher_log.float(), K + 3), target)
    for signal, top_k in ((dense, K), (kept, None), (kept, K), (more, K)):
        objective = DistillObjective(divergence, 1.5, top_k)
        total, ours, terms = fused(HEADS["bias"], signal, objective, weights, 4)
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same(ours, gradients)
        torch.testing.assert_close(terms["teacher_ce"], -target)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_vocabulary_kept_is_dense(name: str) -> None:
    objective, weights = DistillObjective(get_divergence(name)), TermWeights(kd=1.0, ce=0.0)
    dense = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    teacher_log = dense.at(slice(None)).log_probs(1.0, V)
    whole = TopKOutputs(*teacher_top_k(teacher_log, V), torch.zeros(N))
    expected, gradients, _ = fused(HEADS["plain"], dense, objective, weights, 4)
    total, ours, _ = fused(HEADS["plain"], whole, objective, weights, 4)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, [g.double() for g in gradients])


def test_draws_are_forward_kl_on_average() -> None:
    weights, objective = TermWeights(kd=1.0, ce=0.0), DistillObjective(get_divergence("forward_kl"))
    dense = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    teacher_log = dense.at(slice(None)).log_probs(1.0, V)
    indices = draw(teacher_log, 40_000, torch.Generator().manual_seed(0))
    drawn = SampledOutputs(indices, teacher_log.gather(1, indices), torch.zeros(N))
    expected, gradients, _ = fused(HEADS["plain"], dense, objective, weights, 4)
    total, ours, _ = fused(HEADS["plain"], drawn, objective, weights, 4)
    assert total.item() == pytest.approx(expected.item(), rel=0.02)
    assert_same(ours, [g.double() for g in gradients], tolerance=0.03)


def test_several_teachers_are_the_mean_of_their_distributions() -> None:
    other = Head(randn(V + 2, TEACHER, seed=8))
    members = [HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), HiddenOutputs(TEACHER_HIDDEN, other)]
    objective, weights = (
        DistillObjective(get_divergence("reverse_kl"), 2.0, shared_rows=V),
        TermWeights(kd=1.0, ce=0.5),
    )
    probabilities = [
        log_probs(naive_logits(TEACHER_HIDDEN.double(), head)[:, :V], 2.0).exp() for head in (TEACHER_HEAD, other)
    ]
    expected, gradients = naive(
        HEADS["plain"], (0.25 * probabilities[0] + 0.75 * probabilities[1]).log(), objective, weights
    )
    total, ours, terms = fused(HEADS["plain"], MixtureOutputs(members, (0.25, 0.75)), objective, weights, 4)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, gradients)
    own = [log_probs(naive_logits(TEACHER_HIDDEN, head), 1.0).exp()[torch.arange(N), TARGETS] for head in
           (TEACHER_HEAD, other)]  # fmt: skip
    torch.testing.assert_close(terms["teacher_ce"], -(0.25 * own[0] + 0.75 * own[1]).log(), rtol=1e-5, atol=1e-5)


def test_shared_rows_leave_the_padding_to_the_cross_entropy() -> None:
    objective, weights = DistillObjective(get_divergence("forward_kl"), shared_rows=V - 3), TermWeights(kd=0.0, ce=1.0)
    teacher = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    total, _, terms = fused(HEADS["plain"], teacher, objective, weights, 4)
    ce = -log_probs(naive_logits(HIDDEN, HEADS["plain"]), 1.0)[torch.arange(N), TARGETS]
    assert total.item() == pytest.approx(ce.sum().item(), rel=1e-5)
    student, said = naive_logits(HIDDEN, HEADS["plain"]), naive_logits(TEACHER_HIDDEN, TEACHER_HEAD)
    kd = get_divergence("forward_kl")(log_probs(student[:, : V - 3], 1.0), log_probs(said[:, : V - 3], 1.0))
    torch.testing.assert_close(terms["kd"], kd, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient() -> None:
    head = HEADS["capped"]
    for name in NAMES:
        for top_k in (None, K):
            objective = DistillObjective(get_divergence(name), top_k=top_k)
            total, gradients, _ = fused(head, HiddenOutputs(HIDDEN, head), objective, TermWeights(1.0, 0.0), 4)
            assert total.item() == 0.0, name
            assert max(g.abs().max().item() for g in gradients) < 1e-5, name


@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_masked_rows_are_not_projected_and_get_no_gradient(masked: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (2, 9), generator=generator)
    labels[torch.rand(2, 9, generator=generator) < masked] = -100
    hidden, said = randn(2, 9, STUDENT, seed=6).requires_grad_(), randn(2, 9, TEACHER, seed=7)
    places = Scored.of(labels)
    projected = []
    project: Callable[..., Tensor] = Head.project
    monkeypatch.setattr(
        Head, "project", lambda head, rows, *out: projected.append(len(rows)) or project(head, rows, *out)
    )
    total, terms = fused_terms(
        places.select(hidden), HEADS["plain"], places.select_next(labels),
        HiddenOutputs(places.select(said), TEACHER_HEAD),
        DistillObjective(get_divergence("jsd")), TermWeights(1.0, 1.0), 4,
    )  # fmt: skip
    total.backward()
    scored = labels[:, 1:] != -100
    assert sum(projected) == 2 * scored.sum().item() and terms["kd"].numel() == scored.sum().item()
    moved = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(moved[:, :-1], scored) and not moved[:, -1].any()


def test_chunks_are_written_over_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new chunk would be pages to clear."""
    rooms = []
    project: Callable[..., Tensor] = Head.project

    def watched(head: Head, rows: Tensor, *out: Tensor) -> Tensor:
        rooms.append(project(head, rows, *out))
        return rooms[-1]

    monkeypatch.setattr(Head, "project", watched)
    objective, weights = DistillObjective(get_divergence("forward_kl")), TermWeights(1.0, 1.0)
    fused(HEADS["bias"], HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), objective, weights, 4)
    # 4 + 4 + 3 positions, of the student and of the teacher.
    assert len(rooms) == 6 and len({room.data_ptr() for room in rooms}) == 2


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("head", HEADS)
def test_the_metrics_are_those_of_the_students_distribution(head: str, chunk: int) -> None:
    """At temperature 1 and over all rows, whatever the divergence is taken at; an impossible token adds nothing."""
    teacher, weights = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), TermWeights(1.0, 0.5)
    objective = DistillObjective(get_divergence("forward_kl"), temperature=2.0, shared_rows=V - 3)
    logits = naive_logits(HIDDEN.double(), HEADS[head])
    targets = torch.where(torch.arange(N) % 3 == 0, TARGETS, logits.argmax(-1))
    _, terms = fused_terms(HIDDEN, HEADS[head], targets, teacher, objective, weights, chunk)
    assert_same([terms["entropy"]], [torch.distributions.Categorical(logits=logits).entropy()])
    assert terms["mean_token_accuracy"].tolist() == (targets == logits.argmax(-1)).double().tolist()
    if head == "bias":
        bias = HEADS[head].bias_V.clone()
        bias[5] = -torch.inf
        _, without = fused_terms(
            HIDDEN, Head(HEADS[head].weight_VD, bias), targets, teacher, objective, TermWeights(0.0, 0.5), chunk
        )
        rest = logits[:, [i for i in range(V) if i != 5]]
        assert_same([without["entropy"]], [torch.distributions.Categorical(logits=rest).entropy()])


def test_low_precision_products_are_summed_in_float32() -> None:
    objective, weights = DistillObjective(get_divergence("forward_kl")), TermWeights(1.0, 0.5)
    exact, gradients, _ = fused(HEADS["plain"], HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), objective, weights, 4)
    half = TEACHER_HEAD.to(torch.bfloat16)
    hidden, weight = HIDDEN.clone().requires_grad_(), HEADS["plain"].weight_VD.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = fused_terms(
            hidden, Head(weight), TARGETS, HiddenOutputs(TEACHER_HIDDEN.bfloat16(), half), objective, weights, 4
        )
    total.backward()
    assert total.dtype == terms["kd"].dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.05)
    assert_same([hidden.grad, weight.grad], [g.double() for g in gradients], tolerance=0.05)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    objective, weights = DistillObjective(get_divergence("forward_kl")), TermWeights(1.0, 0.5)
    teacher = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    with torch.no_grad():
        total, _ = fused_terms(HIDDEN.clone().requires_grad_(), HEADS["plain"], TARGETS, teacher, objective, weights)
    assert not total.requires_grad
    # A frozen head, as under LoRA.
    hidden = HIDDEN.clone().requires_grad_()
    total, _ = fused_terms(hidden, HEADS["plain"], TARGETS, teacher, objective, weights, 4)
    total.backward()
    assert_same([hidden.grad], [fused(HEADS["plain"], teacher, objective, weights, 4)[1][0].double()])
    # Nothing but the hidden-state term has a weight.
    hidden = HIDDEN.clone().requires_grad_()
    total, terms = fused_terms(hidden, HEADS["plain"], TARGETS, teacher, objective, TermWeights(0.0, 0.0, 1.0), 4)
    total.backward()
    assert total == 0 and (hidden.grad == 0).all() and (terms["kd"] > 0).any()


def test_differentiating_twice_is_refused() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    objective = DistillObjective(get_divergence("forward_kl"))
    total, _ = fused_terms(
        hidden, HEADS["plain"], TARGETS, HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD), objective, TermWeights(1.0, 0.0)
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*Compute the loss again"):
        total.backward()


def test_the_chunk_shrinks_as_the_vocabulary_grows() -> None:
    cpu = torch.device("cpu")
    sizes = [default_chunk(rows, cpu) for rows in (8_192, 32_768, 131_072, 262_144, 10**9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert len({size * rows for size, rows in zip(sizes[:4], (8_192, 32_768, 131_072, 262_144), strict=True)}) == 1


def test_parts_begin_where_they_may() -> None:
    def cut(start: int, stop: int, size: int, starts: list[int] | None) -> list[tuple[int, int]]:
        return [(part.start, part.stop) for part in _parts(slice(start, stop), size, starts)]

    assert cut(0, 7, 3, None) == [(0, 3), (3, 6), (6, 7)]
    assert cut(2, 7, 10, [0, 2, 3]) == [(2, 7)]
    # Back to the last start within reach; where there is none, on to the next.
    assert cut(0, 10, 3, [0, 2, 7, 8]) == [(0, 2), (2, 7), (7, 10)]
    assert cut(0, 10, 4, [0]) == [(0, 10)]
    assert cut(0, 0, 4, []) == []
    for size in range(1, 12):
        starts = [0, 1, 4, 5, 9]
        parts = cut(1, 11, size, starts)
        assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
        assert parts[0][0] == 1 and parts[-1][1] == 11 and {start for start, _ in parts} <= set(starts)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_starts_change_nothing_where_tokens_stand_alone(chunk: int) -> None:
    objective, weights = DistillObjective(get_divergence("jsd")), TermWeights(1.0, 0.5)
    teacher = HiddenOutputs(TEACHER_HIDDEN, TEACHER_HEAD)
    expected, _ = fused_terms(HIDDEN, HEADS["plain"], TARGETS, teacher, objective, weights)
    found, _ = fused_terms(HIDDEN, HEADS["plain"], TARGETS, teacher, objective, weights, chunk, [0, 3, 9])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
