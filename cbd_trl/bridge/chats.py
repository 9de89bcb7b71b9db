"""One chat in two templates: what both texts share are the contents of its messages, and that they end.

Shapes: B x T the student's batch, P pieces of all chats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cbd_trl.bridge.alignment import NOWHERE, Placed
from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.placing import Pieces, Texts, first_of_text, place, sums_before
from cbd_trl.bridge.reader import Reader

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: what the template makes of it.
        spans: for each message where its content is, without white space around it, and where the mark is that ends
            it, (start, end) in characters; None for what it does not have, or what cannot be told.
    """

    text: str
    spans: list[tuple[int, int] | None]


def render(reader: Reader, messages: Sequence[Message], **template: Any) -> Rendered:
    """Render a chat, and find the contents of its messages in it.

    They are not searched for: a content such as "user" is in the template too. The chat is rendered once more with
    other contents, which tells the text around them; this and the contents must give the chat, or nothing is told.

    Args:
        reader: of a tokenizer with a chat template.
        messages: as `apply_chat_template` takes them.
        template: further arguments of it, such as `tools`.

    Returns:
        the text, and twice as many spans as there are messages.
    """
    text = reader.tokenizer.apply_chat_template(messages, tokenize=False, **template)
    stand_ins = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if _has_text(message)}
    probe = [{**message, "content": stand_ins[i]} if i in stand_ins else message for i, message in enumerate(messages)]
    rest = reader.tokenizer.apply_chat_template(probe, tokenize=False, **template)
    around = []
    for stand_in in stand_ins.values():
        before, found, rest = rest.partition(stand_in)
        if not found:
            return Rendered(text, [None] * (2 * len(messages)))
        around.append(before)
    around.append(rest)
    for trim in (str, str.strip):
        contents = {i: trim(messages[i]["content"]) for i in stand_ins}
        spans: list[tuple[int, int] | None] = [None] * (2 * len(messages))
        joined = around[0]
        for (i, content), behind in zip(contents.items(), around[1:], strict=True):
            start = len(joined) + len(content) - len(content.lstrip())
            spans[2 * i] = (start, start + len(content.strip()))
            joined += content
            spans[2 * i + 1] = _leading_mark(reader, behind, len(joined))
            joined += behind
        if joined == text:
            return Rendered(text, spans)
    return Rendered(text, [None] * (2 * len(messages)))


def read_chats(bridge: Bridge, rows: StudentRows, chats: Sequence[Sequence[Message]], **template: Any) -> TeacherRows:
    """Let the teacher read chats in its own template.

    The contents of messages are aligned, and the special tokens that end them; the text of the templates is not. A row
    that is not its chat in the student's template, or the beginning of it, is not aligned.

    Args:
        bridge: of both tokenizers, which have chat templates.
        rows: the student's batch, one text for each chat.
        chats: the messages.
        template: further arguments of `apply_chat_template`, for both sides.

    Raises:
        ValueError: if there are not as many chats as texts.
    """
    if len(chats) != rows.texts:
        raise ValueError(
            f"Got {len(chats)} chats for a batch of {rows.texts} texts: which is which is not known. Pass one list of "
            "messages for each text, in the order of the batch; packed rows hold several texts each."
        )
    sides = [[render(reader, chat, **template) for chat in chats] for reader in (bridge.student, bridge.teacher)]
    lines = [Texts.of([chat.text for chat in side]) for side in sides]
    ours, theirs = _shared_pieces(sides, lines)
    encoded = bridge.teacher.encode([chat.text for chat in sides[1]])
    spans = place(bridge.teacher, encoded, lines[1])
    student = _place_student(bridge.student, rows, [chat.text for chat in sides[0]], lines[0], ours)
    return bridge.join(rows, student, encoded, spans, theirs, [])


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def _leading_mark(reader: Reader, text: str, start: int) -> tuple[int, int] | None:
    """Where the special token is with which a text begins, white space aside."""
    bare = text.lstrip()
    start += len(text) - len(bare)
    found = [mark for mark in map(bytes.decode, reader.written.values()) if bare.startswith(mark)]
    return (start, start + max(map(len, found))) if found else None


def _shared_pieces(sides: Sequence[Sequence[Rendered]], lines: Sequence[Texts]) -> tuple[Pieces, Pieces]:
    """The pieces that are in both texts of a chat."""
    both = []
    for chat, pair in enumerate(zip(*sides, strict=True)):
        for spans in zip(*(rendered.spans for rendered in pair), strict=True):
            if None not in spans:
                both.append(
                    [
                        int(line.starts_R[chat]) + len(rendered.text[:letters].encode())
                        for rendered, line, span in zip(pair, lines, spans, strict=True)
                        for letters in span
                    ]
                )
    places_P4 = torch.tensor(both, dtype=torch.int64).reshape(-1, 4)
    our_starts, our_ends, their_starts, their_ends = places_P4.T.contiguous()
    # Marks may be written longer on one side; a place is kept free between two pieces.
    room_P = torch.maximum(our_ends - our_starts, their_ends - their_starts) + 1
    line_ends_P = room_P.cumsum(0)
    return Pieces(our_starts, our_ends, line_ends_P), Pieces(their_starts, their_ends, line_ends_P)


def _place_student(reader: Reader, rows: StudentRows, texts: list[str], line: Texts, pieces: Pieces) -> Placed:
    """The student's tokens, which are looked up in its own reading of the chats."""
    encoded = reader.encode(texts)
    placed = place(reader, encoded, line).on_line(pieces, reader.table.marks_V[encoded.ids_N])
    kept_BT = rows.text_BT != NOWHERE
    ids_N, text_N = rows.ids_BT[kept_BT], rows.text_BT[kept_BT]
    reader.table.check(ids_N)
    sizes_R = torch.bincount(encoded.text_N, minlength=len(texts))
    column_N = sums_before(torch.ones_like(ids_N), first_of_text(text_N))
    there_N = column_N < sizes_R[text_N]
    source_N = torch.where(there_N, (sizes_R.cumsum(0) - sizes_R)[text_N] + column_N, 0)
    wrong_N = ~there_N | (encoded.ids_N[source_N] != ids_N)
    strange_R = torch.bincount(text_N[wrong_N], minlength=len(texts)) > 0
    ends_N = torch.where(strange_R[text_N], NOWHERE, placed.ends[source_N])
    return rows.back(Placed(ends_N, placed.usable[source_N], placed.marks[source_N]))
