"""The teacher's next-token distribution in the student's tokens: summed by the bytes that its tokens begin with.

Shapes: N positions of the student; V vocabulary rows of the student.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.objectives.inputs import Side
from cbd_trl.bridge.objectives.prefix import PrefixSaid, PrefixSignal
from cbd_trl.bridge.objectives.prefix_table import PrefixTable
from cbd_trl.bridge.objectives.walk import compared_terms, walk
from cbd_trl.losses.divergences import Divergence, get_divergence, tempered_log_probs
from cbd_trl.losses.objective import Weights


@dataclass(frozen=True)
class PrefixObjective:
    """A divergence at every position at which the teacher's tokens tell what the student's next one is.

    - Where a token begins on both sides, the teacher's distribution is summed by the first of the student's tokens
      that spell each of its own: p(v) is the sum of p(t) over the t that begin with v.
    - Within a token of the teacher, the sum is over the tokens that begin with what the student has said of it.
    - Where a token has ended that others begin with (" run", " running"), the two are weighed by what the teacher said
      of them one token before.
    - One token of the student for several of the teacher has the probability of the group.
    - Groups of several tokens on both sides say nothing, and what else is not known (whether a token ends here, where
      the text goes on within it; tokens that the student cannot spell) is left to the student: it is taken out of both
      distributions, and the rest weighs as much as the teacher's probability of it.

    After the conversion of token to byte and character probabilities by sums over covering tokens (Phan et al. 2024,
    arXiv 2410.09303; Vieira et al. 2024, arXiv 2412.03719), with covers of one token, two where one has ended: nothing
    is read again by the teacher, as an exact conversion would ask (arXiv 2512.14954). With one vocabulary it is the
    divergence itself.

    Attributes:
        table: the teacher's tokens by the student's.
        divergence: between distributions over the student's tokens.
        temperature: T, of both sides, above 0.
    """

    table: PrefixTable
    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 1.0

    def terms(self, student_NV: Tensor, teacher: PrefixSaid, targets_N: Tensor, weights: Weights) -> dict[str, Tensor]:
        """See `cbd_trl.losses.objective.LogitObjective`."""
        return compared_terms(
            student_NV, targets_N, teacher.teacher_ce_n, weights, lambda _: self._compare(student_NV, teacher)
        )

    def _compare(self, student_NV: Tensor, teacher: PrefixSaid) -> Tensor:
        student_log_NV = tempered_log_probs(student_NV, self.temperature)
        known_N = teacher.target_nV.sum(-1, keepdim=True)
        log_NV = torch.where(known_N > 0, teacher.target_nV.log() - known_N.log(), student_log_NV.detach())
        kd_N = known_N[:, 0] * self.divergence(student_log_NV, log_NV)
        return kd_N * self.temperature**self.divergence.temperature_power

    def __call__(
        self, student: Side, teacher: Side, weights: Weights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, as `GroupObjective` has it, but "kd" has a value at each position.

        Args:
            student: its scored positions.
            teacher: of the same texts.
            weights: of the terms at this step.
            chunk: positions at a time; None to choose by the larger vocabulary.
        """

        def ask(chunk: int) -> PrefixSignal:
            return PrefixSignal.of(student, teacher, self.table, self.temperature, chunk)

        return walk(student, teacher, ask, self, weights, chunk)
