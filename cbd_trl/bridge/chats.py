"""Chats rendered by the chat templates of two tokenizers, and aligned.

`read_chats` is `Bridge.read` for chats: both texts have the contents of the messages and the special tokens that end
them in common, and sometimes more; what only one template writes is left out of the alignment.

Shapes: B x T the student's batch, R its texts, R x U the teacher's batch, P segments of all chats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import logging

from cbd_trl.bridge.alignment import (
    NOWHERE,
    Alignment,
    Segments,
    Texts,
    TokenOffsets,
    byte_spans,
    first_of_text,
    sums_before,
)
from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.token_bytes import ByteAwareTokenizer, EncodedTexts
from cbd_trl.utils.formatting import readable_name

logger = logging.get_logger(__name__)


Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Chat:
    """Messages, and further arguments of their template.

    Attributes:
        messages: as `apply_chat_template` takes them.
        template: further arguments of `apply_chat_template`, such as `tools`.
    """

    messages: Sequence[Message]
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        text: the output of the template.
        spans: two for each message, (start, end) in characters: its content without white space around it, and the
            special token that ends it; None for what is not there or was not found.
    """

    text: str
    spans: list[Span | None]


_EMPTY = RenderedChat("", [])


def render(tokenizer: ByteAwareTokenizer, chat: Chat, **template: Any) -> RenderedChat:
    """Render a chat, and find the contents of its messages in it.

    Searching would not do: a content such as "user" is in the template too. The chat is rendered once more with
    placeholders as contents, which gives the text around them. If that text and the contents do not make up the chat,
    all spans are None.

    Args:
        tokenizer: with a chat template.
        chat: messages and arguments of the template.
        template: further arguments for this tokenizer alone.

    Returns:
        the text, and twice as many spans as there are messages.
    """
    options, messages = {**chat.template, **template}, chat.messages
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    placeholders = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if _has_text(message)}
    probe = [
        {**message, "content": placeholders[i]} if i in placeholders else message for i, message in enumerate(messages)
    ]
    rest = tokenizer.tokenizer.apply_chat_template(probe, tokenize=False, **options)
    around = []
    for placeholder in placeholders.values():
        before, found, rest = rest.partition(placeholder)
        if not found:
            return RenderedChat(text, [None] * (2 * len(messages)))
        around.append(before)
    around.append(rest)
    for trim in (str, str.strip):
        contents = {i: trim(messages[i]["content"]) for i in placeholders}
        spans: list[Span | None] = [None] * (2 * len(messages))
        joined = around[0]
        for (i, content), after in zip(contents.items(), around[1:], strict=True):
            start = len(joined) + len(content) - len(content.lstrip())
            spans[2 * i] = (start, start + len(content.strip()))
            joined += content
            spans[2 * i + 1] = _leading_special_span(tokenizer, after, len(joined))
            joined += after
        if joined == text:
            return RenderedChat(text, spans)
    return RenderedChat(text, [None] * (2 * len(messages)))


def read_chats(
    bridge: Bridge, rows: StudentRows, chats: Sequence[Chat | None], student_template: str | None = None
) -> TeacherRows:
    """Render chats in the teacher's template, tokenize them for it, and align them with the student's batch.

    Aligned are the contents of messages, the special tokens that end them, and text between them that is the same in
    both templates. The teacher reads the student's text instead, as in `Bridge.read`, where there is no chat, where a
    text is neither its chat in the student's template nor the beginning of it, and where the teacher's template
    rejects the chat.

    Args:
        bridge: between two tokenizers with chat templates.
        rows: the student's batch.
        chats: one for each text of the batch; None for a text that is not a chat.
        student_template: template of the student's text, if it is not its tokenizer's own.

    Raises:
        ValueError: if there are not as many chats as texts, or the rows have ids that the student's tokenizer does
            not.
    """
    if len(chats) != rows.texts:
        raise ValueError(
            f"Got {len(chats)} chats for a batch of {rows.texts} texts, so they cannot be matched. Pass a chat or "
            "None for each text, in the order of the batch; packed rows hold several texts each."
        )
    ours = [_try_render(bridge.student, chat, chat_template=student_template) or _EMPTY for chat in chats]
    encoded = bridge.student.encode([rendered.text for rendered in ours])
    source_BT, same_R = _match_rows(bridge.student, rows, encoded)
    theirs = [
        _try_render(bridge.teacher, chat) if same and mine is not _EMPTY else None
        for chat, mine, same in zip(chats, ours, same_R.tolist(), strict=True)
    ]
    known_R = torch.tensor([rendered is not None for rendered in theirs], dtype=torch.bool)
    if not known_R.any():
        return bridge.read(rows)
    pair = (ours, [rendered or _EMPTY for rendered in theirs])
    read = _align_rendered(bridge, rows.select(known_R), pair, encoded, source_BT)
    return read if known_R.all() else _merge(read, bridge.read(rows.select(~known_R)), known_R)


