"""A hybrid: shared tokens compared by a divergence, all others by rank (GOLD, in TRL: `trl.experimental.gold`).

Shapes: G groups, n positions, S shared tokens, V and W vocabulary rows of student and teacher.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.objectives.groups import GroupObjective, GroupPrediction
from cbd_trl.bridge.objectives.sorted_distance import sorted_distance
from cbd_trl.bridge.token_bytes import Vocabulary
from cbd_trl.bridge.vocabulary import match_loaded
from cbd_trl.losses.divergences import Divergence, get_divergence, tempered_log_probs


@dataclass(frozen=True)
class SharedTokens:
    """Tokens of the same bytes, or the same role, in two vocabularies.

    Attributes:
        student_S: their ids in the student's, int64, distinct.
        teacher_S: the same tokens in the teacher's, int64, distinct.
    """

    student_S: Tensor
    teacher_S: Tensor
    _columns: dict[tuple[str, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check that each token has exactly one partner."""
        for name, ids_S in (("student_S", self.student_S), ("teacher_S", self.teacher_S)):
            if ids_S.shape != self.student_S.shape or len(ids_S.unique()) < len(ids_S):
                raise ValueError(
                    f"{name} has {len(ids_S)} ids, {len(ids_S.unique())} of them distinct, beside "
                    f"{len(self.student_S)} of student_S: a shared token has one id in each vocabulary, or "
                    "probabilities would be counted twice. Make them with SharedTokens.of."
                )

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> "SharedTokens":
        """Pair the tokens that `match_vocabularies` finds in both directions.

        Raises:
            ValueError: as there.
        """
        ours, theirs = Vocabulary.of(student), Vocabulary.of(teacher)
        to_teacher, to_student = match_loaded(theirs, ours).source, match_loaded(ours, theirs).source
        pairs = sorted((own, other) for own, other in to_teacher.items() if to_student.get(other) == own)
        ids_2S = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
        return cls(ids_2S[0], ids_2S[1])

    def split(self, name: str, log_gV: Tensor) -> tuple[Tensor, Tensor]:
        """Split the columns of one vocabulary into those of shared tokens, in their order, and all others.

        Args:
            name: "student_S" or "teacher_S".
            log_gV: a column for each row of that vocabulary.
        """
        key = name, log_gV.shape[1], log_gV.device
        if key not in self._columns:
            # Kept where it is used: made anew, the device would be waited for in every chunk.
            others_V = torch.ones(log_gV.shape[1], dtype=torch.bool)
            others_V[getattr(self, name).cpu()] = False
            columns = getattr(self, name), others_V.nonzero().flatten()
            self._columns[key] = (columns[0].to(log_gV.device), columns[1].to(log_gV.device))
        shared_S, others_X = self._columns[key]
        return log_gV.index_select(1, shared_S), log_gV.index_select(1, others_X)


@dataclass(frozen=True)
class SharedHybrid(GroupObjective):
    """Shared tokens by a divergence, the rest by ULD, on the first token of each group.

    m D + (1 - m) ULD, with m the teacher's mass on shared tokens. D is between distributions over S + 1 events, the
    shared tokens and one for all others; where one model has no others, between the distributions given a shared
    token. ULD is of the sorted probabilities of the others. Within one vocabulary it is the divergence alone.

    Deviations from GOLD, which has its formula in code alone:

    - The others are an event of D, so that it is a true divergence, 0 only for the same mass.
    - m is a mass at each position; GOLD's is the share of the teacher's vocabulary that is shared, everywhere.
    - Where a group has several tokens GOLD multiplies their first distribution by the probabilities of the tokens
      after it, in both models, which is not a distribution any more. Here the first alone is compared.
    - Tokens are shared by their bytes or role, in GOLD by how the vocabularies write them.
    - D and ULD are multiplied by the temperature squared (or the power that the divergence has) and T, as elsewhere.

    A limit of both: a token that the other vocabulary splits counts as another token than its first piece. Where
    that is the rule the student is taught not to write it (X-Token, arXiv 2605.21699: numbers of several digits).

    Attributes:
        tokens: the tokens of both vocabularies.
        divergence: GOLD's default, JSD with beta 0.5.
        temperature: T, of both models, above 0.
        top_k: of ULD, see `sorted_distance`.
    """

    tokens: SharedTokens
    divergence: Divergence = get_divergence("jsd")  # noqa: RUF009
    temperature: float = 1.0
    top_k: int | None = None

    def compare(self, student_nV: Tensor, token_log_prob_n: Tensor, teacher: GroupPrediction) -> Tensor:
        """See `GroupObjective`."""
        assert teacher.logits_gW is not None
        student_log_gV = tempered_log_probs(student_nV.index_select(0, teacher.start_g), self.temperature)
        shared_gS, others_g = self.tokens.split("student_S", student_log_gV)
        with torch.no_grad():
            teacher_shared_gS, teacher_others_g = self.tokens.split(
                "teacher_S", tempered_log_probs(teacher.logits_gW, self.temperature)
            )
            mass_g = teacher_shared_gS.exp().sum(-1)
        ranked_g = sorted_distance(others_g.exp(), teacher_others_g.exp(), self.top_k) * self.temperature
        named_g = self.divergence(*_events(shared_gS, others_g, teacher_shared_gS, teacher_others_g))
        named_g = named_g * self.temperature**self.divergence.temperature_power
        return mass_g * named_g + (1.0 - mass_g).clamp(min=0.0) * ranked_g


def _events(
    student_gS: Tensor, student_others_gX: Tensor, teacher_gS: Tensor, teacher_others_gY: Tensor
) -> tuple[Tensor, Tensor]:
    """Form log-probabilities over the S shared tokens and one event for all others, (g, S + 1) for both models."""
    models = ((student_gS, student_others_gX), (teacher_gS, teacher_others_gY))
    if not (student_others_gX.shape[1] and teacher_others_gY.shape[1]):
        return student_gS.log_softmax(-1), teacher_gS.log_softmax(-1)
    student, teacher = (torch.cat([log, others.logsumexp(-1, keepdim=True)], -1) for log, others in models)
    return student, teacher
