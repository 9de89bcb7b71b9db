"""ULD: distributions compared by their sorted probabilities (Boizard et al. 2024, arXiv 2402.12030).

Shapes: G groups, n positions, V and W vocabulary rows of student and teacher, K the most likely.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_trl.bridge.objectives.groups import GroupObjective, GroupPrediction
from cbd_trl.losses.divergences import tempered_log_probs


def sorted_distance(student_GV: Tensor, teacher_GW: Tensor, top_k: int | None = None) -> Tensor:
    """Sum the absolute differences of sorted probabilities, rank by rank, the shorter list filled with zeros.

        sum_i |sort(p_S)_i - sort(p_T)_i|, i from 1 to max(V, W), both in descending order

    This is the paper's Wasserstein distance, in which moving mass from any token to any other costs the same.
    Deviation: `top_k` is ours.

    Args:
        student_GV: probabilities, (G, V) float32; of all tokens, or of some.
        teacher_GW: likewise; a constant.
        top_k: sort the k most likely of each and compare the sums of all others, which is never more; None for all.

    Returns:
        (G,) float32, no unit, in [0, 2].
    """
    most = max(student_GV.shape[1], teacher_GW.shape[1])
    kept = most if top_k is None else min(top_k, most)
    tops = [_ranked(each, kept) for each in (student_GV, teacher_GW.detach())]
    distance_G = (tops[0] - tops[1]).abs().sum(-1)
    if kept == most:
        return distance_G
    rest = [each.sum(-1) - top.sum(-1) for each, top in zip((student_GV, teacher_GW.detach()), tops, strict=True)]
    return distance_G + (rest[0] - rest[1]).abs()


def _ranked(probabilities_GV: Tensor, kept: int) -> Tensor:
    top_GK = probabilities_GV.topk(min(kept, probabilities_GV.shape[1]), dim=-1).values
    return F.pad(top_GK, (0, kept - top_GK.shape[1]))


@dataclass(frozen=True)
class SortedDistance(GroupObjective):
    """ULD at the first token of each group.

    The paper's loss, for answers of m and n tokens, and ours, for G groups of which the g-th begins at position a(g)
    of the student and b(g) of the teacher:

        ce + lambda mean_t sum_i |sort(p_S,t)_i - sort(p_T,t)_i|, t from 1 to min(m, n), lambda = 1.5 and T = 1
        T sum_g sum_i |sort(p_S,a(g))_i - sort(p_T,b(g))_i|, p = softmax(logits / T)

    Deviations:

    - The paper pairs the t-th tokens of both answers and drops what is left over, so that from the first difference on
      it compares distributions on different texts. Where a group begins both models have read the same bytes: those
      positions are paired, and no others.
    - Times T, for the gradients of a first-order distance shrink so.
    - Groups are summed up, and the trainer divides by the student's tokens; the paper's is a mean over the pairs.
    - lambda is the weight of the objective, by default 1.

    Attributes:
        top_k: see `sorted_distance`.
        temperature: T, of both models, above 0. The default is the authors'.
    """

    top_k: int | None = None
    temperature: float = 1.0

    def compare(self, student_nV: Tensor, token_log_prob_n: Tensor, teacher: GroupPrediction) -> Tensor:
        """See `GroupObjective`."""
        assert teacher.logits_gW is not None
        student_gV = tempered_log_probs(student_nV.index_select(0, teacher.start_g), self.temperature).exp()
        with torch.no_grad():
            teacher_gW = tempered_log_probs(teacher.logits_gW, self.temperature).exp()
        return sorted_distance(student_gV, teacher_gW, self.top_k) * self.temperature
