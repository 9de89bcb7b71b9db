"""The same chats in the templates of both sides."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.bridge import Bridge, TeacherRows
from cbd_trl.bridge.chats import Chat, read_chats, render
from cbd_trl.bridge.token_bytes import ByteAwareTokenizer
from tests.bridge.alignment_helpers import groups_of, naive_groups, padded, spelled, with_bos
from tests.bridge.tokenizers_of_kinds import corpus, make_tokenizer

WORDS = corpus(texts=1)[0].split()
CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "  " + " ".join(WORDS[:4])},
        {"role": "assistant", "content": " ".join(WORDS[4:9]) + " 😀"},
    ],
    [
        {"role": "user", "content": "ba\nlo é"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "to"},
        {"role": "assistant", "content": WORDS[0] + "</"},
    ],
]
STUDENT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
TEACHER = "<s>{% for m in messages %}[{{ m['role'] }} says: {{ m['content'] | trim }} {{ '<eot>' }}\n{% endfor %}"


def _student(kind: str = "byte_level") -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(kind, 450)
    tokenizer.chat_template = STUDENT
    return tokenizer


def _teacher(kind: str = "byte_fallback") -> PreTrainedTokenizerFast:
    tokenizer = with_bos(make_tokenizer(kind, 600, seed=1))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    tokenizer.chat_template = TEACHER
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict[str, Any]]] = CHATS) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _chats(chats: list[list[dict[str, Any]]] = CHATS, **template: Any) -> list[Chat | None]:
    return [Chat(chat, template) for chat in chats]


def _read(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> TeacherRows:
    return read_chats(Bridge(student, teacher), padded(_ids(student)), _chats())


def _pieces(tokenizer: PreTrainedTokenizerFast, row: list[int], tokens: list[int]) -> bytes:
    pieces = spelled(tokenizer, row)
    return b"".join(pieces[token] for token in tokens)


@pytest.mark.parametrize("teacher_kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("student_kind", ["byte_level", "byte_fallback"])
def test_contents_and_ends_of_turns_are_aligned_and_the_template_is_not(student_kind: str, teacher_kind: str) -> None:
    student, teacher = _student(student_kind), _teacher(teacher_kind)
    rows = _read(student, teacher)
    for row, chat in enumerate(CHATS):
        theirs = rows.ids_RU[row][rows.mask_RU[row].bool()].tolist()
        assert theirs == _ids(teacher)[row]
        ours = _ids(student)[row]
        groups = groups_of(rows, row)
        marks = [pair for pair in groups if ours[pair[0][0]] == student.eos_token_id]
        assert len(marks) == len(chat)
        assert {theirs[yours[0]] for _, yours in marks} == {teacher.convert_tokens_to_ids("<eot>")}
        text = [pair for pair in groups if pair not in marks]
        found = [_pieces(student, ours, [i for mine, _ in text for i in mine]).decode()]
        found.append(_pieces(teacher, theirs, [j for _, yours in text for j in yours]).decode())
        assert found[0] == found[1]
        # What is missing has tokens that hold a space of the template beside it.
        contents = "".join(message["content"].strip() for message in chat)
        assert len(contents) >= len(found[0]) > 0.2 * len(contents)
        assert "says" not in found[1] and "<" not in found[0].replace("</", "")


def test_groups_in_a_content_are_those_of_a_naive_twin() -> None:
    student, teacher = _student(), _teacher("byte_level")
    teacher.chat_template = "<s>{% for m in messages %}<user>{{ m['content'] }}<eot>{% endfor %}"
    rows = _read(student, teacher)
    chat, ours, theirs = CHATS[1], _ids(student)[1], _ids(teacher)[1]
    expected, mine, yours = [], 1, 2
    for i, message in enumerate(chat):
        sides = [
            spelled(one, one(message["content"], add_special_tokens=False)["input_ids"]) for one in (student, teacher)
        ]
        for left, right in naive_groups(*sides):
            expected.append(([mine + i for i in left], [yours + j for j in right]))
        mine, yours = mine + len(sides[0]), yours + len(sides[1])
        expected.append(([mine], [yours]))
        # Before the third message both templates write the same mark.
        if i == 1:
            expected.append(([mine + 1], [yours + 1]))
        mine, yours = mine + 2, yours + 2
    assert ours[mine - 2] == student.eos_token_id and len(theirs) == yours - 1
    assert groups_of(rows, 1) == expected


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_where_the_templates_are_the_same_everything_is_aligned(kind: str) -> None:
    student, teacher = _student(), make_tokenizer(kind, 600, seed=1)
    teacher.chat_template = STUDENT
    chats = CHATS if kind != "unigram" else [[{**message, "content": "ba lo"} for message in chat] for chat in CHATS]
    bridge, rows = Bridge(student, teacher), padded(_ids(student, chats))
    ours, plain = read_chats(bridge, rows, _chats(chats)), bridge.read(rows)
    assert ours.ids_RU.tolist() == plain.ids_RU.tolist() and ours.mask_RU.tolist() == plain.mask_RU.tolist()
    assert [groups_of(ours, row) for row in (0, 1)] == [groups_of(plain, row) for row in (0, 1)]
    assert ours.unaligned == plain.unaligned < 0.1 * plain.scored


def test_text_that_is_the_same_between_different_marks_is_aligned() -> None:
    student, teacher = _student(), _teacher("byte_level")
    student.chat_template = "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    teacher.chat_template = "<s>{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}<eot>{% endfor %}"
    rows = _read(student, teacher)
    # The first token is predicted by nothing, and the head of the texts differs.
    head = len(student("\nsystem: ", add_special_tokens=False)["input_ids"])
    aligned = rows.alignment.student_BT[0] != NOWHERE
    assert aligned[head + 1 : len(_ids(student)[0])].all() and not aligned[:1].any()


def test_only_what_is_scored_is_used_and_the_rest_of_it_counted() -> None:
    student, teacher = _student(), _teacher()
    ids = _ids(student)
    start = [len(row) - row[::-1].index(student.convert_tokens_to_ids("<assistant>")) for row in ids]
    labels = [[-100] * n + row[n:] for n, row in zip(start, ids, strict=True)]
    rows = read_chats(Bridge(student, teacher), padded(ids, labels), _chats())
    whole = _read(student, teacher)
    for row in range(2):
        assert groups_of(rows, row) == [pair for pair in groups_of(whole, row) if pair[0][0] >= start[row]]
    assert rows.scored == sum(len(row) - n for n, row in zip(start, ids, strict=True))
    assert rows.scored - rows.unaligned == int((rows.alignment.student_BT != NOWHERE).sum())


def test_a_cut_row_is_aligned_as_far_as_it_goes_and_a_strange_one_is_read_as_it_is() -> None:
    student, teacher = _student(), _teacher()
    ids, bridge = _ids(student), Bridge(student, teacher)
    whole = _read(student, teacher)
    batch = padded([ids[0][:25], [*ids[1][:5], 9, *ids[1][6:]], ids[1][7:], ids[1]])
    assert ids[1][5] != 9
    read = read_chats(bridge, batch, [*_chats(), _chats()[1], None])
    complete = [pair for pair in groups_of(whole, 0) if pair[0][-1] < 25]
    assert groups_of(read, 0) == complete and len(complete) > 3
    plain = bridge.read(batch)
    for row in (1, 2, 3):
        assert groups_of(read, row) == groups_of(plain, row) != []
        length = int(plain.mask_RU[row].sum())
        assert read.ids_RU[row, :length].tolist() == plain.ids_RU[row, :length].tolist()
        assert int(read.mask_RU[row].sum()) == length
    assert read.scored == plain.scored
    assert read.scored - read.unaligned == int((read.alignment.student_BT != NOWHERE).sum())
    # Groups are numbered in the order of both batches.
    for side in (read.alignment.student_BT, read.alignment.teacher_RU):
        numbers = side[side != NOWHERE].unique_consecutive()
        assert torch.equal(numbers, torch.arange(read.alignment.groups))


def test_a_chat_that_the_teachers_template_refuses_is_read_in_the_students(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = _student(), _teacher()
    teacher.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEACHER
    )
    bridge, rows = Bridge(student, teacher), padded(_ids(student))
    read, plain, own = read_chats(bridge, rows, _chats()), bridge.read(rows), _read(student, _teacher())
    assert groups_of(read, 0) == groups_of(plain, 0) != groups_of(own, 0)
    assert groups_of(read, 1) == groups_of(own, 1) != groups_of(plain, 1)


def test_a_short_content_is_not_found_in_the_template() -> None:
    rendered = render(ByteAwareTokenizer(_teacher()), Chat(CHATS[0]))
    start, end = rendered.spans[0]  # type: ignore[misc]
    assert rendered.text[start - 6 : end] == "says: user"
    start, end = rendered.spans[1]  # type: ignore[misc]
    assert rendered.text[start:end] == "<eot>"
    assert rendered.spans.count(None) == 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}</s>{% endfor %}",
        "{% for m in messages %}{{ m['content'] | length }}</s>{% endfor %}",
        "{{ messages | length }} messages",
    ],
)
def test_a_template_that_does_not_show_the_contents_aligns_nothing(template: str) -> None:
    student, teacher = _student(), _teacher()
    teacher.chat_template = template
    rows = _read(student, teacher)
    assert rows.alignment.groups == 0 and rows.unaligned == rows.scored > 0


def test_messages_without_text_are_left_out() -> None:
    student, teacher = _student(), _teacher()
    chat = [
        {"role": "user", "content": "ba lo"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "to"},
    ]
    rows = read_chats(Bridge(student, teacher), padded(_ids(student, [chat])), _chats([chat]))
    ours = _ids(student, [chat])[0]
    found = [student.convert_ids_to_tokens(ours[i]) for mine, _ in groups_of(rows, 0) for i in mine]
    assert found.count("</s>") == 2 and "<assistant>" not in found


def test_arguments_of_the_template_are_handed_on() -> None:
    student, teacher = _student(), _teacher()
    teacher.chat_template = "{{ opening }}" + TEACHER
    rows = read_chats(Bridge(student, teacher), padded(_ids(student)), _chats(opening="lo"))
    assert teacher.decode(rows.ids_RU[0]).strip().startswith("lo")
    assert rows.alignment.groups == _read(student, teacher).alignment.groups


def test_as_many_chats_as_texts_are_wanted() -> None:
    student = _student()
    with pytest.raises(ValueError, match=r"\b1\b.*\b2\b"):
        read_chats(Bridge(student, _teacher()), padded(_ids(student)), _chats()[:1])


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="999"):
        read_chats(Bridge(_student(), _teacher()), padded([[1, 999], [1]]), _chats())


def test_the_teachers_chats_are_cut() -> None:
    student, teacher = _student(), _teacher()
    rows = read_chats(Bridge(student, teacher, max_length=20), padded(_ids(student)), _chats())
    whole = _read(student, teacher)
    assert torch.equal(rows.ids_RU, whole.ids_RU[:, :20])
    assert groups_of(rows, 0) == [pair for pair in groups_of(whole, 0) if pair[1][-1] < 20]
