"""A tokenizer as the bridge needs it: the bytes of its tokens, and what it adds to a text by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.byte_table import ByteTable
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.utils.blocks import prefix_ids


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts, end to end.

    Attributes:
        ids_N: token ids, int64.
        text_N: the number of the text that each is from, int64.
        encodings: of each text, by the `tokenizers` library.
    """

    ids_N: Tensor
    text_N: Tensor
    encodings: Sequence[Any]

    def spans_of(self, texts: Sequence[int]) -> Tensor:
        """The spans (start, end) of all tokens of some texts, as the tokenizer tells them.

        Args:
            texts: their numbers.

        Returns:
            (N, 2) int64, in characters of each text.
        """
        spans = [span for text in texts for span in self.encodings[text].offsets]
        return torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)


class Reader:
    """Reads texts, and knows what each token stands for.

    Args:
        tokenizer: one that `token_bytes` takes.

    Attributes:
        texts: the bytes of every id, None for marks.
        unknown: the id that stands for text that is not known, if there is one and it has no other role.
        written: how the other marks are written in a text that is read: the content of special tokens.
        table: both, as tensors.
        prefix: ids that the tokenizer puts before a text by itself, such as BOS.
        space_at_start: whether it puts a space before a text.
        space_after_mark: and before what follows a mark.

    Raises:
        ValueError: as `token_bytes`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.texts = token_bytes(tokenizer)
        added = self.tokenizer.added_tokens_decoder
        roles = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self.unknown = None if self.tokenizer.unk_token_id in roles else self.tokenizer.unk_token_id
        self.written = {
            index: token.content.encode()
            for index, token in added.items()
            if self.texts[index] is None and index != self.unknown
        }
        self.table = ByteTable.of(self.texts, self.written)
        self._marks = {content.decode() for content in self.written.values()}
        # Gemma has 6,000 marks of 20 lengths.
        self._mark_lengths = sorted({len(mark) for mark in self._marks}, reverse=True)
        self.prefix = prefix_ids(tokenizer)
        # A mark that swallows the white space beside it would hide what we look for.
        plain = [index for index in self.written if not (added[index].lstrip or added[index].rstrip)]
        after_mark = self._ids(added[plain[0]].content + "a")[1:] if plain else []
        self.space_at_start = self._begin_with_space(self._ids("a"))
        self.space_after_mark = self._begin_with_space(after_mark)

    def encode(self, texts: list[str]) -> Encoded:
        """Tokenise texts as they are: nothing is added but what the tokenizer adds to any text, no token is cut off.

        Args:
            texts: any; special tokens that are written out in them are read as such.
        """
        # verbose: no warning of rows that are longer than the model's context; they are cut afterwards.
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]], dtype=torch.int64)
        ids_N = torch.tensor([token for ids in rows["input_ids"] for token in ids], dtype=torch.int64)
        return Encoded(ids_N, torch.arange(len(texts)).repeat_interleave(lengths), rows.encodings)

    def leading_mark(self, text: str) -> str:
        """The longest mark that a text begins with, "" for none.

        Args:
            text: any.
        """
        return next((text[:size] for size in self._mark_lengths if text[:size] in self._marks), "")

    def added_spaces(self, ids_N: Tensor, first_N: Tensor) -> Tensor:
        """Which tokens begin with a space that is not in the text.

        Where a tokenizer adds a space only if there is none, this cannot be told from its tokens; then one is taken
        for added.

        Args:
            ids_N: token ids.
            first_N: which are the first of their text, bool.

        Returns:
            (N,) int64, 1 or 0.
        """
        cuts_N = self.table.marks_V[ids_N] & (self.table.lengths_V[ids_N] > 0)
        added_N = first_N & self.space_at_start
        if self.space_after_mark:
            added_N |= cuts_N.roll(1) & ~first_N
        return (added_N & self.table.begins_with_space(ids_N)).long()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begin_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and bool(self.table.begins_with_space(torch.tensor(ids[:1])))
