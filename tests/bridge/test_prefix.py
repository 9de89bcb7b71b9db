"""The teacher's distribution in the student's tokens, against loops over dictionaries."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from cbd_trl.bridge.prefix_objective import PrefixObjective
from cbd_trl.bridge.prefix_table import NO_NODE, ROOT, PrefixTable
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import Weights
from tests.bridge.objective_helpers import Pair, V, W, make_pair, naive, randn, run
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


def naive_target(pair: Pair, spelled: dict[int, tuple[int, ...]], number: int, place: int, temperature: float) -> Tensor:
    """The known probabilities of the student's tokens at a token of a group."""
    head = pair.heads[1]
    logits = (pair.hidden_RUD.double() @ head.weight_VD.double().T + head.bias_V.double()) * head.scale
    logits = head.softcap * torch.tanh(logits / head.softcap)
    row, mine, yours = pair.groups[number]

    def begun(group: int, said: tuple[int, ...]) -> tuple[Tensor, float]:
        """Continuations of a beginning, and the beginning as a whole token."""
        where, _, tokens = pair.groups[group]
        p = (logits[where, tokens[0] - 1] / temperature).softmax(-1)
        going, whole = torch.zeros(V, dtype=torch.float64), 0.0
        for token, own in spelled.items():
            if own == said:
                whole += p[token]
            elif own[: len(said)] == said:
                going[own[len(said)]] += p[token]
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
    spelled, pair, weights = spellings(), few_tokens(1), Weights(kd=0.7, ce=0.4, hidden=0.0)
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
    torch.testing.assert_close(terms["kd"].double(), torch.tensor([values[w] for w in scored]).double(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert sum(value > 1e-3 for value in values.values()) > 10
