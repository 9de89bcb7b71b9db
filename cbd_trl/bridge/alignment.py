"""Which tokens of two tokenisations of one text stand for the same bytes.

All texts of a batch lie end to end on one line, a place for a byte. Two tokens end at the same place, or they do not:
where both sides have an end, a group ends. This is the finest partition into groups of the same bytes, and unlike
matching token strings (MinED, arXiv 2401.10491) it cannot be wrong.

Shapes: B x T the student's batch, R x U the teacher's (a row for each text), N placed tokens, G groups, P pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.token_bytes import Encoded, Reader, any_byte, places_of_bytes

NOWHERE = -1


@dataclass(frozen=True)
class Placed:
    """Tokens of one side of a batch, on the line of bytes.

    Attributes:
        ends: the place where each token ends, never decreasing, int64; `NOWHERE` for a token outside of all pieces
            (padding, a template, a special token that the other side lacks). Tokens of no bytes have places of their
            own, between two bytes.
        usable: whether it stands for exactly the bytes between its place and the one before, and whether its model
            says something about it that counts, bool.
        marks: special tokens, bool: the same bytes as text are something else.
    """

    ends: Tensor
    usable: Tensor
    marks: Tensor


@dataclass(frozen=True)
class Alignment:
    """Groups of tokens of both sides that are the same bytes; numbered in order, over the whole batch.

    Attributes:
        student_BT: the group of each of the student's tokens, int64; `NOWHERE` for those in none.
        teacher_RU: likewise the teacher's.
        groups: how many groups there are, G. Each has a token on both sides at least.
    """

    student_BT: Tensor
    teacher_RU: Tensor
    groups: int

    def sizes(self) -> tuple[Tensor, Tensor]:
        """How many tokens each group has, of the student and of the teacher, (G,) int64 each."""
        return self._count(self.student_BT), self._count(self.teacher_RU)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Where each group's last token is, in the flattened batches of the student and the teacher, (G,) int64 each.

        The same text lies behind both models there, so their hidden states can be compared.
        """
        return self._last(self.student_BT), self._last(self.teacher_RU)

    def _count(self, side: Tensor) -> Tensor:
        return torch.bincount(side[side != NOWHERE], minlength=self.groups)

    def _last(self, side: Tensor) -> Tensor:
        places_N = (side.flatten() != NOWHERE).nonzero().flatten()
        return places_N[self._count(side).cumsum(0) - 1]


def align(student: Placed, teacher: Placed, piece_ends_P: Tensor) -> Alignment:
    """The finest groups of tokens of the same bytes, without those in which anything cannot be compared.

    Args:
        student: (B, T).
        teacher: (R, U).
        piece_ends_P: where the pieces of text end that both sides have, increasing, int64. No group reaches over such
            an end.

    Returns:
        the groups in which every token of both sides is usable and either no token is a mark, or there are marks on
        both sides.
    """
    sides = (student, teacher)
    placed = [side.ends != NOWHERE for side in sides]
    ends = [side.ends[where] for side, where in zip(sides, placed, strict=True)]
    common = _in_both(*ends)
    # What is left over at the end of a piece must not fall into the next one's first group.
    borders = torch.cat([common, piece_ends_P]).unique()
    closed = torch.isin(borders, common)
    numbers = [torch.searchsorted(borders, side) for side in ends]
    count = borders.numel()

    def some(index: int, flags: Tensor) -> Tensor:
        return torch.bincount(numbers[index][flags[placed[index]]], minlength=count) > 0

    whole = ~some(0, ~student.usable) & ~some(1, ~teacher.usable)
    present = some(0, student.usable) & some(1, teacher.usable)
    alike = some(0, student.marks) == some(1, teacher.marks)
    kept = closed & whole & present & alike
    renumbered = torch.where(kept, kept.cumsum(0) - 1, NOWHERE)
    groups = [torch.full_like(side.ends, NOWHERE) for side in sides]
    for index, number in enumerate(numbers):
        groups[index][placed[index]] = renumbered[number]
    return Alignment(groups[0], groups[1], int(kept.sum()))


def _in_both(one_N: Tensor, other_N: Tensor) -> Tensor:
    """The values that two sorted lists share, sorted, once each."""
    if not one_N.numel() or not other_N.numel():
        return one_N[:0]
    found_N = torch.searchsorted(other_N, one_N).clamp(max=other_N.numel() - 1)
    return one_N[other_N[found_N] == one_N].unique_consecutive()


