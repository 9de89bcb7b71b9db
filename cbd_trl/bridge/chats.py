"""One chat in two templates: both texts have the contents of its messages, that they end, and some of the rest.

Shapes: B x T the student's batch, R its texts, P pieces of all chats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import logging

from cbd_trl.bridge.alignment import NOWHERE, Alignment, Pieces, Placed, Texts, first_of_text, place, sums_before
from cbd_trl.bridge.bridge import Bridge, StudentRows, TeacherRows
from cbd_trl.bridge.token_bytes import Encoded, Reader
from cbd_trl.utils.formatting import readable_name

logger = logging.get_logger(__name__)


def merge(one: TeacherRows, other: TeacherRows, first_R: Tensor) -> TeacherRows:
    """Take each text from one of two readings of the same batch.

    Args:
        one: has nothing of the other's texts in its groups.
        other: likewise.
        first_R: which texts are taken from `one`, bool.

    Returns:
        the teacher's rows, their groups numbered in the order of the texts.
    """
    width = max(one.ids_RU.shape[1], other.ids_RU.shape[1])

    def chosen(ours_RU: Tensor, theirs_RU: Tensor, filling: int) -> Tensor:
        ours_RU, theirs_RU = (pad(x_RU, (0, width - x_RU.shape[1]), value=filling) for x_RU in (ours_RU, theirs_RU))
        return torch.where(first_R[:, None], ours_RU, theirs_RU)

    behind = one.alignment.groups
    theirs_BT, theirs_RU = (
        torch.where(side == NOWHERE, NOWHERE, side + behind)
        for side in (other.alignment.student_BT, other.alignment.teacher_RU)
    )
    student_BT = torch.maximum(one.alignment.student_BT, theirs_BT)
    teacher_RU = chosen(one.alignment.teacher_RU, theirs_RU, NOWHERE)
    groups = behind + other.alignment.groups
    number_G = torch.empty(groups, dtype=torch.int64)
    number_G[student_BT[student_BT != NOWHERE].unique_consecutive()] = torch.arange(groups)
    for side in (student_BT, teacher_RU):
        side[side != NOWHERE] = number_G[side[side != NOWHERE]]
    return TeacherRows(
        chosen(one.ids_RU, other.ids_RU, 0),
        chosen(one.mask_RU, other.mask_RU, 0),
        Alignment(student_BT, teacher_RU, groups),
        one.scored + other.scored,
        one.unaligned + other.unaligned,
    )


Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Chat:
    """Messages, and what else their template is given.

    Attributes:
        messages: as `apply_chat_template` takes them.
        template: further arguments of it, such as `tools`.
    """

    messages: Sequence[Message]
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: what the template makes of it.
        spans: for each message where its content is, without white space around it, and where the mark is that ends
            it, (start, end) in characters; None for what it does not have, or what cannot be told.
    """

    text: str
    spans: list[Span | None]


_NOTHING = Rendered("", [])


def render(reader: Reader, chat: Chat, **template: Any) -> Rendered:
    """Render a chat, and find the contents of its messages in it.

    They are not searched for: a content such as "user" is in the template too. The chat is rendered once more with
    other contents, which tells the text around them; this and the contents must give the chat, or nothing is told.

    Args:
        reader: of a tokenizer with a chat template.
        chat: messages and arguments of the template.
        template: further arguments for this side alone.

    Returns:
        the text, and twice as many spans as there are messages.
    """
    options, messages = {**chat.template, **template}, chat.messages
    text = reader.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    stand_ins = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if _has_text(message)}
    probe = [{**message, "content": stand_ins[i]} if i in stand_ins else message for i, message in enumerate(messages)]
    rest = reader.tokenizer.apply_chat_template(probe, tokenize=False, **options)
    around = []
    for stand_in in stand_ins.values():
        before, found, rest = rest.partition(stand_in)
        if not found:
            return Rendered(text, [None] * (2 * len(messages)))
        around.append(before)
    around.append(rest)
    for trim in (str, str.strip):
        contents = {i: trim(messages[i]["content"]) for i in stand_ins}
        spans: list[Span | None] = [None] * (2 * len(messages))
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


