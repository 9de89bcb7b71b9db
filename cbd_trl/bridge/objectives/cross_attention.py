"""DSKD-CMA: each model's states brought to the other's tokens and head by attention (Zhang et al., arXiv 2406.17328).

Shapes: N positions of the student, M of the teacher, d and D their widths.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cbd_trl.architectures.backbone import Head
from cbd_trl.bridge.objectives.inputs import AlignedStates, at_group_starts, chunked_cross_entropy, common_chunk
from cbd_trl.losses.divergences import Divergence, get_divergence
from cbd_trl.losses.fused import fused_terms
from cbd_trl.losses.objective import DistillObjective, TermWeights
from cbd_trl.losses.reduction import cross_entropy
from cbd_trl.losses.teacher_outputs import HiddenOutputs, LogitPrediction


class CrossModelAttention(nn.Module):
    """The projections of DSKD-CMA, no part of the student: query (2d to 2D), t2s (D to d) and s2t (d to D).

    With h the last hidden states, e(x) and e(y) the embeddings of the token that is read and of the one that follows,
    and u what brings a vector to a common size:

        Q = W_q u[e_S(x); e_S(y)], (N, 2D); K = u[e_T(x); e_T(y)], (M, 2D); Z = Q K^T / sqrt(2D), (N, M)
        there = softmax(Z) W_t2s (u h_T + u e_T(y)), (N, d); back = softmax(Z^T) W_s2t h_S, (M, D)

    Each position of the student attends to those of the teacher in the same text, and for the way back each of the
    teacher's to those of the student. The equations are those of the authors' code (songmzhang/DSKD).

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
        """Carry the states over.

        Args:
            student: with embeddings as wide as its states.
            teacher: likewise.

        Returns:
            the teacher's states as the student's (N, d), 0 where the teacher has no position in the text; and the
            student's as the teacher's (M, D), likewise. Gradients go to the maps and, in the second, to the student.

        Raises:
            ValueError: for a side without embeddings or with others than were announced.
        """
        self._check(student, self.to_teacher.in_features, "student")
        self._check(teacher, self.to_student.in_features, "teacher")
        query_NE = self.query(_unit(torch.cat(_embedded(student), -1)))
        input_MD, target_MD = _embedded(teacher)
        key_ME = _unit(torch.cat([input_MD, target_MD], -1)) / math.sqrt(2 * input_MD.shape[1])
        own_ND = self.to_teacher(student.hidden_ND.float())
        said_Md = self.to_student(_unit(teacher.hidden_ND.detach().float()) + _unit(target_MD))
        texts = 1 + max((int(side.text_N.max()) for side in (student, teacher) if len(side.text_N)), default=0)
        of_student, of_teacher = (torch.bincount(side.text_N, minlength=texts).tolist() for side in (student, teacher))
        # Each text alone. Where one side has no position in it the other gets a sum of nothing.
        scores = [q @ k.T for q, k in zip(query_NE.split(of_student), key_ME.split(of_teacher), strict=True)]
        there = [s.softmax(-1) @ said for s, said in zip(scores, said_Md.split(of_teacher), strict=True)]
        back = [s.T.softmax(-1) @ own for s, own in zip(scores, own_ND.split(of_student), strict=True)]
        return torch.cat(there), torch.cat(back)

    def _check(self, side: AlignedStates, width: int, name: str) -> None:
        found = [None if side.embedding_VD is None else side.embedding_VD.shape[1], side.hidden_ND.shape[1]]
        if found != [width, width]:
            raise ValueError(
                f"The {name}'s embeddings and hidden states are {found[0]} and {found[1]} wide, the attention was "
                f"made for {width} and {width}: it adds the two. Give `embedding_VD` and make CrossModelAttention for "
                "these widths; for a model whose embeddings have a width of their own use another objective."
            )


def _embedded(side: AlignedStates) -> tuple[Tensor, Tensor]:
    """Embeddings of what is read and of what follows, constants."""
    table_VD: Any = side.embedding_VD
    table_VD = table_VD.detach()
    return table_VD[side.inputs_N].float(), table_VD[side.targets_N].float()


def _unit(states_ND: Tensor) -> Tensor:
    return states_ND * states_ND.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


@dataclass(frozen=True)
class CrossAttention:
    """The objective of DSKD-CMA, in both models' spaces, as in the authors' code (songmzhang/DSKD).

    With s and t the logits of student and teacher, `there` and `back` as `CrossModelAttention` has them, p_T(z) =
    softmax(z / T), t2s = there H_S^T, s2t = back H_T^T, and the heads H constants in these two:

        kd = sum_N [argmax t2s = y] KL(p_T(t2s) | p_T(s)) + sum_N -log p_1(t2s)[y] + sum_M KL(p_T(t) | p_T(s2t))

    The first term teaches the student, t2s being a constant there; the second trains the maps; the third both. The
    authors' whole loss is (1 - k) ce + k kd with k = 0.5, over the tokens of a step; their maps have a learning rate
    of 1e-3. Here the two weights are `weights`.

    Deviations: both divergences are multiplied by T squared (or what the divergence asks for); positions of the
    teacher are those of aligned tokens, theirs are all it is scored on; heads keep their bias, scale and softcap,
    theirs are the weight alone; t2s has no temperature of its own besides T.

    Attributes:
        attention: trained along, and never saved with the student.
        divergence: of the first term; that of the authors' scripts is KL(teacher | student).
        temperature: of the first and third, that of the authors' scripts.
    """

    attention: CrossModelAttention
    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 2.0

    def __call__(
        self, student: AlignedStates, teacher: AlignedStates, weights: TermWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch; see `GroupObjective`.

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
            there_Nd, back_MD = self.attention(student, teacher)
            learning_N = chunked_cross_entropy(there_Nd, student_head, student.targets_N, chunk)
            back_total, back_terms = fused_terms(
                back_MD, teacher_head, teacher.targets_N, HiddenOutputs(teacher.hidden_ND.detach(), teacher_head),
                DistillObjective(_BACK, self.temperature), TermWeights(kd=1.0, ce=0.0), chunk,
            )  # fmt: skip
        total, terms = fused_terms(
            student.hidden_ND, student.head, student.targets_N,
            _OutputsWhereRight(HiddenOutputs(there_Nd.detach(), student_head), student.targets_N),
            DistillObjective(self.divergence, self.temperature), weights, chunk,
        )  # fmt: skip
        if weights.kd > 0:
            total = total + weights.kd * (learning_N.sum() + back_total)
        back_N, teacher_ce_N = (
            at_group_starts(student.group_N, teacher.group_sums(back_terms[name])) for name in ("kd", "teacher_ce")
        )
        return total, {**terms, "kd": terms["kd"] + learning_N.detach() + back_N, "teacher_ce": teacher_ce_N}


# The only one that the paper has there.
_BACK = get_divergence("forward_kl")


def _constant(head: Head) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    return Head(head.weight_VD.detach(), bias_V, head.scale, head.softcap)


@dataclass(frozen=True)
class _OutputsWhereRight:
    """What a signal says, where the token it finds most likely is the one that follows."""

    signal: HiddenOutputs
    targets_N: Tensor

    def at(self, part: slice) -> "_PredictionWhereRight":
        return _PredictionWhereRight(self.signal.logits(part), self.targets_N[part])


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
