"""Alignment of two tokenizations of the same texts: groups of tokens that stand for exactly the same bytes.

`byte_spans` finds the bytes of each token in its text, `ByteSpans.shared_offsets` maps them to offsets that both
models share, and `align` closes a group wherever a token of both models ends at the same offset. This is the finest
partition into groups of equal bytes; unlike matching token strings (MinED, arXiv 2401.10491) it is exact.

Shapes: B x T the student's batch, R x U the teacher's (a row for each text), N tokens end to end, X bytes, G groups,
P segments of text that both models read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbd_trl.bridge.token_bytes import ByteAwareTokenizer, EncodedTexts, any_flagged, byte_indices

NOWHERE = -1


@dataclass(frozen=True)
class TokenOffsets:
    """Where the tokens of one model end, in offsets that both models share.

    Attributes:
        ends: end offset of each token, never decreasing, int64; `NOWHERE` for a token outside of all segments
            (padding, a template, a special token that the other model lacks). A token of no bytes has an offset of
            its own, between two bytes.
        usable: whether the token stands for exactly the bytes since the offset before it and is predicted by its
            model, bool.
        special: special tokens, bool: the same bytes written as text are not the same token.
    """

    ends: Tensor
    usable: Tensor
    special: Tensor


@dataclass(frozen=True)
class Alignment:
    """Groups of tokens of both models with the same bytes, numbered in order over the whole batch.

    Attributes:
        student_BT: the group of each of the student's tokens, int64; `NOWHERE` for those in none.
        teacher_RU: likewise the teacher's.
        groups: number of groups, G. Each has at least one token of both models.
    """

    student_BT: Tensor
    teacher_RU: Tensor
    groups: int

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Count the tokens of each group, of the student and of the teacher, (G,) int64 each."""
        return self._count(self.student_BT), self._count(self.teacher_RU)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Find each group's last token in the flattened batches of the student and the teacher, (G,) int64 each.

        Both models have read the same text there, so their hidden states can be compared.
        """
        return self._last(self.student_BT), self._last(self.teacher_RU)

    def _count(self, group: Tensor) -> Tensor:
        return torch.bincount(group[group != NOWHERE], minlength=self.groups)

    def _last(self, group: Tensor) -> Tensor:
        grouped_N = (group.flatten() != NOWHERE).nonzero().flatten()
        return grouped_N[self._count(group).cumsum(0) - 1]


def align(student: TokenOffsets, teacher: TokenOffsets, segment_ends_P: Tensor) -> Alignment:
    """Form the finest groups of tokens of the same bytes, and keep those that can be compared.

    Args:
        student: (B, T).
        teacher: (R, U).
        segment_ends_P: end offsets of the segments of text that both models read, increasing, int64. No group crosses
            one.

    Returns:
        the groups in which every token of both models is usable, and which have special tokens of both or of neither.
    """
    models = (student, teacher)
    placed = [model.ends != NOWHERE for model in models]
    ends = [model.ends[where] for model, where in zip(models, placed, strict=True)]
    common = _intersect_sorted(*ends)
    # Tokens left over at the end of a segment must not fall into the first group of the next one.
    borders = torch.cat([common, segment_ends_P]).unique()
    closed = torch.isin(borders, common)
    numbers = [torch.searchsorted(borders, model_ends) for model_ends in ends]
    count = borders.numel()

    def any_token(index: int, flags: Tensor) -> Tensor:
        return torch.bincount(numbers[index][flags[placed[index]]], minlength=count) > 0

    whole = ~any_token(0, ~student.usable) & ~any_token(1, ~teacher.usable)
    present = any_token(0, student.usable) & any_token(1, teacher.usable)
    same_kind = any_token(0, student.special) == any_token(1, teacher.special)
    kept = closed & whole & present & same_kind
    renumbered = torch.where(kept, kept.cumsum(0) - 1, NOWHERE)
    groups = [torch.full_like(model.ends, NOWHERE) for model in models]
    for index, number in enumerate(numbers):
        groups[index][placed[index]] = renumbered[number]
    return Alignment(groups[0], groups[1], int(kept.sum()))


@dataclass(frozen=True)
class Texts:
    """Texts end to end as bytes, with a byte between two of them: the end of one is not the start of the next.

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
        """Encode texts and join them."""
        raw = [text.encode() for text in texts]
        ends_R = torch.tensor([len(text) + 1 for text in raw], dtype=torch.int64).cumsum(0) - 1
        starts_R = ends_R - torch.tensor([len(text) for text in raw], dtype=torch.int64)
        joined = bytearray(b"\n".join(raw) + b"\n")
        return cls(torch.frombuffer(joined, dtype=torch.uint8), starts_R, ends_R)