def read_chats(
    bridge: Bridge, rows: StudentRows, chats: Sequence[Chat | None], student_template: str | None = None
) -> TeacherRows:
    """Let the teacher read chats in its own template.

    The contents of messages are aligned, the special tokens that end them, and text between them that is the same in
    both templates; what only one template writes is not. The teacher reads the student's text, as `Bridge.read` does,
    where there is no chat, where a text is not its chat in the student's template or the beginning of it, and where
    the teacher's template refuses the chat.

    Args:
        bridge: of both tokenizers, which have chat templates.
        rows: the student's batch.
        chats: of each of its texts, None for those that are none.
        student_template: what made the student's text, where that is not its tokenizer's own template.

    Raises:
        ValueError: if there are not as many chats as texts.
    """
    if len(chats) != rows.texts:
        raise ValueError(
            f"Got {len(chats)} chats for a batch of {rows.texts} texts: which is which is not known. Pass a chat or "
            "None for each text, in the order of the batch; packed rows hold several texts each."
        )
    ours = [_try(bridge.student, chat, chat_template=student_template) or _NOTHING for chat in chats]
    encoded = bridge.student.encode([rendered.text for rendered in ours])
    source_BT, same_R = _look_up(bridge.student, rows, encoded)
    theirs = [
        _try(bridge.teacher, chat) if same and mine is not _NOTHING else None
        for chat, mine, same in zip(chats, ours, same_R.tolist(), strict=True)
    ]
    known_R = torch.tensor([rendered is not None for rendered in theirs], dtype=torch.bool)
    if not known_R.any():
        return bridge.read(rows)
    sides = [ours, [rendered or _NOTHING for rendered in theirs]]
    read = _read(bridge, rows.only(known_R), sides, encoded, source_BT)
    return read if known_R.all() else merge(read, bridge.read(rows.only(~known_R)), known_R)


def _try(reader: Reader, chat: Chat | None, **template: Any) -> Rendered | None:
    """None where there is no chat, or one that the template refuses."""
    if chat is None:
        return None
    try:
        return render(reader, chat, **template)
    except (TemplateError, TypeError) as error:
        logger.warning_once(
            f"The chat template of {readable_name(reader.tokenizer.name_or_path) or 'a tokenizer'} refuses a chat "
            f"({error}): the teacher reads such chats in the student's template."
        )
        return None


def _read(
    bridge: Bridge, rows: StudentRows, sides: Sequence[Sequence[Rendered]], encoded: Encoded, source_BT: Tensor
) -> TeacherRows:
    lines = [Texts.of([chat.text for chat in side]) for side in sides]
    ours, theirs = _shared_pieces(sides, lines)
    placed = place(bridge.student, encoded, lines[0]).on_line(ours, bridge.student.table.marks_V[encoded.ids_N])
    kept_BT = rows.text_BT != NOWHERE
    source_N = source_BT[kept_BT]
    student = rows.back(Placed(placed.ends[source_N], placed.usable[source_N], placed.marks[source_N]))
    read = bridge.teacher.encode([chat.text for chat in sides[1]])
    return bridge.join(rows, student, read, place(bridge.teacher, read, lines[1]), theirs, [])


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def _leading_mark(reader: Reader, text: str, start: int) -> Span | None:
    """Where the special token is with which a text begins, white space aside."""
    bare = text.lstrip()
    start += len(text) - len(bare)
    mark = reader.leading_mark(bare)
    return (start, start + len(mark)) if mark else None


def _shared_pieces(sides: Sequence[Sequence[Rendered]], lines: Sequence[Texts]) -> tuple[Pieces, Pieces]:
    """The pieces that are in both texts of a chat."""
    both = []
    for chat, pair in enumerate(zip(*sides, strict=True)):
        if pair[1] is _NOTHING:
            continue
        for spans in _shared_spans(*pair):
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


def _shared_spans(ours: Rendered, theirs: Rendered) -> list[list[Span]]:
    """Where the parts are that both texts of a chat have: neighbours that are the same text are one part."""
    shared: list[list[Span]] = []
    ends, joins = [0, 0], False
    named = [[mine, yours] for mine, yours in zip(ours.spans, theirs.spans, strict=True) if mine and yours]
    for spans in [*named, [(len(ours.text),) * 2, (len(theirs.text),) * 2]]:
        between = [(end, start) for end, (start, _) in zip(ends, spans, strict=True)]
        for part in (between, spans):
            one, other = (side.text[slice(*span)] for side, span in zip((ours, theirs), part, strict=True))
            if one == other and joins:
                shared[-1] = [(whole[0], span[1]) for whole, span in zip(shared[-1], part, strict=True)]
            elif one and other and (one == other or part is spans):
                shared.append(part)
            # A mark that the other side writes in its own way stays by itself.
            joins = one == other and (joins or bool(one))
        ends = [end for _, end in spans]
    return shared


def _look_up(reader: Reader, rows: StudentRows, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Find the student's tokens in its own reading of the chats.

    Returns:
        where each is there (B, T), 0 for those that are not, and which texts are there, (R,) bool.
    """
    kept_BT = rows.text_BT != NOWHERE
    ids_N, text_N = rows.ids_BT[kept_BT], rows.text_BT[kept_BT]
    reader.table.check(ids_N)
    sizes_R = torch.bincount(encoded.text_N, minlength=rows.texts)
    column_N = sums_before(torch.ones_like(ids_N), first_of_text(text_N))
    there_N = column_N < sizes_R[text_N]
    source_N = torch.where(there_N, (sizes_R.cumsum(0) - sizes_R)[text_N] + column_N, 0)
    wrong_N = ~there_N
    if encoded.ids_N.numel():
        wrong_N |= encoded.ids_N[source_N] != ids_N
    strange_R = torch.bincount(text_N[wrong_N], minlength=rows.texts) > 0
    return torch.zeros_like(rows.ids_BT).masked_scatter(kept_BT, source_N), ~strange_R
