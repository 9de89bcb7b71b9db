"""A teacher that completes batches of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
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
from cbd_trl.generation.draws import DrawByRow, RefuseNonNumbers
from cbd_trl.generation.prompts import Prompt
from cbd_trl.utils.tokenizers import vocabulary_rows

# A character that is not all there: the cut fell between its bytes.
_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote.

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
        with torch.no_grad(), own_forward(self._model), self._settings_of_our_own() as settings:
            written = self._model.generate(
                generation_config=settings,
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(kept, device=device),
                logits_processor=self._processors(rows, width),
            )
        new_tokens = written[:, width:].tolist()
        return [self._finish(prompt, ids) for prompt, ids in zip(prompts, new_tokens, strict=True)]

    def _processors(self, rows: Sequence[int], width: int) -> LogitsProcessorList:
        decoding, processors = self._decoding, LogitsProcessorList([RefuseNonNumbers()])
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
    def _settings_of_our_own(self) -> Iterator[GenerationConfig]:
        """`generate` fills what it is not told from the model's generation config: for its time, that is ours."""
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
            return Completion(text.rstrip(_HALF_A_CHARACTER), len(ids), "length")
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
