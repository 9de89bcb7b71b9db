"""ALM: compares how probable both models find the same bytes (Minixhofer et al. 2025, arXiv 2503.20083, section 3).

Shapes: G groups, n positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.objectives.groups import GroupObjective, GroupPrediction
from cbd_trl.losses.divergences import Divergence, get_divergence

# What float32 leaves of a log-probability that is nearly 0, in nats.
_SMALLEST = 1e-6
# No log-probability is lower, except of what a model rules out.
_LARGEST = 1e6


def chunk_likelihood(
    student_log_G: Tensor, teacher_log_G: Tensor, divergence: Divergence, temperature: float = 100.0
) -> Tensor:
    """Compute the divergence over two events, "these bytes" and "anything else", p ** (1 / T) and the rest.

    f(p_T^(1/T) | p_S^(1/T)) + f(1 - p_T^(1/T) | 1 - p_S^(1/T)), the "ALM objective" of section 3 for one chunk. With
    T = 1 it is the divergence of a coarse view of the next bytes, nearly 0 for chunks that both models find unlikely.
    With a high T it approaches the divergence of two rates of surprise, r_T log(r_T / r_S) - r_T + r_S for KL with
    r = -log p (appendix A.2), in which every chunk counts.

    Deviations:

    - Multiplied by T. All of it shrinks as 1 / T, so that beside a cross-entropy the paper's own, at T = 100, is next
      to nothing (table 9: with weights from 1/3 to 3 hardly better than cross-entropy alone); the paper weighs by the
      norms of gradients instead (section 3.3).
    - No "outcome chunk debiasing" (section 3.1): the paper multiplies a chunk's probability by that of a word
      beginning after it, and joins a chunk to the next where the teacher finds that less likely than 0.1. Without it
      a group that ends inside a word carries what the tokenizers rule out there. The cross-entropy beside it sees the
      student's tokens as they are.
    - Chunks are summed up, and the trainer divides by the student's tokens; the paper's is a mean over chunks.
    - A log-probability above -1e-6 counts as that, with its gradient, where the authors' code takes 1e-6 from both
      models.

    Args:
        student_log_G: log-probabilities of the groups, (G,), nats.
        teacher_log_G: likewise; a constant.
        divergence: of two events, what `cbd_trl.losses.divergences.get_divergence` returned.
        temperature: T, above 0.

    Returns:
        (G,) float32, nats per group.
    """
    student_log_G2, teacher_log_G2 = (_two_events(log_G, temperature) for log_G in (student_log_G, teacher_log_G))
    return divergence(student_log_G2, teacher_log_G2.detach()) * temperature


def _two_events(log_G: Tensor, temperature: float) -> Tensor:
    log_G = log_G.float().clamp(min=-_LARGEST)
    # A clamp would take the gradient from a student that is too sure.
    log_G = (log_G - (log_G.detach() + _SMALLEST).clamp(min=0.0)) / temperature
    return torch.stack([log_G, torch.log(-torch.expm1(log_G))], -1)


@dataclass(frozen=True)
class ChunkLikelihood(GroupObjective):
    """Chunk likelihood, which reads the log-probabilities of the tokens in the text alone.

    Attributes:
        divergence: the default is the paper's, KL(teacher | student). The authors' code has binary cross-entropy
            instead, of the same gradient but not 0 where both are the same.
        temperature: the default is that of the paper's main results, at which unlikely chunks, that is long ones,
            count too. Its later comparison finds 5 a little better (appendix A.2, footnote 16).
    """

    divergence: Divergence = get_divergence("forward_kl")  # noqa: RUF009
    temperature: float = 100.0

    @property
    def needs_logits(self) -> bool:
        """See `GroupObjective`."""
        return False

    def compare(self, student_nV: Tensor, token_log_prob_n: Tensor, teacher: GroupPrediction) -> Tensor:
        """See `GroupObjective`."""
        return chunk_likelihood(teacher.sums(token_log_prob_n), teacher.log_prob_g, self.divergence, self.temperature)