def _try_render(tokenizer: ByteAwareTokenizer, chat: Chat | None, **template: Any) -> RenderedChat | None:
    """Render a chat; None where there is none, or the template rejects it."""
    if chat is None:
        return None
    try:
        return render(tokenizer, chat, **template)
    except (TemplateError, TypeError) as error:
        logger.warning_once(
            f"The chat template of {readable_name(tokenizer.tokenizer.name_or_path) or 'a tokenizer'} rejects a chat "
            f"({error}): the teacher reads such chats in the student's template."
        )
        return None


def _align_rendered(
    bridge: Bridge,
    rows: StudentRows,
    rendered: tuple[Sequence[RenderedChat], Sequence[RenderedChat]],
    encoded: EncodedTexts,
    source_BT: Tensor,
) -> TeacherRows:
    """Align chats rendered for both models, the student's as `encoded`, to which `source_BT` points."""
    texts = [Texts.of([chat.text for chat in chats]) for chats in rendered]
    ours, theirs = _shared_segments(rendered, texts)
    offsets = byte_spans(bridge.student, encoded, texts[0]).shared_offsets(
        ours, bridge.student.table.special_V[encoded.ids_N]
    )
    kept_BT = rows.text_BT != NOWHERE
    source_N = source_BT[kept_BT]
    student = rows.to_batch(TokenOffsets(offsets.ends[source_N], offsets.usable[source_N], offsets.special[source_N]))
    read = bridge.teacher.encode([chat.text for chat in rendered[1]])
    return bridge.collate(rows, student, read, byte_spans(bridge.teacher, read, texts[1]), theirs, [])


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def _leading_special_span(tokenizer: ByteAwareTokenizer, text: str, start: int) -> Span | None:
    """Locate the special token with which a text begins, ignoring white space; `start` is where the text begins."""
    bare = text.lstrip()
    start += len(text) - len(bare)
    found = tokenizer.leading_special_token(bare)
    return (start, start + len(found)) if found else None


def _shared_segments(rendered: Sequence[Sequence[RenderedChat]], texts: Sequence[Texts]) -> tuple[Segments, Segments]:
    """Find the segments that are in both texts of each chat, in the student's texts and in the teacher's."""
    both = []
    for chat, pair in enumerate(zip(*rendered, strict=True)):
        if pair[1] is _EMPTY:
            continue
        for spans in _shared_spans(*pair):
            both.append(
                [
                    int(of_model.starts_R[chat]) + len(one.text[:offset].encode())
                    for one, of_model, span in zip(pair, texts, spans, strict=True)
                    for offset in span
                ]
            )
    bytes_P4 = torch.tensor(both, dtype=torch.int64).reshape(-1, 4)
    our_starts, our_ends, their_starts, their_ends = bytes_P4.T.contiguous()
    # A special token may be longer in one template; one byte is kept free between two segments.
    room_P = torch.maximum(our_ends - our_starts, their_ends - their_starts) + 1
    shared_ends_P = room_P.cumsum(0)
    return Segments(our_starts, our_ends, shared_ends_P), Segments(their_starts, their_ends, shared_ends_P)


