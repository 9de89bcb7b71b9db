"""DSKD-CMA: each model's states mapped to the other's tokens and head by attention (Zhang et al., arXiv 2406.17328).

Shapes: N positions of the student, M of the teacher, d and D their widths.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.inputs import AlignedStates, chunked_cross_entropy, common_chunk
from cbd_trl.losses.divergences import Divergence, get_divergence
from cbd_trl.losses.fused import fused_terms
from cbd_trl.losses.objective import DistillObjective, TermWeights
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.losses.teacher_outputs import HiddenOutputs, LogitPrediction


class CrossModelAttention(nn.Module):
    """The projections of DSKD-CMA, which are not part of the student: query (2d to 2D), t2s (D to d) and s2t (d to D).

    With h the last hidden states, e(x) and e(y) the embeddings of the token that is read and of the one that follows,
    and u the scaling of a vector to a root mean square of 1:

        Q = W_q u[e_S(x); e_S(y)], (N, 2D); K = u[e_T(x); e_T(y)], (M, 2D); Z = Q K^T / sqrt(2D), (N, M)
        h_T2S = softmax(Z) W_t2s (u h_T + u e_T(y)), (N, d); h_S2T = softmax(Z^T) W_s2t h_S, (M, D)

    Each position of the student attends to those of the teacher in the same text, and in the other direction each
    of the teacher's to those of the student. The equations are those of the authors' code (songmzhang/DSKD).

    Deviations: u divides each vector by its own root mean square; in that code it divides what is the teacher's by the
    standard deviation of the batch, so that a loss depends on what else is in the micro-batch, and leaves the
    student's embeddings as they are. The maps have no bias and start orthogonal, so that scores start with a spread
    of about 1; theirs are torch's linear layers.

    Args:
        student_width: d, of hidden states and embeddings.
        teacher_width: D, likewise.
        seed: of the start; the global random state is left alone.
    """

    def __init__(self, student_width: int, teacher_width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(inputs: int, outputs: int) -> Any:
            layer: Any = skip_init(nn.Linear, inputs, outputs, bias=False, dtype=torch.float32)
            nn.init.orthogonal_(layer.weight, generator=generator)
            return layer

        self.query = linear(2 * student_width, 2 * teacher_width)
        self.to_student = linear(teacher_width, student_width)
        self.to_teacher = linear(student_width, teacher_width)

    def forward(self, student: AlignedStates, teacher: AlignedStates) -> tuple[Tensor, Tensor]:
        """Map the states of each model to the other.

        Args:
            student: with embeddings as wide as its states.
            teacher: likewise.

        Returns:
            the teacher's states as the student's (N, d), 0 where the teacher has no position in the text; and the
            student's as the teacher's (M, D), likewise. Gradients go to the maps and, in the second, to the student.

        Raises:
            ValueError: if a model has no embeddings, or widths other than the projections.
        """
        self._check(student, self.to_teacher.in_features, "student")
        self._check(teacher, self.to_student.in_features, "teacher")
        query_NE = self.query(_unit(torch.cat(_embedded(student), -1)))
        input_MD, target_MD = _embedded(teacher)
        key_ME = _unit(torch.cat([input_MD, target_MD], -1)) / math.sqrt(2 * input_MD.shape[1])
        own_ND = self.to_teacher(student.hidden_ND.float())
        value_Md = self.to_student(_unit(teacher.hidden_ND.detach().float()) + _unit(target_MD))
        texts_N = [each.places.text_N for each in (student, teacher)]
        texts = 1 + max((int(text_N.max()) for text_N in texts_N if len(text_N)), default=0)
        of_student, of_teacher = (torch.bincount(text_N, minlength=texts).tolist() for text_N in texts_N)
        # Each text alone. Where one model has no position in it, the other gets a sum of nothing.
        scores = [q @ k.T for q, k in zip(query_NE.split(of_student), key_ME.split(of_teacher), strict=True)]
        to_student = [s.softmax(-1) @ value for s, value in zip(scores, value_Md.split(of_teacher), strict=True)]
        to_teacher = [s.T.softmax(-1) @ own for s, own in zip(scores, own_ND.split(of_student), strict=True)]
        return torch.cat(to_student), torch.cat(to_teacher)

    def _check(self, states: AlignedStates, width: int, name: str) -> None:
        found = [None if states.embedding_VD is None else states.embedding_VD.shape[1], states.hidden_ND.shape[1]]
        if found != [width, width]:
            raise ValueError(
                f"The {name}'s embeddings and hidden states are {found[0]} and {found[1]} wide, the attention was "
                f"made for {width} and {width}: it adds the two. Give `embedding_VD` and make CrossModelAttention for "
                "these widths; for a model whose embeddings have a width of their own use another objective."
            )


def _embedded(states: AlignedStates) -> tuple[Tensor, Tensor]:
    """Look up the embeddings of the tokens that are read and of those that follow, (N, D) each, as constants."""
    table_VD: Any = states.embedding_VD
    table_VD = table_VD.detach()
    return table_VD[states.inputs_N].float(), table_VD[states.targets_N].float()


def _unit(states_ND: Tensor) -> Tensor:
    """Scale each vector to a root mean square of 1."""
    return states_ND * states_ND.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


@dataclass(frozen=True)
class CrossAttention:
    """The objective of DSKD-CMA, in both models' spaces, as in the authors' code (songmzhang/DSKD).

    With s and t the logits of student and teacher, h_T2S and h_S2T from `CrossModelAttention`, t2s = h_T2S H_S^T,
    s2t = h_S2T H_T^T (the heads H constants in these two), and p_T(z) = softmax(z / T):

        kd = sum_N [argmax t2s = y] KL(p_T(t2s) | p_T(s)) + sum_N -log p_1(t2s)[y] + sum_M KL(p_T(t) | p_T(s2t))

    The first term teaches the student, t2s being a constant there; the second trains the maps; the third both. The
    authors' whole loss is (1 - k) ce + k kd with k = 0.5, over the tokens of a step; their maps have a learning rate
    of 1e-3. Here the two weights are `weights`.

    Deviations: both divergences are multiplied by T squared (or the power that the divergence has); positions of the
    teacher are those of aligned tokens, theirs are all it is scored on; heads keep their bias, scale and softcap,
    theirs are the weight alone; t2s has no temperature of its own besides T.

    Attributes:
        attention: trained with the student, and never saved with it.
        divergence: of the first term; that of the authors' scripts is KL(teacher | student).
        temperature: of the first and third, that of the authors' scripts.
    """

    attention: CrossModelAttention
    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 2.0

    def __call__(
        self, student: AlignedStates, teacher: AlignedStates, weights: TermWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch, see `GroupObjective`.

        Args:
            student: its scored positions, with embeddings.
            teacher: of the same texts, with embeddings.
            weights: of the terms at this step.
            chunk: positions at a time; None to choose by the larger vocabulary.

        Returns:
            as there. "kd" holds the first two terms at each position and the third, summed over the tokens of a group,
            on its first: it is a mean over the student's N.
        """
        chunk = common_chunk(student, teacher, chunk)
        student_head, teacher_head = _constant(student.head), _constant(teacher.head)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights.kd > 0):
            as_student_Nd, as_teacher_MD = self.attention(student, teacher)
            learning_N = chunked_cross_entropy(as_student_Nd, student_head, student.targets_N, chunk)
            teacher_total, teacher_terms = fused_terms(
                as_teacher_MD, teacher_head, teacher.targets_N,
                HiddenOutputs(teacher.hidden_ND.detach(), teacher_head),
                DistillObjective(_TEACHER_SPACE, self.temperature), TermWeights(kd=1.0, ce=0.0), chunk,
            )  # fmt: skip
        total, terms = fused_terms(
            student.hidden_ND, student.head, student.targets_N,
            _OutputsWhereRight(HiddenOutputs(as_student_Nd.detach(), student_head), student.targets_N),
            DistillObjective(self.divergence, self.temperature), weights, chunk,
        )  # fmt: skip
        if weights.kd > 0:
            total = total + weights.kd * (learning_N.sum() + teacher_total)
        teacher_kd_N, teacher_ce_N = (
            student.at_group_starts(teacher.group_sums(teacher_terms[name])) for name in ("kd", "teacher_ce")
        )
        return total, {**terms, "kd": terms["kd"] + learning_N.detach() + teacher_kd_N, "teacher_ce": teacher_ce_N}


# The only divergence that the paper has in the teacher's space.
_TEACHER_SPACE = get_divergence("forward_kl")


def _constant(head: Head) -> Head:
    """Detach a head, so that it gets no gradient."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return Head(head.weight_VD.detach(), bias_V, head.scale, head.softcap)


@dataclass(frozen=True)
class _OutputsWhereRight:
    """Teacher outputs that count only where their most likely token is the one that follows."""

    outputs: HiddenOutputs
    targets_N: Tensor

    def at(self, part: slice) -> "_PredictionWhereRight":
        return _PredictionWhereRight(self.outputs.logits(part), self.targets_N[part])


@dataclass(frozen=True)
class _PredictionWhereRight:
    logits_NV: Tensor
    targets_N: Tensor

    def rows(self, rows: slice) -> "_PredictionWhereRight":
        return _PredictionWhereRight(self.logits_NV[rows], self.targets_N[rows])

    def compare(self, student_log_NV: Tensor, divergence: Divergence, temperature: float, top_k: int | None) -> Tensor:
        right_N = self.logits_NV.argmax(-1) == self.targets_N
        return LogitPrediction([self.logits_NV]).compare(student_log_NV, divergence, temperature, top_k) * right_N

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        return cross_entropy(self.logits_NV, targets_N)