@dataclass(frozen=True)
class Texts:
    """Texts on one line of bytes, a byte between two of them: the end of one is not the start of the next.

    Attributes:
        bytes_X: UTF-8, uint8.
        starts_R: where each text begins, int64.
        ends_R: where it ends.
    """

    bytes_X: Tensor
    starts_R: Tensor
    ends_R: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Lay texts end to end."""
        raw = [text.encode() for text in texts]
        ends_R = torch.tensor([len(text) + 1 for text in raw], dtype=torch.int64).cumsum(0) - 1
        starts_R = ends_R - torch.tensor([len(text) for text in raw], dtype=torch.int64)
        joined = bytearray(b"\n".join(raw) + b"\n")
        return cls(torch.frombuffer(joined, dtype=torch.uint8), starts_R, ends_R)


@dataclass(frozen=True)
class Spans:
    """The bytes that tokens stand for, (N,) each.

    Attributes:
        starts_N: the first byte, int64.
        ends_N: the byte after the last, int64.
        exact_N: whether the token is these bytes, and not what a normaliser made of them, bool.
    """

    starts_N: Tensor
    ends_N: Tensor
    exact_N: Tensor

    def on_line(self, pieces: "Pieces", marks_N: Tensor) -> Placed:
        """Place the tokens on a line that knows the pieces only.

        There are two places for a byte: its end, and one behind it for a token of no bytes, such as an added space,
        which belongs to what follows it.

        Args:
            pieces: of these texts.
            marks_N: which tokens are marks, bool.

        Returns:
            (N,); a token that reaches into a piece from outside is not usable.
        """
        if not pieces.ends_P.numel():
            return Placed(torch.full_like(self.ends_N, NOWHERE), torch.zeros_like(self.exact_N), marks_N)
        places_N = 2 * self.ends_N + (self.starts_N == self.ends_N)
        piece_N = torch.searchsorted(2 * pieces.ends_P, places_N).clamp(max=pieces.ends_P.numel() - 1)
        starts_N, ends_N = pieces.starts_P[piece_N], pieces.ends_P[piece_N]
        inside_N = (places_N > 2 * starts_N) & (places_N <= 2 * ends_N)
        on_line_N = places_N + 2 * (pieces.line_ends_P[piece_N] - ends_N)
        return Placed(torch.where(inside_N, on_line_N, NOWHERE), self.exact_N & (self.starts_N >= starts_N), marks_N)


@dataclass(frozen=True)
class Pieces:
    """Parts of texts that the other side has too, in order; no two overlap.

    Attributes:
        starts_P: where they begin, in bytes of `Texts`, int64.
        ends_P: where they end.
        line_ends_P: where they end on the line that both sides share, in bytes too.
    """

    starts_P: Tensor
    ends_P: Tensor
    line_ends_P: Tensor

    @property
    def borders_P(self) -> Tensor:
        """The places on the line where they end (see `Spans.on_line`), int64."""
        return 2 * self.line_ends_P


def first_of_text(text_N: Tensor) -> Tensor:
    """Which tokens are the first of their text, (N,) bool."""
    return torch.cat([torch.ones_like(text_N[:1]), text_N[1:] - text_N[:-1]]) != 0


def sums_before(values_N: Tensor, first_N: Tensor) -> Tensor:
    """For each entry the sum of those before it in its run; a run begins where `first_N` says, (N,) int64."""
    before_N = values_N.cumsum(0) - values_N
    run_N = first_N.cumsum(0) - 1
    return before_N - before_N[first_N][run_N]


def place(reader: Reader, encoded: Encoded, texts: Texts) -> Spans:
    """Find what bytes each token stands for.

    Where the bytes of a text's tokens, end to end, are the text, save for spaces that the tokenizer adds, their
    lengths tell. Other texts were normalised: there the tokenizer's own spans tell what stands where, and a token is
    exact where its bytes are those of its span.

    Args:
        reader: what made the tokens.
        encoded: the tokens.
        texts: what they were made of.
    """
    ids_N, text_N = encoded.ids_N, encoded.text_N
    first_N = first_of_text(text_N)
    skip_N = reader.added_spaces(ids_N, first_N)
    lengths_N = reader.table.lengths_V[ids_N] - skip_N
    starts_N = texts.starts_R[text_N] + sums_before(lengths_N, first_N)
    spans = Spans(starts_N, starts_N + lengths_N, torch.ones_like(first_N))
    totals_R = torch.zeros_like(texts.ends_R).index_add(0, text_N, lengths_N)
    normalised_R = totals_R != texts.ends_R - texts.starts_R
    same_N = ~normalised_R[text_N]
    wrong_N = _differs(reader, ids_N[same_N], skip_N[same_N], starts_N[same_N], texts)
    normalised_R[text_N[same_N][wrong_N]] = True
    chosen_N = normalised_R[text_N]
    if not chosen_N.any():
        return spans
    rows = normalised_R.nonzero().flatten().tolist()
    found = _place_by_spans(reader, ids_N[chosen_N], text_N[chosen_N], encoded.spans_of(rows), texts)
    spans.starts_N[chosen_N], spans.ends_N[chosen_N] = found.starts_N, found.ends_N
    spans.exact_N[chosen_N] = found.exact_N
    return spans


def _differs(reader: Reader, ids_N: Tensor, skip_N: Tensor, starts_N: Tensor, texts: Texts) -> Tensor:
    """Which tokens are not the bytes of the texts from a place on, (N,) bool."""
    lengths_N = reader.table.lengths_V[ids_N] - skip_N
    expected_X = texts.bytes_X[places_of_bytes(starts_N, lengths_N)]
    return any_byte(reader.table.spell(ids_N, skip_N) != expected_X, lengths_N)


def _place_by_spans(reader: Reader, ids_N: Tensor, text_N: Tensor, letters_N2: Tensor, texts: Texts) -> Spans:
    """Place tokens by the tokenizer's spans, in characters of their text.

    Tokens whose spans overlap (the bytes of one character, or what a normaliser made of one) are a cluster. It stands
    for the bytes up to the end of its span, and for those that no token before it stands for, if that fits its length:
    some tokenizers leave white space out of their spans. Otherwise those bytes belong to the cluster before it, as the
    accent that was composed with its last letter; that one is not exact then.
    """
    opens_N, closes_N = _in_bytes(letters_N2, text_N, texts).unbind(1)
    closes_N = closes_N.cummax(0).values
    first_N = first_of_text(text_N)
    before_N = torch.where(first_N, texts.starts_R[text_N], closes_N.roll(1))
    new_N = first_N | (opens_N >= before_N)
    cluster_N = new_N.cumsum(0) - 1
    lows_K, opens_K, closes_K = before_N[new_N], opens_N[new_N], closes_N[new_N.roll(-1)]
    totals_K = torch.zeros_like(lows_K).index_add(0, cluster_N, reader.table.lengths_V[ids_N])
    spaces_K = reader.table.begins_with_space(ids_N[new_N])

    def fits(starts_K: Tensor) -> Tensor:
        extra_K = totals_K - (closes_K - starts_K)
        return (extra_K == 0) | ((extra_K == 1) & spaces_K)

    alone_K = ~fits(lows_K) & fits(opens_K) & ~first_N[new_N]
    exact_K = fits(lows_K) | alone_K
    starts_K = torch.where(alone_K, opens_K, lows_K)
    added_K = exact_K & (totals_K > closes_K - starts_K)
    skip_N = (new_N & added_K[cluster_N]).long()
    lengths_N = reader.table.lengths_V[ids_N] - skip_N
    places_N = starts_K[cluster_N] + sums_before(lengths_N, new_N)
    fits_N = exact_K[cluster_N]
    wrong_N = _differs(reader, ids_N[fits_N], skip_N[fits_N], places_N[fits_N], texts)
    exact_K[cluster_N[fits_N][wrong_N]] = False
    takes_K = (alone_K & (opens_K > lows_K)).roll(-1)
    closes_K = torch.where(takes_K, opens_K.roll(-1), closes_K)
    exact_N = (exact_K & ~takes_K)[cluster_N]
    return Spans(
        torch.where(exact_N, places_N, starts_K[cluster_N]),
        torch.where(exact_N, places_N + lengths_N, closes_K[cluster_N]),
        exact_N,
    )


def _in_bytes(letters_N2: Tensor, text_N: Tensor, texts: Texts) -> Tensor:
    """From places in characters of a text to places on the line of bytes, (N, 2) int64."""
    places = ((texts.bytes_X & 0xC0) != 0x80).nonzero().flatten()
    letters_before_R = torch.searchsorted(places, texts.starts_R)
    return places[letters_before_R[text_N][:, None] + letters_N2]
