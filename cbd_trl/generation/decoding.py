"""How the teacher's next tokens are chosen."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class DecodingConfig:
    """What is chosen from the teacher's distribution, by the names of `transformers.GenerationConfig`.

    The defaults draw from the distribution as it is. The teacher's own generation_config.json gives the tokens that
    end a completion and nothing else: what a file holds depends on what is written here alone.

    Args:
        max_new_tokens: the most tokens of a completion.
        min_new_tokens: the fewest, before a token that ends it.
        do_sample: draw, instead of taking the most likely token.
        temperature: divides the logits before a token is drawn.
        top_k: draw among the k most likely tokens; 0 for all.
        top_p: draw among the fewest most likely tokens that have this probability together.
        min_p: draw among tokens at least this times as probable as the most likely one.
        num_beams: beams of a beam search (SeqKD as Kim and Rush, arXiv 1606.07947, do it); 1 for none.
        num_return_sequences: completions drawn for each prompt.

    Raises:
        ValueError: for a value that has no meaning, or would be ignored.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens of a completion."})
    min_new_tokens: int = field(default=0, metadata={"help": "The fewest, before a token that ends it."})
    do_sample: bool = field(
        default=True, metadata={"help": "Draw from the distribution, instead of taking the most likely token."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before a token is drawn."})
    top_k: int = field(default=0, metadata={"help": "Draw among the k most likely tokens; 0 for all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Draw among the fewest most likely tokens that have this probability together."}
    )
    min_p: float = field(
        default=0.0, metadata={"help": "Draw among tokens at least this times as probable as the most likely one."}
    )
    num_beams: int = field(default=1, metadata={"help": "Beams of a beam search, with --do_sample false; 1 for none."})
    num_return_sequences: int = field(default=1, metadata={"help": "Completions drawn for each prompt."})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"{name}={count}: it must be at least 1.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: it must be from 0 to max_new_tokens={self.max_new_tokens}."
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature}: it divides the logits, so it must be above 0 and finite. For the "
                "most likely tokens set do_sample=False."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k must be 0 (all tokens) or more, "
                "top_p above 0 and at most 1, min_p from 0 to 1."
            )
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        drawing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_return_sequences": 1}
        ignored = [name for name, unused in drawing.items() if getattr(self, name) != unused]
        if not self.do_sample and ignored:
            raise ValueError(
                f"{ignored[0]}={getattr(self, ignored[0])} with do_sample=False: nothing is drawn, so it would change "
                "nothing. Leave one of the two out."
            )
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"num_beams={self.num_beams} with do_sample=True: a beam search takes the likeliest completion and "
                "draws none. Set do_sample=False, or num_beams=1."
            )


def row_numbers(seed: int, row: int, count: int) -> Tensor:
    """Uniform random numbers of a row: a function of seed and row number alone, the same on every device.

    Args:
        seed: of the corpus.
        row: its number in the file, from 0.
        count: N.

    Returns:
        (N,) float64 in [0, 1), on the CPU.
    """
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


class DrawByRow(LogitsProcessor):
    """Leaves each row the one token that its next random number falls on, in the order of the vocabulary.

    Greedy search behind it then draws from the distribution.

    Args:
        seed: of the corpus.
        rows: numbers of the B rows.
        width: tokens of the prompts, padding included.
        max_new_tokens: N.
    """

    def __init__(self, seed: int, rows: Sequence[int], width: int, max_new_tokens: int) -> None:
        self._width = width
        self._numbers_NB = torch.stack([row_numbers(seed, row, max_new_tokens) for row in rows], dim=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate` asks of a processor.

        Args:
            input_ids: (B, T).
            scores: (B, V), softmax of which is drawn from.

        Returns:
            (B, V): 0 at the token drawn, -inf elsewhere.
        """
        # Apple's devices have no float64, and in float32 the sum over a vocabulary loses its rare tokens.
        where = "cpu" if scores.device.type == "mps" else scores.device
        sums_BV = scores.to(where).double().softmax(-1).cumsum(-1)
        # Exactly 1 from the last token that can be drawn on: every number below 1 falls on one that can.
        sums_BV = sums_BV / sums_BV[:, -1:]
        numbers_B1 = self._numbers_NB[input_ids.shape[1] - self._width, :, None].to(where)
        drawn_B1 = torch.searchsorted(sums_BV, numbers_B1, right=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)


class RefuseNonNumbers(LogitsProcessor):
    """Lets no logits pass that are not numbers: whatever is chosen from them means nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What `generate` asks of a processor.

        Args:
            input_ids: (B, T).
            scores: (B, V).

        Returns:
            the scores.

        Raises:
            ValueError: if one is NaN.
        """
        if scores.isnan().any():
            raise ValueError(
                "The teacher's logits are not numbers (NaN). Its weights are damaged, or its dtype is too narrow: "
                "load it in float32 or bfloat16."
            )
        return scores
