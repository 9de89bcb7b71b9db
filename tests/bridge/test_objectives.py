"""What holds for every objective across vocabularies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.cross_attention import CrossAttention, CrossModelAttention
from cbd_trl.bridge.objectives.inputs import AlignedStates, Places
from cbd_trl.bridge.objectives.prefix import PrefixTable
from cbd_trl.bridge.objectives.registry import OBJECTIVES, get_mixture, get_objective
from cbd_trl.bridge.objectives.shared_tokens import SharedTokens
from cbd_trl.losses.objective import TermWeights
from tests.bridge.objective_helpers import (
    SHARED,
    STUDENT,
    Pair,
    V,
    make_objective,
    make_pair,
    naive,
    naive_alm,
    naive_dskd,
    naive_shared,
    naive_uld,
    randn,
    run,
)

NAMES = list(OBJECTIVES)
IN_PLACE = [name for name in NAMES if name != "dskd-cma"]
PAIR = make_pair()
BOTH = TermWeights(kd=0.7, ce=0.4)
# That of "prefix" is in test_prefix.py.
TWINS = {"alm": naive_alm, "uld": naive_uld, "shared": naive_shared}


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("weights", [BOTH, TermWeights(kd=1.0, ce=0.0), TermWeights(kd=0.0, ce=1.0)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", TWINS)
def test_chunked_is_the_naive_twin_in_value_and_gradient(
    name: str, temperature: float, weights: TermWeights, chunk: int
) -> None:
    expected, gradients, values = naive(PAIR, TWINS[name](temperature), weights)
    divergence = "forward_kl" if name == "shared" else None
    total, ours, terms = run(make_objective(name, divergence, temperature), PAIR, weights, chunk)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(ours, gradients)
    # Each group's value stands on its first token, even where it has no weight.
    first = torch.zeros_like(PAIR.ids_BT, dtype=torch.float64)
    for (row, mine, _), value in zip(PAIR.groups, values, strict=True):
        first[row, mine[0]] = value.detach()
    scored = PAIR.labels_BT[:, 1:] != -100
    torch.testing.assert_close(terms["kd"].double(), first[:, 1:][scored], rtol=1e-5, atol=1e-5)
    assert not any(term.requires_grad or term.shape != (int(scored.sum()),) for term in terms.values())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_cross_attention_is_the_naive_twin_in_value_and_gradient(chunk: int) -> None:
    objective = make_objective("dskd-cma", temperature=1.5)
    assert isinstance(objective, CrossAttention)
    attention = objective.attention
    expected, gradients = naive_dskd(PAIR, attention, BOTH, 1.5)
    hidden, weight = PAIR.hidden_BTd.clone().requires_grad_(), PAIR.heads[0].weight_VD.clone().requires_grad_()
    total, _ = objective(*PAIR.states(hidden, Head(weight)), BOTH, chunk)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    maps = [layer.weight for layer in (attention.query, attention.to_student, attention.to_teacher)]
    assert_same(list(torch.autograd.grad(total, [hidden, weight, *maps])), gradients)


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_cross_entropy_is_that_of_all_tokens_of_the_groups(name: str) -> None:
    _, _, values = naive(PAIR, lambda ours, theirs, *_: -theirs, BOTH)
    _, _, terms = run(make_objective(name), PAIR, BOTH)
    assert terms["teacher_ce"].sum().item() == pytest.approx(sum(values).item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_the_same_whatever_the_batch_and_the_order_of_its_rows(name: str) -> None:
    objective = make_objective(name)
    total, (hidden_grad, head), _ = run(objective, PAIR, BOTH)
    turned, (turned_hidden, turned_head), _ = run(objective, PAIR.rows([2, 0, 3, 1]), BOTH)
    assert turned.item() == pytest.approx(total.item(), rel=1e-5)
    assert_same([turned_hidden, turned_head], [hidden_grad[[2, 0, 3, 1]].double(), head.double()])
    parts = [run(objective, PAIR.rows(rows), BOTH) for rows in ([0], [1, 2, 3])]
    assert sum(part[0] for part in parts).item() == pytest.approx(total.item(), rel=1e-5)
    split = [torch.cat([part[1][0] for part in parts]), sum(part[1][1] for part in parts)]
    assert_same(split, [hidden_grad.double(), head.double()])


def without_groups(pair: Pair, labels: Tensor) -> Pair:
    nothing = torch.full_like(pair.group_BT, -1), torch.full_like(pair.group_RU, -1)
    return Pair(
        pair.ids_BT, labels, nothing[0], pair.text_BT, pair.ids_RU, nothing[1], pair.hidden_BTd, pair.hidden_RUD
    )


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("name", IN_PLACE)
def test_where_nothing_is_aligned_the_cross_entropy_is_left(name: str, chunk: int) -> None:
    pair = without_groups(PAIR, PAIR.labels_BT)
    total, gradients, terms = run(make_objective(name), pair, TermWeights(kd=1.0, ce=0.0), chunk)
    assert total == 0 and all((gradient == 0).all() for gradient in gradients)
    total, _, terms = run(make_objective(name), pair, BOTH, chunk)
    assert total.item() == pytest.approx(BOTH.ce * terms["ce"].sum().item(), rel=1e-5) and total > 0


@pytest.mark.parametrize("name", NAMES)
def test_everything_masked_gives_zero_with_a_gradient_of_zero(name: str) -> None:
    pair = without_groups(PAIR, torch.full_like(PAIR.labels_BT, -100))
    total, gradients, terms = run(make_objective(name), pair, BOTH)
    assert total == 0 and all((gradient == 0).all() for gradient in gradients)
    assert {term.shape for term in terms.values()} == {(0,)}


@pytest.mark.parametrize("name", IN_PLACE)
def test_zero_where_teacher_and_student_are_the_same(name: str) -> None:
    ids, head = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0)), Head(randn(V, STUDENT, seed=0))
    group = torch.cat([torch.full((2, 1), -1), torch.arange(16).view(2, 8)], 1)
    hidden = randn(2, 9, STUDENT, seed=1, scale=2.0)
    tokens = SharedTokens(torch.arange(V), torch.arange(V))
    table = PrefixTable.from_spellings({token: (token,) for token in range(V)}, V)
    objective = get_objective(name, tokens=tokens, table=table)
    leaf = hidden.clone().requires_grad_()
    text = torch.arange(2)[:, None].expand(2, 9)
    states = (
        AlignedStates.of(leaf, head, ids, Places.of_student(ids, group, text)),
        AlignedStates.of(hidden, head, ids, Places.of_teacher(group)),
    )
    total, terms = objective(*states, TermWeights(kd=1.0, ce=0.0))
    total.backward()
    assert total.item() == pytest.approx(0.0, abs=1e-4) and len(terms["kd"]) == 16
    assert leaf.grad is not None and leaf.grad.abs().max() < 2e-3
    torch.testing.assert_close(terms["teacher_ce"], terms["ce"], rtol=1e-4, atol=1e-5)
    other = AlignedStates.of(randn(2, 9, STUDENT, seed=2, scale=2.0), head, ids, Places.of_teacher(group))
    assert objective(states[0], other, TermWeights(kd=1.0, ce=0.0))[0] > 1.0


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_held_a_chunk_of_whole_groups_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[int] = []
    project: Callable[..., Tensor] = Head.project
    monkeypatch.setattr(
        Head, "project", lambda head, rows, *out: projected.append(len(rows)) or project(head, rows, *out)
    )
    run(make_objective(name), PAIR, BOTH, chunk=4)
    # The longest group has three tokens.
    assert max(projected) <= 4 < int((PAIR.labels_BT != -100).sum())
    projected.clear()
    run(make_objective(name), PAIR, BOTH, chunk=1)
    # For "prefix" the group in front of the part is looked at too.
    assert max(projected) == {"dskd-cma": 1, "prefix": 2}.get(name, 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_changes_the_loss(name: str) -> None:
    totals = {run(make_objective(name, temperature=t), PAIR, BOTH)[0].item() for t in (1.0, 2.0, 5.0)}
    assert len(totals) == 3


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    weights = {"alm": 0.3, "uld": 2.0, "shared": 0.5}
    parts = [run(make_objective(name), PAIR, TermWeights(kd=weight, ce=0.0)) for name, weight in weights.items()]
    total, gradients, _ = run(get_mixture(weights, tokens=SHARED), PAIR, TermWeights(kd=1.0, ce=0.0), chunk=3)
    assert total.item() == pytest.approx(sum(part[0] for part in parts).item(), rel=1e-5)
    assert_same(gradients, [sum(part[1][index] for part in parts).double() for index in (0, 1)])
    alone, _, _ = run(get_mixture({"alm": 1.0}), PAIR, BOTH)
    assert alone.item() == pytest.approx(run(make_objective("alm"), PAIR, BOTH)[0].item(), rel=1e-6)


def test_mixtures_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'uld'.*\b0\.0\b"):
        get_mixture({"alm": 1.0, "uld": 0.0})
    with pytest.raises(ValueError, match="alm, uld"):
        get_mixture({})
    with pytest.raises(ValueError, match=r"'dskd-cma'.*get_objective"):
        get_mixture({"dskd-cma": 1.0}, attention=CrossModelAttention(2, 3))
    with pytest.raises(ValueError, match=r"'ulb'.*'uld'"):
        get_mixture({"alm": 1.0, "ulb": 1.0})


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'almm'.*alm, uld, .*'alm'"):
        get_objective("almm")
    with pytest.raises(ValueError, match=r"'shared'.*`tokens`.*SharedTokens\.of"):
        get_objective("shared")
    with pytest.raises(ValueError, match=r"'dskd-cma'.*`attention`.*CrossModelAttention"):
        get_objective("dskd-cma", tokens=SHARED)
    with pytest.raises(ValueError, match=r"temperature=0\.0\b"):
        get_objective("uld", temperature=0.0)
    with pytest.raises(ValueError, match=r"top_k=0\b"):
        get_objective("uld", top_k=0)
