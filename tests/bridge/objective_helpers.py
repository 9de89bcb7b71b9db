"""Helpers of the objectives' tests: a small batch of two models, and naive twins that loop over its groups."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.cross_attention import CrossModelAttention
from cbd_trl.bridge.objectives.inputs import AlignedStates, Places
from cbd_trl.bridge.objectives.prefix import PrefixTable
from cbd_trl.bridge.objectives.registry import BridgeObjective, get_objective
from cbd_trl.bridge.objectives.shared_tokens import SharedTokens
from cbd_trl.losses.divergences import get_divergence
from cbd_trl.losses.objective import TermWeights

V, W, STUDENT, TEACHER = 11, 17, 5, 6
SHARED = SharedTokens(torch.tensor([0, 3, 4, 9]), torch.tensor([2, 1, 16, 5]))


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draw normal values from a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@dataclass
class Pair:
    """A batch of both models; `groups` has for each group its row and the indices of its tokens in both models."""

    ids_BT: Tensor
    labels_BT: Tensor
    group_BT: Tensor
    text_BT: Tensor
    ids_RU: Tensor
    group_RU: Tensor
    hidden_BTd: Tensor
    hidden_RUD: Tensor
    groups: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    heads: tuple[Head, Head] = (
        Head(randn(V, STUDENT, seed=1)),
        Head(randn(W, TEACHER, seed=2), randn(W, seed=3), scale=0.8, softcap=4.0),
    )
    tables: tuple[Tensor, Tensor] = (randn(V, STUDENT, seed=4), randn(W, TEACHER, seed=5))

    def rows(self, rows: list[int]) -> "Pair":
        """Select rows, in that order, and renumber their groups."""
        kept = [group for row in rows for group in self.groups if group[0] == row]
        made = Pair(
            self.ids_BT[rows], self.labels_BT[rows], torch.full_like(self.group_BT[rows], -1),
            torch.where(self.text_BT[rows] == -1, -1, torch.arange(len(rows))[:, None]), self.ids_RU[rows],
            torch.full_like(self.group_RU[rows], -1), self.hidden_BTd[rows], self.hidden_RUD[rows],
        )  # fmt: skip
        for number, (row, mine, yours) in enumerate(kept):
            made.group_BT[rows.index(row), mine] = number
            made.group_RU[rows.index(row), yours] = number
            made.groups.append((rows.index(row), mine, yours))
        return made

    def states(self, hidden_BTd: Tensor, head: Head) -> tuple[AlignedStates, AlignedStates]:
        ours = Places.of_student(self.labels_BT, self.group_BT, self.text_BT)
        theirs = Places.of_teacher(self.group_RU)
        return (
            AlignedStates.of(hidden_BTd, head, self.ids_BT, ours, self.tables[0]),
            AlignedStates.of(self.hidden_RUD, self.heads[1], self.ids_RU, theirs, self.tables[1]),
        )


def make_pair(rows: int = 4, seed: int = 0) -> Pair:
    """Make rows of groups of one to three tokens of each model, between tokens in no group and unscored ones."""
    draw = random.Random(seed)
    spans, groups = [], []
    for row in range(rows):
        place, other = 1, 1
        scored = []
        for _ in range(draw.randint(3, 6)):
            mine, yours = draw.choice([(1, 1), (1, 2), (2, 1), (3, 2), (1, 0), (0, 1)])
            if mine and yours:
                groups.append((row, list(range(place, place + mine)), list(range(other, other + yours))))
            # What is in no group may be scored or not.
            if yours or draw.random() < 0.5:
                scored += range(place, place + mine)
            place, other = place + mine, other + yours
        spans.append((place, other, scored))
    length, width = max(span[0] for span in spans), max(span[1] for span in spans)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(V, (rows, length), generator=generator)
    labels_BT, text_BT = torch.full_like(ids_BT, -100), torch.full_like(ids_BT, -1)
    ids_RU = torch.randint(W, (rows, width), generator=generator)
    pair = Pair(
        ids_BT, labels_BT, torch.full_like(ids_BT, -1), text_BT, ids_RU, torch.full_like(ids_RU, -1),
        randn(rows, length, STUDENT, seed=seed + 6), randn(rows, width, TEACHER, seed=seed + 7), groups,
    )  # fmt: skip
    for row, (place, _, scored) in enumerate(spans):
        labels_BT[row, scored] = ids_BT[row, scored]
        text_BT[row, :place] = row
    for number, (row, mine, yours) in enumerate(groups):
        pair.group_BT[row, mine], pair.group_RU[row, yours] = number, number
    return pair


def make_objective(name: str, divergence: str | None = None, temperature: float | None = None) -> BridgeObjective:
    """Make an objective of the registry with the options that fit a `Pair`."""
    options = {
        "divergence": get_divergence(divergence) if divergence else None,
        "temperature": temperature,
        "tokens": SHARED,
        "table": PrefixTable.from_spellings({token: (token % V, token // 2) for token in range(W - 1)}, V),
        "attention": CrossModelAttention(STUDENT, TEACHER, seed=8),
    }
    return get_objective(name, **options)


def run(
    objective: BridgeObjective, pair: Pair, weights: TermWeights, chunk: int | None = None
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Compute the total, its gradients with respect to the student's states and head, and the terms."""
    hidden, weight = pair.hidden_BTd.clone().requires_grad_(), pair.heads[0].weight_VD.clone().requires_grad_()
    total, terms = objective(*pair.states(hidden, Head(weight)), weights, chunk)
    return total, list(torch.autograd.grad(total, [hidden, weight])), terms


