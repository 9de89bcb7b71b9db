"""From the student's rows to what the teacher reads, and back: which tokens of both are the same text.

Shapes: B x T the student's batch, N its tokens end to end without padding, R x U the teacher's batch, a row for each
text, X bytes of all texts.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.alignment import (
    NOWHERE,
    Alignment,
    Pieces,
    Placed,
    Spans,
    Texts,
    align,
    first_of_text,
    place,
    sums_before,
)
from cbd_trl.bridge.token_bytes import ByteTable, Encoded, Reader, any_byte, places_of_bytes
from cbd_trl.utils.blocks import IGNORE_INDEX

_LONE_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class StudentRows:
    """The student's batch, by texts.

    Attributes:
        ids_BT: token ids, int64.
        text_BT: the number of the text that each token is from, never decreasing, int64; `NOWHERE` for padding.
        scored_BT: which tokens count in the loss, bool. The first of a text never does: nothing predicts it.
        texts: how many texts there are, R; some may be empty.
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

    def only(self, texts_R: Tensor) -> "StudentRows":
        """The same batch with nothing but some of its texts, of which the others are empty.

        Args:
            texts_R: which are kept, bool.
        """
        kept_BT = (self.text_BT != NOWHERE) & texts_R[self.text_BT]
        return StudentRows(
            self.ids_BT, torch.where(kept_BT, self.text_BT, NOWHERE), self.scored_BT & kept_BT, self.texts
        )

    def back(self, placed: Placed) -> Placed:
        """From tokens end to end to the batch, of which only scored tokens are usable."""
        kept_BT = self.text_BT != NOWHERE
        ends_BT = torch.full_like(self.ids_BT, NOWHERE)
        usable_BT, marks_BT = torch.zeros_like(kept_BT), torch.zeros_like(kept_BT)
        ends_BT[kept_BT], usable_BT[kept_BT], marks_BT[kept_BT] = placed.ends, placed.usable, placed.marks
        return Placed(ends_BT, usable_BT & self.scored_BT, marks_BT)


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher reads, and what of it is the same as in the student's batch.

    Attributes:
        ids_RU: token ids, padded on the right.
        mask_RU: 0 for padding, int64.
        alignment: the groups.
        scored: how many of the student's tokens count in the loss.
        unaligned: how many of them are in no group.
    """

    ids_RU: Tensor
    mask_RU: Tensor
    alignment: Alignment
    scored: int
    unaligned: int


class Bridge:
    """Lets a teacher read the student's rows in its own tokens.

    The student's tokens are spelled out, its special tokens written as the teacher writes them (eos as eos, others by
    the same text; left out where there is no such; unknown tokens as U+FFFD), the text is tokenised as a whole by the
    teacher's tokenizer, and put behind what that one puts before every text, such as BOS. A group is usable only if
    its bytes are the same on both sides: what a normaliser changed, half a character at the end of a row, and special
    tokens that only one side takes for special are masked, and the alignment goes on behind them.

    Args:
        student: the tokenizer of the rows.
        teacher: the teacher's.
        max_length: the teacher's rows are cut to it, in tokens; None for no limit.

    Raises:
        ValueError: if the tokens of one of them do not tell their bytes exactly.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        self.student, self.teacher, self.max_length = Reader(student), Reader(teacher), max_length
        written = self._written_by_teacher()
        self._spoken = ByteTable.of(self.student.texts, written)
        # A chat template may write the BOS that the teacher's tokenizer adds.
        first = [self.teacher.written.get(token) for token in self.teacher.prefix[:1]]
        self._openers = torch.tensor([index for index, content in written.items() if content in first])

    def read(self, rows: StudentRows) -> TeacherRows:
        """Let the teacher read the student's text as it is; `cbd_trl.bridge.chats` is for two chat templates.

        Args:
            rows: the student's batch.

        Raises:
            ValueError: if they have ids that the student's tokenizer does not.
        """
        texts, line, pieces, placed = self._spell(rows)
        encoded = self.teacher.encode(texts)
        spans = place(self.teacher, encoded, line)
        return self.join(rows, placed, encoded, spans, pieces, self.teacher.prefix)

    def join(
        self, rows: StudentRows, student: Placed, encoded: Encoded, spans: Spans, pieces: Pieces, prefix: list[int]
    ) -> TeacherRows:
        """Collate the teacher's rows and align them with the student's.

        Args:
            rows: the student's batch.
            student: its tokens on the line, (B, T).
            encoded: the teacher's tokens, a text for each of the student's.
            spans: where they stand.
            pieces: of the teacher's texts.
            prefix: ids that the teacher reads before each text.
        """
        placed = spans.on_line(pieces, self.teacher.table.marks_V[encoded.ids_N])
        first_N = first_of_text(encoded.text_N)
        column_N = sums_before(torch.ones_like(encoded.ids_N), first_N) + len(prefix)
        usable_N = placed.usable & (column_N > 0)
        kept_N = torch.ones_like(first_N) if self.max_length is None else column_N < self.max_length
        # A row without any token would be one without anything to attend to.
        width = max(len(prefix), 1, int(column_N[kept_N].max()) + 1 if kept_N.any() else 0)
        where = encoded.text_N[kept_N], column_N[kept_N]
        shape = rows.texts, width
        pad = self.teacher.tokenizer.pad_token_id
        ids_RU = torch.full(shape, 0 if pad is None else pad)
        mask_RU, ends_RU = torch.zeros_like(ids_RU), torch.full_like(ids_RU, NOWHERE)
        usable_RU, marks_RU = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        ids_RU[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
        mask_RU[:, : max(len(prefix), 1)] = 1
        ids_RU[where], mask_RU[where], ends_RU[where] = encoded.ids_N[kept_N], 1, placed.ends[kept_N]
        usable_RU[where], marks_RU[where] = usable_N[kept_N], placed.marks[kept_N]
        alignment = align(student, Placed(ends_RU, usable_RU, marks_RU), pieces.borders_P)
        unaligned_BT = rows.scored_BT & (alignment.student_BT == NOWHERE)
        return TeacherRows(ids_RU, mask_RU, alignment, int(rows.scored_BT.sum()), int(unaligned_BT.sum()))

    def _spell(self, rows: StudentRows) -> tuple[list[str], Texts, Pieces, Placed]:
        """The student's texts as the teacher writes them, the line of them, their pieces, and its tokens on it."""
        kept_BT = rows.text_BT != NOWHERE
        ids_N, text_N = rows.ids_BT[kept_BT], rows.text_BT[kept_BT]
        self.student.table.check(ids_N)
        leading_N = self._leading(ids_N, text_N)
        # The token behind BOS is the first of the text itself: both BOS and it begin a run of their own here.
        begins_N = first_of_text(text_N * 2 + ~leading_N) & ~leading_N
        skip_N = self.student.added_spaces(ids_N, begins_N)
        skip_N = torch.where(leading_N, self._spoken.lengths_V[ids_N], skip_N)
        lengths_N = self._spoken.lengths_V[ids_N] - skip_N
        raw_X = self._spoken.spell(ids_N, skip_N)
        sizes_R = torch.zeros(rows.texts, dtype=torch.int64).index_add(0, text_N, lengths_N)
        texts = [_decode(piece.numpy().tobytes()) for piece in raw_X.split(sizes_R.tolist())]
        line = Texts.of(texts)
        within_N = sums_before(lengths_N, first_of_text(text_N))
        starts_N = line.starts_R[text_N] + within_N
        damaged_X = raw_X != line.bytes_X[places_of_bytes(starts_N, lengths_N)]
        marks_N = self._spoken.marks_V[ids_N]
        silent_N = leading_N | (marks_N & (self._spoken.lengths_V[ids_N] == 0))
        # What the teacher does not see separates texts that are neighbours to it.
        pieces = _cut(line, starts_N[silent_N & (within_N > 0)])
        spans = Spans(starts_N, starts_N + lengths_N, ~any_byte(damaged_X, lengths_N))
        placed = spans.on_line(pieces, marks_N)
        placed.ends[silent_N] = NOWHERE
        return texts, line, pieces, rows.back(placed)

    def _leading(self, ids_N: Tensor, text_N: Tensor) -> Tensor:
        """Which tokens are what a tokenizer puts before any text: the teacher puts its own there."""
        column_N = sums_before(torch.ones_like(ids_N), first_of_text(text_N))
        leading_N = (column_N == 0) & torch.isin(ids_N, self._openers)
        for column, token in enumerate(self.student.prefix):
            leading_N |= (column_N == column) & (ids_N == token)
        return leading_N

    def _written_by_teacher(self) -> dict[int, bytes]:
        """How the teacher writes the student's special tokens."""
        theirs = set(self.teacher.written.values())
        written = {index: content for index, content in self.student.written.items() if content in theirs}
        eos, their_eos = self.student.tokenizer.eos_token_id, self.teacher.tokenizer.eos_token_id
        if eos is not None and their_eos in self.teacher.written:
            written[eos] = self.teacher.written[their_eos]
        if self.student.unknown is not None:
            written[self.student.unknown] = "\N{REPLACEMENT CHARACTER}".encode()
        return written


def _cut(line: Texts, places: Tensor) -> Pieces:
    """The pieces of texts that are cut at some places."""
    ends_P = torch.cat([line.ends_R, places]).unique()
    starts_P = line.starts_R[torch.searchsorted(line.ends_R, ends_P)]
    starts_P[1:] = torch.maximum(starts_P[1:], ends_P[:-1])
    return Pieces(starts_P, ends_P, ends_P)


def _decode(raw: bytes) -> str:
    # A byte for a byte, so that everything behind it stays in place: what the teacher reads there is not used.
    return _LONE_BYTE.sub("?", raw.decode(errors="surrogateescape"))
