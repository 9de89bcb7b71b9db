"""How the teacher's next tokens are chosen; without torch, so that `cbd-trl generate --help` lists it at once."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodingConfig:
    """How tokens are chosen from the teacher's distribution, by the names of `transformers.GenerationConfig`.

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
        self._check_ignored()

    def _check_ignored(self) -> None:
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