Compare = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def naive(pair: Pair, compare: Compare, weights: TermWeights) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute all logits at once in float64 and loop over groups.

    Args:
        pair: the batch.
        compare: computes the value of a group from its log-probabilities for student and teacher, and their logits
            at its first token.
        weights: of the terms.

    Returns:
        the total, its gradients as from `run`, and the values of the groups.
    """
    hidden = pair.hidden_BTd.double().requires_grad_()
    weight = pair.heads[0].weight_VD.double().requires_grad_()
    student = hidden @ weight.T
    head = pair.heads[1]
    teacher = (pair.hidden_RUD.double() @ head.weight_VD.double().T + head.bias_V.double()) * head.scale
    teacher = head.softcap * torch.tanh(teacher / head.softcap)

    def log_prob(logits: Tensor, ids: Tensor, row: int, places: list[int]) -> Tensor:
        return sum(logits[row, place - 1].log_softmax(-1)[ids[row, place]] for place in places)

    values = [
        compare(
            log_prob(student, pair.ids_BT, row, mine),
            log_prob(teacher, pair.ids_RU, row, yours),
            student[row, mine[0] - 1],
            teacher[row, yours[0] - 1],
        )
        for row, mine, yours in pair.groups
    ]
    total = weights.kd * sum(values)
    for row, place in (pair.labels_BT != -100).nonzero().tolist():
        total = total - weights.ce * log_prob(student, pair.ids_BT, row, [place])
    return total, list(torch.autograd.grad(total, [hidden, weight])), values


def naive_alm(temperature: float) -> Compare:
    """Chunk likelihood by KL(teacher | student)."""

    def compare(ours: Tensor, theirs: Tensor, *_: Tensor) -> Tensor:
        q, p = (ours / temperature).exp(), (theirs / temperature).exp()
        return temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())

    return compare


def naive_distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Sum the differences of sorted probabilities rank by rank."""
    ours, theirs = sorted(ours, reverse=True), sorted(theirs, reverse=True)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(max(len(ours), len(theirs))):
        one = ours[rank] if rank < len(ours) else 0.0
        total = total + abs(one - (theirs[rank] if rank < len(theirs) else 0.0))
    return total


