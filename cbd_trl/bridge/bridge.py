"""The student's batch in the teacher's tokens, aligned with the student's.

`StudentRows` are the texts of a collated batch. `Bridge.read` spells them out, tokenizes them with the teacher's
tokenizer and returns `TeacherRows`: the teacher's batch and the groups of tokens with the same bytes.

Shapes: B x T the student's batch, N its tokens end to end without padding, R x U the teacher's batch (a row for each
text), X bytes of all texts.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.alignment import (
    NOWHERE,
    Alignment,
    ByteSpans,
    Segments,
    Texts,
    TokenOffsets,
    align,
    byte_spans,
    first_of_text,
    sums_before,
)
from cbd_trl.bridge.token_bytes import ByteAwareTokenizer, ByteTable, EncodedTexts, any_flagged, byte_indices
from cbd_trl.utils.blocks import IGNORE_INDEX

_LONE_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class StudentRows:
    """The student's batch as texts.

    Attributes:
        ids_BT: token ids, int64.
        text_BT: the index of the text that each token is from, never decreasing, int64; `NOWHERE` for padding.
        scored_BT: tokens that count in the loss, bool. The first of a text never does: nothing predicts it.
        texts: number of texts, R; some may be empty.
    """

    ids_BT: Tensor
    text_BT: Tensor
    scored_BT: Tensor
    texts: int

    @classmethod
    def of(
        cls,
        ids_BT: Tensor,
        labels_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
    ) -> "StudentRows":
        """Find the texts of a collated batch, on the CPU as a collator makes it.

        Args:
            ids_BT: token ids, int64.
            labels_BT: -100 where a token is not scored, not shifted.
            attention_mask_BT: 0 for padding; None where there is none.
            position_ids_BT: 0 where a text begins, as in padding-free batches, besides where a row does; None: each
                row is one text.
        """
        if position_ids_BT is None:
            texts = len(ids_BT)
            text_BT = torch.arange(texts)[:, None].expand_as(ids_BT)
        else:
            begins_BT = position_ids_BT == 0
            begins_BT[:, :1] = True
            texts = int(begins_BT.sum())
            text_BT = begins_BT.flatten().cumsum(0).reshape(ids_BT.shape) - 1
        if attention_mask_BT is not None:
            text_BT = torch.where(attention_mask_BT.bool(), text_BT, NOWHERE)
        scored_BT = labels_BT != IGNORE_INDEX
        kept_BT = text_BT != NOWHERE
        scored_BT[kept_BT] &= ~first_of_text(text_BT[kept_BT])
        return cls(ids_BT, text_BT, scored_BT & kept_BT, texts)

    def select(self, texts_R: Tensor) -> "StudentRows":
        """Keep some of the texts; the others become empty.

        Args:
            texts_R: the texts to keep, bool.
        """
        kept_BT = (self.text_BT != NOWHERE) & texts_R[self.text_BT]
        return StudentRows(
            self.ids_BT, torch.where(kept_BT, self.text_BT, NOWHERE), self.scored_BT & kept_BT, self.texts
        )

    def to_batch(self, offsets: TokenOffsets) -> TokenOffsets:
        """Bring the offsets of tokens end to end, (N,), to the batch, (B, T), where only scored tokens are usable."""
        kept_BT = self.text_BT != NOWHERE
        ends_BT = torch.full_like(self.ids_BT, NOWHERE)
        usable_BT, special_BT = torch.zeros_like(kept_BT), torch.zeros_like(kept_BT)
        ends_BT[kept_BT], usable_BT[kept_BT], special_BT[kept_BT] = offsets.ends, offsets.usable, offsets.special
        return TokenOffsets(ends_BT, usable_BT & self.scored_BT, special_BT)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's batch, and the groups of its tokens and the student's with the same bytes.

    Attributes:
        ids_RU: token ids, padded on the right, int64.
        mask_RU: 0 for padding, int64.
        alignment: the groups.
        scored: number of the student's tokens that count in the loss.
        unaligned: number of those in no group.
    """

    ids_RU: Tensor
    mask_RU: Tensor
    alignment: Alignment
    scored: int
    unaligned: int