def _match_rows(tokenizer: ByteAwareTokenizer, rows: StudentRows, encoded: EncodedTexts) -> tuple[Tensor, Tensor]:
    """Match the student's tokens with the tokens of the rendered chats.

    Returns:
        index of each token in `encoded` (B, T), 0 for those without, and the texts whose tokens all match, (R,) bool.
    """
    kept_BT = rows.text_BT != NOWHERE
    ids_N, text_N = rows.ids_BT[kept_BT], rows.text_BT[kept_BT]
    tokenizer.table.check(ids_N)
    sizes_R = torch.bincount(encoded.text_N, minlength=rows.texts)
    column_N = sums_before(torch.ones_like(ids_N), first_of_text(text_N))
    inside_N = column_N < sizes_R[text_N]
    source_N = torch.where(inside_N, (sizes_R.cumsum(0) - sizes_R)[text_N] + column_N, 0)
    wrong_N = ~inside_N
    if encoded.ids_N.numel():
        wrong_N |= encoded.ids_N[source_N] != ids_N
    differing_R = torch.bincount(text_N[wrong_N], minlength=rows.texts) > 0
    return torch.zeros_like(rows.ids_BT).masked_scatter(kept_BT, source_N), ~differing_R


def _shared_spans(ours: RenderedChat, theirs: RenderedChat) -> list[list[Span]]:
    """Find the spans of text that both texts of a chat have; adjacent ones of equal text are joined."""
    shared: list[list[Span]] = []
    ends, joins = [0, 0], False
    named = [[mine, yours] for mine, yours in zip(ours.spans, theirs.spans, strict=True) if mine and yours]
    for spans in [*named, [(len(ours.text),) * 2, (len(theirs.text),) * 2]]:
        between = [(end, start) for end, (start, _) in zip(ends, spans, strict=True)]
        for part in (between, spans):
            one, other = (rendered.text[slice(*span)] for rendered, span in zip((ours, theirs), part, strict=True))
            if one == other and joins:
                shared[-1] = [(whole[0], span[1]) for whole, span in zip(shared[-1], part, strict=True)]
            elif one and other and (one == other or part is spans):
                shared.append(part)
            # A special token that the other template writes in another way is a span by itself.
            joins = one == other and (joins or bool(one))
        ends = [end for _, end in spans]
    return shared


def _merge(one: TeacherRows, other: TeacherRows, first_R: Tensor) -> TeacherRows:
    """Take each text from one of two readings of the same batch.

    Args:
        one: without groups in the texts taken from `other`.
        other: likewise.
        first_R: texts that are taken from `one`, bool.

    Returns:
        the teacher's rows, their groups numbered in the order of the texts.
    """
    width = max(one.ids_RU.shape[1], other.ids_RU.shape[1])

    def chosen(ours_RU: Tensor, theirs_RU: Tensor, filling: int) -> Tensor:
        ours_RU, theirs_RU = (pad(x_RU, (0, width - x_RU.shape[1]), value=filling) for x_RU in (ours_RU, theirs_RU))
        return torch.where(first_R[:, None], ours_RU, theirs_RU)

    offset = one.alignment.groups
    theirs_BT, theirs_RU = (
        torch.where(group == NOWHERE, NOWHERE, group + offset)
        for group in (other.alignment.student_BT, other.alignment.teacher_RU)
    )
    student_BT = torch.maximum(one.alignment.student_BT, theirs_BT)
    teacher_RU = chosen(one.alignment.teacher_RU, theirs_RU, NOWHERE)
    groups = offset + other.alignment.groups
    number_G = torch.empty(groups, dtype=torch.int64)
    number_G[student_BT[student_BT != NOWHERE].unique_consecutive()] = torch.arange(groups)
    for group in (student_BT, teacher_RU):
        group[group != NOWHERE] = number_G[group[group != NOWHERE]]
    return TeacherRows(
        chosen(one.ids_RU, other.ids_RU, 0),
        chosen(one.mask_RU, other.mask_RU, 0),
        Alignment(student_BT, teacher_RU, groups),
        one.scored + other.scored,
        one.unaligned + other.unaligned,
    )
