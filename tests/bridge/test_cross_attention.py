"""Which parts of DSKD-CMA are trained, and by which term."""

import pytest
import torch

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.cross_attention import CrossAttention, CrossModelAttention
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import TermWeights
from tests.bridge.objective_helpers import STUDENT, TEACHER, W, make_objective, make_pair, randn, run

PAIR = make_pair()


def test_the_start_is_seeded_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (CrossModelAttention(STUDENT, TEACHER, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.query.weight, same.query.weight) and not torch.equal(one.query.weight, other.query.weight)
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == {
        "query.weight": (2 * TEACHER, 2 * STUDENT),
        "to_student.weight": (STUDENT, TEACHER),
        "to_teacher.weight": (TEACHER, STUDENT),
    }


def test_of_the_teacher_and_of_tables_nothing_is_trained() -> None:
    objective = make_objective("dskd-cma")
    pair = make_pair()
    heads = [Head(head.weight_VD.clone().requires_grad_()) for head in pair.heads]
    tables = [table.clone().requires_grad_() for table in pair.tables]
    teacher_hidden = pair.hidden_RUD.clone().requires_grad_()
    pair.heads, pair.tables, pair.hidden_RUD = tuple(heads), tuple(tables), teacher_hidden
    total, _ = objective(*pair.states(pair.hidden_BTd.clone().requires_grad_(), heads[0]), TermWeights(kd=1.0, ce=0.0))
    total.backward()
    assert heads[0].weight_VD.grad is not None
    assert all(tensor.grad is None for tensor in (heads[1].weight_VD, *tables, teacher_hidden))


def test_without_weight_the_maps_are_not_trained_and_the_terms_are_known_all_the_same() -> None:
    objective = make_objective("dskd-cma")
    assert isinstance(objective, CrossAttention)
    head = Head(PAIR.heads[0].weight_VD.clone().requires_grad_())
    total, terms = objective(*PAIR.states(PAIR.hidden_BTd, head), TermWeights(kd=0.0, ce=1.0))
    total.backward()
    assert all(p.grad is None for p in objective.attention.parameters())
    _, _, weighted = run(objective, PAIR, TermWeights(kd=1.0, ce=1.0))
    torch.testing.assert_close(terms["kd"], weighted["kd"])
    assert total.item() == pytest.approx(terms["ce"].sum().item(), rel=1e-6)


def test_the_maps_learn_and_the_divergence_changes_the_loss() -> None:
    objective = make_objective("dskd-cma")
    assert isinstance(objective, CrossAttention)
    attention = objective.attention
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.05)
    states = PAIR.states(PAIR.hidden_BTd, PAIR.heads[0])
    right = []
    for _ in range(60):
        total, _ = objective(*states, TermWeights(kd=1.0, ce=0.0))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen_NV = PAIR.heads[0].logits(attention(*states)[0].detach())
        right.append(int((seen_NV.argmax(-1) == states[0].targets_N).sum()))
    # The maps learn what follows from the teacher's states, and where they know it the student is compared.
    assert right[-1] > right[0] + 5
    found = {
        name: run(CrossAttention(attention, get_divergence(name)), PAIR, TermWeights(kd=1.0, ce=0.0))[0].item()
        for name in ("forward_kl", "reverse_kl")
    }
    assert found["forward_kl"] != pytest.approx(found["reverse_kl"], rel=1e-4)


def test_sides_of_other_widths_are_refused() -> None:
    pair = make_pair()
    attention = CrossModelAttention(STUDENT, TEACHER + 1)
    states = pair.states(pair.hidden_BTd, pair.heads[0])
    with pytest.raises(ValueError, match=r"teacher.*\b6 and 6\b.*\b7 and 7\b"):
        attention(*states)
    pair.tables = (pair.tables[0], randn(W, 3, seed=0))
    with pytest.raises(ValueError, match=r"teacher.*\b3 and 6\b"):
        CrossModelAttention(STUDENT, TEACHER)(*pair.states(pair.hidden_BTd, pair.heads[0]))
