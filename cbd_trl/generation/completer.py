"""Completes batches of prompts, each prompt as if it were alone."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cbd_trl.architectures.backbone import own_forward
from cbd_trl.generation.decoding import DecodingConfig
from cbd_trl.generation.prompts import Prompt
from cbd_trl.utils.modeling import has_float64
from cbd_trl.utils.tokenizers import vocabulary_rows

# A character whose last bytes are missing, as the cut fell between them.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Completion:
    """A completion by the teacher.

    Attributes:
        text: without special tokens, and without what is left of a character that was cut through.
        tokens: how many, the one that ended it included.
        finish_reason: `stop` if the teacher ended it, `length` if max_new_tokens did.
    """

    text: str
    tokens: int
    finish_reason: str


class Completer:
    """Completes prompts, each as if it were alone.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        decoding: how tokens are chosen.
        seed: of the draws.

    Raises:
        ValueError: if the tokenizer has tokens that the model has no row for.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: DecodingConfig, seed: int
    ) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._decoding = decoding
        self._seed = seed
        highest, rows = max(tokenizer.get_vocab().values()), vocabulary_rows(model)
        if highest >= rows:
            raise ValueError(
                f"The tokenizer has tokens up to id {highest} and the teacher {rows} vocabulary rows: it is another "
                "model's tokenizer. Pass the teacher's as `processing_class`."
            )
        own = model.generation_config
        of_model: Any = None if own is None else own.eos_token_id
        ends = [*(of_model if isinstance(of_model, list) else [of_model]), self._tokenizer.eos_token_id]
        self.ends = sorted({token for token in ends if token is not None})
        # Masked wherever it stands: any token will do.
        self._padding = next(iter([*self.ends, 0]))

    def complete(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Completion]:
        """Complete a batch.

        Args:
            prompts: B of them.
            rows: their numbers in the file, which their draws depend on.

        Returns:
            B completions.

        Raises:
            ValueError: if a logit is not a number.
        """
        width = max(len(prompt.ids) for prompt in prompts)
        padded = [[self._padding] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
        kept = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        device = self._model.device
        with torch.no_grad(), own_forward(self._model), self._own_settings() as settings:
            written = self._model.generate(
                generation_config=settings,
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(kept, device=device),
                logits_processor=self._processors(rows, width),
            )
        new_tokens = written[:, width:].tolist()
        return [self._finish(prompt, ids) for prompt, ids in zip(prompts, new_tokens, strict=True)]

    def _processors(self, rows: Sequence[int], width: int) -> LogitsProcessorList:
        decoding, processors = self._decoding, LogitsProcessorList([CheckNumbers()])
        if decoding.do_sample:
            if decoding.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_k > 0:
                processors.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1.0:
                processors.append(TopPLogitsWarper(decoding.top_p))
            if decoding.min_p > 0.0:
                processors.append(MinPLogitsWarper(decoding.min_p))
            processors.append(DrawByRow(self._seed, rows, width, decoding.max_new_tokens))
        return processors

    @contextmanager
    def _own_settings(self) -> Iterator[GenerationConfig]:
        """Replace the model's generation config meanwhile, which `generate` takes missing settings from."""
        theirs = self._model.generation_config
        ours = self._model.generation_config = GenerationConfig(
            max_new_tokens=self._decoding.max_new_tokens,
            min_new_tokens=self._decoding.min_new_tokens or None,
            num_beams=self._decoding.num_beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.ends or None,
            pad_token_id=self._padding,
        )
        try:
            yield ours
        finally:
            self._model.generation_config = theirs

    def _finish(self, prompt: Prompt, ids: list[int]) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = self._text(prompt, ids[:end])
        if end is None:
            return Completion(text.rstrip(_INCOMPLETE), len(ids), "length")
        return Completion(text, end + 1, "stop")

    def _text(self, prompt: Prompt, ids: list[int]) -> str:
        """The text of new tokens; white space between it and the text of the prompt is not lost."""
        if prompt.is_text:
            before, whole = self._decode(prompt.ids), self._decode([*prompt.ids, *ids])
            if whole.startswith(before):
                return whole[len(before) :]
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def row_numbers(seed: int, row: int, count: int) -> Tensor:
    """Draw the uniform random numbers of a row: a function of seed and row number alone, the same on every device.

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
        """Process the scores of the next token.

        Args:
            input_ids: (B, T).
            scores: (B, V), softmax of which is drawn from.

        Returns:
            (B, V): 0 at the token drawn, -inf elsewhere.
        """
        # In float32 the sum over a vocabulary loses its rare tokens.
        where = scores.device if has_float64(scores.device) else "cpu"
        sums_BV = scores.to(where).double().softmax(-1).cumsum(-1)
        # Exactly 1 from the last token that can be drawn on: every number below 1 falls on one that can.
        sums_BV = sums_BV / sums_BV[:, -1:]
        numbers_B1 = self._numbers_NB[input_ids.shape[1] - self._width, :, None].to(where)
        drawn_B1 = torch.searchsorted(sums_BV, numbers_B1, right=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)


class CheckNumbers(LogitsProcessor):
    """Raises for logits that are not numbers: whatever is chosen from them means nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process the scores of the next token.

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
