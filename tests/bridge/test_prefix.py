"""The teacher's distribution in the student's tokens, against loops over dictionaries."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.inputs import AlignedStates, Places, group_starts
from cbd_trl.bridge.objectives.prefix import NO_NODE, ROOT, PrefixObjective, PrefixTable
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import TermWeights
from tests.bridge.objective_helpers import TEACHER, Pair, V, W, make_pair, randn, run
from tests.bridge.tokenizers_of_kinds import make_tokenizer

KL = get_divergence("forward_kl")


def spellings(seed: int = 0) -> dict[int, tuple[int, ...]]:
    """Of all of the teacher's tokens but one, of one to three of the student's first four tokens."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for token in range(W - 1):
        length = int(torch.randint(1, 4, (), generator=draw))
        found[token] = tuple(torch.randint(0, 4, (length,), generator=draw).tolist())
    return found


def few_tokens(seed: int) -> Pair:
    """A pair whose tokens are often those of `spellings`."""
    pair = make_pair(rows=6, seed=seed)
    pair.ids_BT %= 4
    pair.labels_BT[pair.labels_BT != -100] = pair.ids_BT[pair.labels_BT != -100]
    pair.ids_RU %= W - 1
    return pair


def naive_target(
    pair: Pair, spelled: dict[int, tuple[int, ...]], number: int, place: int, temperature: float
) -> Tensor:
    """The known probabilities of the student's tokens at a token of a group."""
    head = pair.heads[1]
    logits = (pair.hidden_RUD.double() @ head.weight_VD.double().T + head.bias_V.double()) * head.scale
    logits = head.softcap * torch.tanh(logits / head.softcap)
    row, mine, yours = pair.groups[number]

    def begun(group: int, written: tuple[int, ...]) -> tuple[Tensor, float]:
        """Sum the continuations of a beginning, and the beginning as a whole token."""
        where, _, tokens = pair.groups[group]
        p = (logits[where, tokens[0] - 1] / temperature).softmax(-1)
        going, whole = torch.zeros(V, dtype=torch.float64), 0.0
        for token, own in spelled.items():
            if own == written:
                whole += p[token]
            elif own[: len(written)] == written:
                going[own[len(written)]] += p[token]
        return going, whole

    ids = pair.ids_BT[row].tolist()
    if len(mine) > 1 and len(yours) > 1:
        return torch.zeros(V, dtype=torch.float64)
    if place != mine[0]:
        going, whole = begun(number, tuple(ids[mine[0] : place]))
        total = going.sum() + whole
        return going / total if total > 0 else going
    target, _ = begun(number, ())
    if len(yours) > 1:
        token = int(pair.ids_RU[row, yours[0]])
        p = (logits[row, yours[0] - 1] / temperature).softmax(-1)[token]
        rest = sum(logits[row, y - 1].log_softmax(-1)[pair.ids_RU[row, y]] for y in yours[1:])
        target[ids[place]] += p * rest.exp()
        if token in spelled:
            target[spelled[token][0]] -= p * rest.exp()
    before = pair.groups[number - 1] if number else None
    if before and before[0] == row and before[1][-1] == place - 1 and len(before[2]) == 1:
        going, whole = begun(number - 1, tuple(ids[i] for i in before[1]))
        total = going.sum() + whole
        if total > 0:
            target = target * whole / total + going / total
    return target