@dataclass(frozen=True)
class Segments:
    """Parts of one model's texts that the other model reads too, in order and without overlap.

    Attributes:
        starts_P: first byte in `Texts`, int64.
        ends_P: the byte after the last, int64.
        shared_ends_P: the same ends, in bytes of the text that both models share, int64.
    """

    starts_P: Tensor
    ends_P: Tensor
    shared_ends_P: Tensor

    @property
    def boundaries_P(self) -> Tensor:
        """Their end offsets, as `ByteSpans.shared_offsets` counts, (P,) int64."""
        return 2 * self.shared_ends_P


@dataclass(frozen=True)
class ByteSpans:
    """The bytes of `Texts` that tokens stand for, (N,) each.

    Attributes:
        starts_N: the first byte, int64.
        ends_N: the byte after the last, int64.
        exact_N: whether the token is exactly these bytes, not what a normalizer made of them, bool.
    """

    starts_N: Tensor
    ends_N: Tensor
    exact_N: Tensor

    def shared_offsets(self, segments: Segments, special_N: Tensor) -> TokenOffsets:
        """Compute where the tokens end, counting the bytes of the segments alone.

        Each byte counts as two offsets: its end, and one after it for a token of no bytes, such as an added space,
        which belongs to what follows it.

        Args:
            segments: of these texts.
            special_N: special tokens, bool.

        Returns:
            (N,); a token that begins before the segment it ends in is not usable.
        """
        if not segments.ends_P.numel():
            return TokenOffsets(torch.full_like(self.ends_N, NOWHERE), torch.zeros_like(self.exact_N), special_N)
        ends_twice_N = 2 * self.ends_N + (self.starts_N == self.ends_N)
        segment_N = torch.searchsorted(2 * segments.ends_P, ends_twice_N).clamp(max=segments.ends_P.numel() - 1)
        starts_N, ends_N = segments.starts_P[segment_N], segments.ends_P[segment_N]
        inside_N = (ends_twice_N > 2 * starts_N) & (ends_twice_N <= 2 * ends_N)
        shared_N = ends_twice_N + 2 * (segments.shared_ends_P[segment_N] - ends_N)
        return TokenOffsets(
            torch.where(inside_N, shared_N, NOWHERE), self.exact_N & (self.starts_N >= starts_N), special_N
        )


def byte_spans(tokenizer: ByteAwareTokenizer, encoded: EncodedTexts, texts: Texts) -> ByteSpans:
    """Find what bytes each token stands for.

    Where the bytes of a text's tokens, end to end, are the text (apart from spaces that the tokenizer adds), their
    lengths give the spans. Other texts were normalized: there the tokenizer's own offsets give the spans, and a token
    is exact where its bytes are those of its span.

    Args:
        tokenizer: what made the tokens.
        encoded: the tokens.
        texts: what they were made of.
    """
    ids_N, text_N = encoded.ids_N, encoded.text_N
    first_N = first_of_text(text_N)
    skip_N = tokenizer.added_spaces(ids_N, first_N)
    lengths_N = tokenizer.table.lengths_V[ids_N] - skip_N
    starts_N = texts.starts_R[text_N] + sums_before(lengths_N, first_N)
    spans = ByteSpans(starts_N, starts_N + lengths_N, torch.ones_like(first_N))
    totals_R = torch.zeros_like(texts.ends_R).index_add(0, text_N, lengths_N)
    normalized_R = totals_R != texts.ends_R - texts.starts_R
    same_N = ~normalized_R[text_N]
    wrong_N = _mismatches(tokenizer, ids_N[same_N], skip_N[same_N], starts_N[same_N], texts)
    normalized_R[text_N[same_N][wrong_N]] = True
    chosen_N = normalized_R[text_N]
    if not chosen_N.any():
        return spans
    rows = normalized_R.nonzero().flatten().tolist()
    found = _spans_from_offsets(tokenizer, ids_N[chosen_N], text_N[chosen_N], encoded.character_offsets(rows), texts)
    spans.starts_N[chosen_N], spans.ends_N[chosen_N] = found.starts_N, found.ends_N
    spans.exact_N[chosen_N] = found.exact_N
    return spans


def first_of_text(text_N: Tensor) -> Tensor:
    """Flag the tokens that are the first of their text, (N,) bool."""
    return torch.cat([torch.ones_like(text_N[:1]), text_N[1:] - text_N[:-1]]) != 0