def naive_uld(temperature: float) -> Compare:
    """ULD on the first token of a group."""

    def compare(_: Tensor, __: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        return temperature * naive_distance(list(q), list(p))

    return compare


def naive_shared(temperature: float, tokens: SharedTokens = SHARED) -> Compare:
    """The hybrid of shared tokens by KL(teacher | student)."""

    def compare(_: Tensor, __: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        pairs = list(zip(tokens.student_S.tolist(), tokens.teacher_S.tolist(), strict=True))
        own = [q[i] for i in range(len(q)) if i not in [pair[0] for pair in pairs]]
        other = [p[i] for i in range(len(p)) if i not in [pair[1] for pair in pairs]]
        mass = sum(p[j] for _, j in pairs)
        kl = sum(p[j] * (p[j] / q[i]).log() for i, j in pairs) + sum(other) * (sum(other) / sum(own)).log()
        return mass * kl * temperature**2 + (1 - mass) * naive_distance(own, other) * temperature

    return compare


def naive_dskd(
    pair: Pair, attention: CrossModelAttention, weights: TermWeights, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """Compute DSKD-CMA position by position in float64: the total, gradients as of `naive`, then those of the maps."""
    hidden = pair.hidden_BTd.double().requires_grad_()
    weight = pair.heads[0].weight_VD.double().requires_grad_()
    maps = [layer.weight.detach().double().requires_grad_() for layer in
            (attention.query, attention.to_student, attention.to_teacher)]  # fmt: skip
    query, to_student, to_teacher = maps
    fixed, head = pair.heads[0].weight_VD.double(), pair.heads[1]
    tables = [table.double() for table in pair.tables]

    def unit(x: Tensor) -> Tensor:
        return x / math.sqrt(float((x**2).mean()))

    def in_teacher(x: Tensor) -> Tensor:
        logits = (x @ head.weight_VD.double().T + head.bias_V.double()) * head.scale
        return head.softcap * torch.tanh(logits / head.softcap)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
        return (p * (p / q).log()).sum() * temperature**2

    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(hidden)):
        ours = [t for t in range(1, pair.ids_BT.shape[1]) if pair.labels_BT[row, t] != -100]
        theirs = [u for u in range(1, pair.ids_RU.shape[1]) if pair.group_RU[row, u] != -1]
        queries = [query @ unit(torch.cat([tables[0][pair.ids_BT[row, t - 1]], tables[0][pair.ids_BT[row, t]]]))
                   for t in ours]  # fmt: skip
        keys = [unit(torch.cat([tables[1][pair.ids_RU[row, u - 1]], tables[1][pair.ids_RU[row, u]]])) for u in theirs]
        states = [pair.hidden_RUD[row, u - 1].double() for u in theirs]
        values = [to_student @ (unit(state) + unit(tables[1][pair.ids_RU[row, u]]))
                  for state, u in zip(states, theirs, strict=True)]  # fmt: skip
        score = [[q @ k / math.sqrt(2 * TEACHER) for k in keys] for q in queries]
        for i, t in enumerate(ours):
            target = pair.ids_BT[row, t]
            logits = weight @ hidden[row, t - 1]
            total = total - weights.ce * logits.log_softmax(-1)[target]
            seen = torch.zeros(STUDENT, dtype=torch.float64)
            if keys:
                share = torch.stack(score[i]).softmax(-1)
                seen = sum(share[j] * values[j] for j in range(len(values)))
            seen = fixed @ seen
            total = total - weights.kd * seen.log_softmax(-1)[target]
            if seen.argmax() == target:
                total = total + weights.kd * kl(seen.detach(), logits)
        for j in range(len(theirs)):
            share = torch.stack([score[i][j] for i in range(len(ours))]).softmax(-1)
            back = sum(share[i] * (to_teacher @ hidden[row, t - 1]) for i, t in enumerate(ours))
            total = total + weights.kd * kl(in_teacher(states[j]), in_teacher(back))
    return total, list(torch.autograd.grad(total, [hidden, weight, *maps]))