@pytest.mark.parametrize(("temperature", "divergence"), [(1.0, "forward_kl"), (2.0, "forward_kl"), (1.0, "jsd")])
@pytest.mark.parametrize("chunk", [None, 3])
def test_equals_its_naive_twin_in_value_and_gradient(temperature: float, divergence: str, chunk: int | None) -> None:
    spelled, pair, weights = spellings(), few_tokens(1), TermWeights(kd=0.7, ce=0.4, hidden=0.0)
    objective = PrefixObjective(PrefixTable.from_spellings(spelled, V), get_divergence(divergence), temperature)
    total, gradients, terms = run(objective, pair, weights, chunk)

    hidden = pair.hidden_BTd.double().requires_grad_()
    weight = pair.heads[0].weight_VD.double().requires_grad_()
    logits = hidden @ weight.T
    expected = torch.zeros((), dtype=torch.float64)
    power = get_divergence(divergence).temperature_power
    values = defaultdict(float)
    for number, (row, mine, _) in enumerate(pair.groups):
        for place in mine:
            target = naive_target(pair, spelled, number, place, temperature)
            known = target.sum()
            if known <= 0:
                continue
            log_q = (logits[row, place - 1] / temperature).log_softmax(-1)
            p = target / known
            if divergence == "forward_kl":
                value = (p * (p.clamp(min=1e-300).log() - log_q)).sum()
            else:
                m = (p + log_q.exp()) / 2
                value = ((p * (p.clamp(min=1e-300) / m).log()).sum() + (log_q.exp() * (log_q - m.log())).sum()) / 2
            value = known * value * temperature**power
            values[row, place] = value.detach().item()
            expected = expected + weights.kd * value
    for row, place in (pair.labels_BT != -100).nonzero().tolist():
        expected = expected - weights.ce * logits[row, place - 1].log_softmax(-1)[pair.ids_BT[row, place]]
    scored = [tuple(where) for where in (pair.labels_BT != -100).nonzero().tolist() if where[1]]
    torch.testing.assert_close(
        terms["kd"].double(), torch.tensor([values[w] for w in scored]).double(), atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert sum(value > 1e-3 for value in values.values()) > 10


def test_within_one_vocabulary_it_is_the_divergence() -> None:
    pair = make_pair(rows=3, seed=2)
    spelled = {token: (token,) for token in range(V)}
    pair.groups = [group for group in pair.groups if len(group[1]) == len(group[2]) == 1]
    pair.group_BT.fill_(-1)
    pair.group_RU.fill_(-1)
    for number, (row, mine, yours) in enumerate(pair.groups):
        pair.group_BT[row, mine], pair.group_RU[row, yours] = number, number
    head = Head(randn(V, TEACHER, seed=2))
    pair.heads = (pair.heads[0], head)
    pair.ids_RU %= V
    _, _, terms = run(PrefixObjective(PrefixTable.from_spellings(spelled, V)), pair, TermWeights(1.0, 0.0, 0.0))
    student, teacher = pair.states(pair.hidden_BTd, pair.heads[0])
    group_start_N = group_starts(student.places.group_N)
    logs = [head.logits(side.hidden_ND[side.places.start_G]).log_softmax(-1)
            for head, side in ((pair.heads[0], student), (head, teacher))]  # fmt: skip
    torch.testing.assert_close(terms["kd"][group_start_N], KL(*logs))
    assert group_start_N.any() and terms["kd"][~group_start_N].abs().max() == 0


def test_is_zero_where_the_student_predicts_what_the_teacher_does() -> None:
    """One group of " run", one of the whole next word: the sum over spellings, and what else could have come."""
    spelled = {0: (0,), 1: (0, 1), 2: (2,), 3: (0, 3)}
    table = PrefixTable.from_spellings(spelled, 4)
    p_W = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]])
    first_rV = table.first_token_probabilities(p_W, 4)
    torch.testing.assert_close(first_rV, torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    node_r = table.child(torch.tensor([ROOT, ROOT]), torch.tensor([0, 1]))
    assert node_r[0] != NO_NODE and node_r[1] == NO_NODE
    longer_rV, whole_r = table.continuations(p_W, torch.tensor([0]), node_r[:1], torch.tensor([1]), 4)
    torch.testing.assert_close(longer_rV, torch.tensor([[0.0, 0.1, 0.0, 0.2]]))
    torch.testing.assert_close(whole_r, torch.tensor([0.4]))

    def one_row(weight_VD: Tensor, ids: list[int], states: Tensor) -> AlignedStates:
        ids_BT = torch.tensor([[9, *ids]]) % 4
        labels_BT = ids_BT.clone()
        labels_BT[0, 0] = -100
        groups_BT = torch.tensor([[-1, *range(len(ids))]])
        places = Places.of_student(labels_BT, groups_BT, torch.zeros_like(ids_BT))
        return AlignedStates.of(states, Head(weight_VD), ids_BT, places)

    # The teacher predicts " run" and then token 2; the student should give 0.4 / 0.7 to that, the rest to the endings.
    eye, log_RUW = torch.eye(4), (p_W + 1e-30).log()[None]
    teacher = one_row(eye, [0, 2], torch.cat([log_RUW, log_RUW[:, :1]], 1))
    right = torch.tensor([[[0.7, 1e-30, 0.3, 1e-30], [1e-30, 1 / 7, 4 / 7, 2 / 7], [0.25] * 4]]).log()
    weights = TermWeights(1.0, 0.0, 0.0)
    _, terms = PrefixObjective(table)(one_row(eye, [0, 2], right), teacher, weights)
    torch.testing.assert_close(terms["kd"], torch.zeros(2), atol=1e-6, rtol=0)
    naively = right.clone()
    naively[0, 1] = (p_W[1] + 1e-30).log()
    _, terms = PrefixObjective(table)(one_row(eye, [0, 2], naively), teacher, weights)
    assert terms["kd"][1] > 1.0


def test_nothing_aligned_is_nothing_learned() -> None:
    pair = make_pair(rows=2, seed=3)
    pair.group_BT.fill_(-1)
    pair.group_RU.fill_(-1)
    table = PrefixTable.from_spellings(spellings(), V)
    total, gradients, terms = run(PrefixObjective(table), pair, TermWeights(1.0, 0.0, 0.0))
    assert total == 0 and terms["kd"].abs().max() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_the_table_is_moved_as_a_whole_and_not_at_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PrefixTable.from_spellings(spellings(), V)
    elsewhere = table.to(torch.device("meta"))
    assert {part.device.type for part in vars(elsewhere).values() if isinstance(part, Tensor)} == {"meta"}
    assert table.to(torch.device("cpu")) is table

    parts = {part.untyped_storage().data_ptr() for part in vars(table).values() if isinstance(part, Tensor)}
    stock, moved, devices = Tensor.to, [], []

    def move(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if tensor.untyped_storage().data_ptr() in parts:
            moved.append(tensor)
        return stock(tensor, *arguments, **options)

    def record(self: PrefixTable, device: torch.device) -> PrefixTable:
        devices.append(device)
        return self

    monkeypatch.setattr(Tensor, "to", move)
    run(PrefixObjective(table), few_tokens(1), TermWeights(0.7, 0.4), chunk=3)
    assert not moved
    monkeypatch.setattr(PrefixTable, "to", record)
    run(PrefixObjective(table), few_tokens(1), TermWeights(0.7, 0.4), chunk=3)
    # To the host for the plan, which no collator made, and to the device of the batch.
    assert len(devices) == 2


@pytest.mark.parametrize("student", ["byte_level", "byte_fallback", "unigram"])
@pytest.mark.parametrize("teacher", ["byte_level", "byte_fallback"])
def test_spellings_have_the_bytes_of_the_token(student: str, teacher: str) -> None:
    one, other = make_tokenizer(student, 400), make_tokenizer(teacher, 500, seed=1)
    table = PrefixTable.of(one, other)
    ours, theirs = token_bytes(one), token_bytes(other)
    spelled = {
        index: [token for token in row if token != -1]
        for index, row in zip(table.ids_M.tolist(), table.spelled_ML.tolist(), strict=True)
    }
    plain = {index: row for index, row in spelled.items() if theirs[index] is not None}
    assert len(plain) > 200 and spelled[other.eos_token_id] == [one.eos_token_id]
    assert all(b"".join(ours[token] or b"" for token in row) == theirs[index] for index, row in plain.items())
    assert max(map(len, plain.values())) > 1
    # Every beginning of a spelling has a node, which counts the tokens that begin so.
    for row in list(plain.values())[::7]:
        node = torch.tensor([ROOT])
        for depth, token in enumerate(row, start=1):
            node = table.child(node, torch.tensor([token]))
            beginning = [own for own in spelled.values() if own[:depth] == row[:depth]]
            assert int(table.end_X[node] - table.start_X[node]) == len(beginning)
            assert int(table.longer_X[node] - table.start_X[node]) == sum(len(own) == depth for own in beginning)


def test_no_spelling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no token of the teacher.*spelled"):
        PrefixTable.from_spellings({}, 4)