class Bridge:
    """Tokenizes the student's batch for the teacher, and aligns both.

    The student's tokens are spelled out, with special tokens as the teacher writes them: EOS as its EOS, others by the
    same text, those it lacks left out, unknown tokens as U+FFFD. The teacher's tokenizer reads each text as a whole,
    after what it puts before every text, such as BOS. A group is used only if its bytes are the same in both: what a
    normalizer changed, half a character at the end of a row, and tokens that are special in one tokenizer alone are
    masked, and the alignment goes on after them.

    Args:
        student: the tokenizer of the rows.
        teacher: the teacher's.
        max_length: tokens to which the teacher's rows are truncated; None for no limit.

    Raises:
        ValueError: if the tokens of one of them cannot be turned into exact bytes, see `token_bytes`.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        self.student, self.teacher = ByteAwareTokenizer(student), ByteAwareTokenizer(teacher)
        self.max_length = max_length
        special = self._special_bytes_for_teacher()
        self._teacher_table = ByteTable.of(self.student.bytes, special)
        # A chat template may write the BOS that the teacher's tokenizer adds.
        first = [self.teacher.special_bytes.get(token) for token in self.teacher.prefix[:1]]
        self._leading_ids = torch.tensor([index for index, content in special.items() if content in first])

    def read(self, rows: StudentRows) -> TeacherRows:
        """Tokenize the student's text as it is and align it; `cbd_trl.bridge.chats` is for two chat templates.

        Args:
            rows: the student's batch.

        Raises:
            ValueError: if the rows have ids that the student's tokenizer does not.
        """
        strings, texts, segments, student = self._spell_for_teacher(rows)
        encoded = self.teacher.encode(strings)
        spans = byte_spans(self.teacher, encoded, texts)
        return self.collate(rows, student, encoded, spans, segments, self.teacher.prefix)

    def collate(
        self,
        rows: StudentRows,
        student: TokenOffsets,
        encoded: EncodedTexts,
        spans: ByteSpans,
        segments: Segments,
        prefix: list[int],
    ) -> TeacherRows:
        """Collate the teacher's rows and align them with the student's.

        Args:
            rows: the student's batch.
            student: where its tokens end, (B, T).
            encoded: the teacher's tokens, a text for each of the student's.
            spans: the bytes that they stand for.
            segments: of the teacher's texts.
            prefix: ids that the teacher reads before each text.
        """
        offsets = spans.shared_offsets(segments, self.teacher.table.special_V[encoded.ids_N])
        first_N = first_of_text(encoded.text_N)
        column_N = sums_before(torch.ones_like(encoded.ids_N), first_N) + len(prefix)
        usable_N = offsets.usable & (column_N > 0)
        kept_N = torch.ones_like(first_N) if self.max_length is None else column_N < self.max_length
        # A row without any token would have nothing to attend to.
        width = max(len(prefix), 1, int(column_N[kept_N].max()) + 1 if kept_N.any() else 0)
        where = encoded.text_N[kept_N], column_N[kept_N]
        shape = rows.texts, width
        pad = self.teacher.tokenizer.pad_token_id
        ids_RU = torch.full(shape, 0 if pad is None else pad)
        mask_RU, ends_RU = torch.zeros_like(ids_RU), torch.full_like(ids_RU, NOWHERE)
        usable_RU, special_RU = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        ids_RU[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
        mask_RU[:, : max(len(prefix), 1)] = 1
        ids_RU[where], mask_RU[where], ends_RU[where] = encoded.ids_N[kept_N], 1, offsets.ends[kept_N]
        usable_RU[where], special_RU[where] = usable_N[kept_N], offsets.special[kept_N]
        alignment = align(student, TokenOffsets(ends_RU, usable_RU, special_RU), segments.boundaries_P)
        unaligned_BT = rows.scored_BT & (alignment.student_BT == NOWHERE)
        return TeacherRows(ids_RU, mask_RU, alignment, int(rows.scored_BT.sum()), int(unaligned_BT.sum()))

    def _spell_for_teacher(self, rows: StudentRows) -> tuple[list[str], Texts, Segments, TokenOffsets]:
        """Spell out the student's texts for the teacher: strings, bytes, segments, and where its tokens end."""
        kept_BT = rows.text_BT != NOWHERE
        ids_N, text_N = rows.ids_BT[kept_BT], rows.text_BT[kept_BT]
        self.student.table.check(ids_N)
        leading_N = self._leading(ids_N, text_N)
        # The token after BOS is the first of the text itself: BOS and that token each begin a run here.
        begins_N = first_of_text(text_N * 2 + ~leading_N) & ~leading_N
        skip_N = self.student.added_spaces(ids_N, begins_N)
        skip_N = torch.where(leading_N, self._teacher_table.lengths_V[ids_N], skip_N)
        lengths_N = self._teacher_table.lengths_V[ids_N] - skip_N
        raw_X = self._teacher_table.spell(ids_N, skip_N)
        sizes_R = torch.zeros(rows.texts, dtype=torch.int64).index_add(0, text_N, lengths_N)
        strings = [_decode(text_x.numpy().tobytes()) for text_x in raw_X.split(sizes_R.tolist())]
        texts = Texts.of(strings)
        within_N = sums_before(lengths_N, first_of_text(text_N))
        starts_N = texts.starts_R[text_N] + within_N
        damaged_X = raw_X != texts.bytes_X[byte_indices(starts_N, lengths_N)]
        special_N = self._teacher_table.special_V[ids_N]
        skipped_N = leading_N | (special_N & (self._teacher_table.lengths_V[ids_N] == 0))
        # A token that the teacher does not read ends a segment: what is around it is not one text for the student.
        segments = _split_at(texts, starts_N[skipped_N & (within_N > 0)])
        spans = ByteSpans(starts_N, starts_N + lengths_N, ~any_flagged(damaged_X, lengths_N))
        offsets = spans.shared_offsets(segments, special_N)
        offsets.ends[skipped_N] = NOWHERE
        return strings, texts, segments, rows.to_batch(offsets)

    def _leading(self, ids_N: Tensor, text_N: Tensor) -> Tensor:
        """Flag the tokens that a tokenizer puts before every text, (N,) bool: the teacher has its own there."""
        column_N = sums_before(torch.ones_like(ids_N), first_of_text(text_N))
        leading_N = (column_N == 0) & torch.isin(ids_N, self._leading_ids)
        for column, token in enumerate(self.student.prefix):
            leading_N |= (column_N == column) & (ids_N == token)
        return leading_N

    def _special_bytes_for_teacher(self) -> dict[int, bytes]:
        """Map the student's special tokens to how the teacher writes them."""
        theirs = set(self.teacher.special_bytes.values())
        found = {index: content for index, content in self.student.special_bytes.items() if content in theirs}
        eos, their_eos = self.student.tokenizer.eos_token_id, self.teacher.tokenizer.eos_token_id
        if eos is not None and their_eos in self.teacher.special_bytes:
            found[eos] = self.teacher.special_bytes[their_eos]
        if self.student.unknown is not None:
            found[self.student.unknown] = "\N{REPLACEMENT CHARACTER}".encode()
        return found


def _split_at(texts: Texts, offsets: Tensor) -> Segments:
    """Split texts into segments at some bytes."""
    ends_P = torch.cat([texts.ends_R, offsets]).unique()
    starts_P = texts.starts_R[torch.searchsorted(texts.ends_R, ends_P)]
    starts_P[1:] = torch.maximum(starts_P[1:], ends_P[:-1])
    return Segments(starts_P, ends_P, ends_P)


def _decode(raw: bytes) -> str:
    # One byte replaces one byte, so that all offsets after it stay: what the teacher reads there is not used.
    return _LONE_BYTE.sub("?", raw.decode(errors="surrogateescape"))