def sums_before(values_N: Tensor, first_N: Tensor) -> Tensor:
    """Sum, for each entry, those before it in its run, (N,) int64; runs begin where `first_N` is True."""
    before_N = values_N.cumsum(0) - values_N
    run_N = first_N.cumsum(0) - 1
    return before_N - before_N[first_N][run_N]


def _mismatches(
    tokenizer: ByteAwareTokenizer, ids_N: Tensor, skip_N: Tensor, starts_N: Tensor, texts: Texts
) -> Tensor:
    """Flag the tokens whose bytes differ from those of the texts at `starts_N`, (N,) bool."""
    lengths_N = tokenizer.table.lengths_V[ids_N] - skip_N
    expected_X = texts.bytes_X[byte_indices(starts_N, lengths_N)]
    return any_flagged(tokenizer.table.spell(ids_N, skip_N) != expected_X, lengths_N)


def _spans_from_offsets(
    tokenizer: ByteAwareTokenizer, ids_N: Tensor, text_N: Tensor, letters_N2: Tensor, texts: Texts
) -> ByteSpans:
    """Find the bytes of tokens from the tokenizer's own offsets, `letters_N2`, in characters of their text.

    Tokens whose offsets overlap (the bytes of one character, or what a normalizer made of one) form a cluster. It
    covers the bytes up to the end of its offsets, from where the cluster before it ended if that fits its length: some
    tokenizers leave white space out of their offsets. Otherwise the bytes in between belong to the cluster before it
    (an accent that was composed with its last letter), which is then not exact.
    """
    opens_N, closes_N = _to_byte_offsets(letters_N2, text_N, texts).unbind(1)
    closes_N = closes_N.cummax(0).values
    first_N = first_of_text(text_N)
    before_N = torch.where(first_N, texts.starts_R[text_N], closes_N.roll(1))
    new_N = first_N | (opens_N >= before_N)
    cluster_N = new_N.cumsum(0) - 1
    lows_K, opens_K, closes_K = before_N[new_N], opens_N[new_N], closes_N[new_N.roll(-1)]
    totals_K = torch.zeros_like(lows_K).index_add(0, cluster_N, tokenizer.table.lengths_V[ids_N])
    spaces_K = tokenizer.table.begins_with_space(ids_N[new_N])

    def fits(starts_K: Tensor) -> Tensor:
        extra_K = totals_K - (closes_K - starts_K)
        return (extra_K == 0) | ((extra_K == 1) & spaces_K)

    alone_K = ~fits(lows_K) & fits(opens_K) & ~first_N[new_N]
    exact_K = fits(lows_K) | alone_K
    starts_K = torch.where(alone_K, opens_K, lows_K)
    added_K = exact_K & (totals_K > closes_K - starts_K)
    skip_N = (new_N & added_K[cluster_N]).long()
    lengths_N = tokenizer.table.lengths_V[ids_N] - skip_N
    starts_N = starts_K[cluster_N] + sums_before(lengths_N, new_N)
    fits_N = exact_K[cluster_N]
    wrong_N = _mismatches(tokenizer, ids_N[fits_N], skip_N[fits_N], starts_N[fits_N], texts)
    exact_K[cluster_N[fits_N][wrong_N]] = False
    takes_K = (alone_K & (opens_K > lows_K)).roll(-1)
    closes_K = torch.where(takes_K, opens_K.roll(-1), closes_K)
    exact_N = (exact_K & ~takes_K)[cluster_N]
    return ByteSpans(
        torch.where(exact_N, starts_N, starts_K[cluster_N]),
        torch.where(exact_N, starts_N + lengths_N, closes_K[cluster_N]),
        exact_N,
    )


def _to_byte_offsets(letters_N2: Tensor, text_N: Tensor, texts: Texts) -> Tensor:
    """Convert offsets in characters of each text to bytes of `Texts`, (N, 2) int64."""
    starts = ((texts.bytes_X & 0xC0) != 0x80).nonzero().flatten()
    letters_before_R = torch.searchsorted(starts, texts.starts_R)
    return starts[letters_before_R[text_N][:, None] + letters_N2]


def _intersect_sorted(one_N: Tensor, other_N: Tensor) -> Tensor:
    """Find the values that two sorted lists share, sorted, once each."""
    if not one_N.numel() or not other_N.numel():
        return one_N[:0]
    found_N = torch.searchsorted(other_N, one_N).clamp(max=other_N.numel() - 1)
    return one_N[other_N[found_N] == one_N].unique_consecutive()
