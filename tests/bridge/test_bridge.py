"""Special tokens, broken rows, packing and normalizers: what is aligned, what is masked and counted."""

import pytest
import torch
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge.alignment import NOWHERE
from cbd_trl.bridge.bridge import Bridge, StudentRows
from cbd_trl.bridge.token_bytes import ByteAwareTokenizer
from tests.bridge.alignment_helpers import groups_of, normalizing, padded, random_texts, read, spelled, with_bos
from tests.bridge.tokenizers_of_kinds import corpus, fast, make_tokenizer

TEXT = corpus(texts=1)[0]


def _with_roles(tokenizer: PreTrainedTokenizerFast, **roles: str) -> PreTrainedTokenizerFast:
    """The same tokenizer with other special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **roles)


def _teacher_tokens(teacher: PreTrainedTokenizerFast, bridge: Bridge, ids: list[int]) -> list[str]:
    rows = bridge.read(padded([ids]))
    return teacher.convert_ids_to_tokens(rows.ids_RU[0][rows.mask_RU[0].bool()].tolist())


def _other_roles() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("byte_level", 500, seed=1)
    tokenizer.add_special_tokens({"eos_token": "<end>", "bos_token": "<begin>"})
    return _with_roles(tokenizer, eos_token="<end>", bos_token="<begin>")


def test_eos_is_eos_and_other_special_tokens_are_those_of_the_same_text() -> None:
    student, teacher = make_tokenizer(), _other_roles()
    ids = student("<user>ba</s>lo<assistant>")["input_ids"]
    rows = Bridge(student, teacher).read(padded([ids]))
    tokens = teacher.convert_ids_to_tokens(rows.ids_RU[0].tolist())
    assert [token for token in tokens if token[0] == "<"] == ["<user>", "<end>", "<assistant>"]
    marks = [(student.convert_ids_to_tokens(ids[i[0]]), tokens[j[0]]) for i, j in groups_of(rows, 0) if i[0] and i]
    assert ("</s>", "<end>") in marks and ("<assistant>", "<assistant>") in marks
    assert rows.unaligned == 0


def test_bos_of_one_side_is_left_out_or_added() -> None:
    plain, bos = make_tokenizer("byte_fallback", 450), with_bos(make_tokenizer("byte_fallback", 450))
    ids = plain(TEXT)["input_ids"]
    added = Bridge(plain, bos).read(padded([ids]))
    assert added.ids_RU[0].tolist() == [bos.bos_token_id, *ids]
    # The student's first token is predicted by nothing, the teacher's is.
    assert added.alignment.student_BT[0].tolist() == [NOWHERE, *range(len(ids) - 1)]
    left_out = Bridge(bos, plain).read(padded([[bos.bos_token_id, *ids]]))
    assert left_out.ids_RU[0].tolist() == ids
    assert left_out.alignment.student_BT[0].tolist() == [NOWHERE, NOWHERE, *range(len(ids) - 1)]
    assert left_out.unaligned == 1
    both = Bridge(bos, bos).read(padded([[bos.bos_token_id, *ids]]))
    assert both.ids_RU[0].tolist() == [bos.bos_token_id, *ids]
    assert both.unaligned == 0


def test_a_bos_that_a_template_wrote_is_not_doubled() -> None:
    plain, bos = make_tokenizer("byte_fallback", 450), with_bos(make_tokenizer("byte_fallback", 450))
    ids = [plain.bos_token_id, *plain(TEXT)["input_ids"]]
    assert Bridge(plain, bos).read(padded([ids])).ids_RU[0].tolist() == ids


def test_a_special_token_that_the_teacher_lacks_is_left_out_and_no_group_reaches_over_it() -> None:
    student, teacher = make_tokenizer(), make_tokenizer("byte_level", 700)
    student.add_special_tokens({"additional_special_tokens": ["<cut>"]})
    word = max((t for t in teacher.get_vocab() if t.isascii() and t.isalpha()), key=len)
    ids = student(word[:2] + "<cut>" + word[2:] + " ba")["input_ids"]
    cut = ids.index(student.convert_tokens_to_ids("<cut>"))
    rows = Bridge(student, teacher).read(padded([[student.eos_token_id, *ids]]))
    tokens = teacher.convert_ids_to_tokens(rows.ids_RU[0].tolist())
    assert word in tokens and "<cut>" not in tokens
    groups = groups_of(rows, 0)
    assert groups and all(max(mine) <= cut or min(mine) > cut + 1 for mine, _ in groups)
    assert all(tokens.index(word) not in yours for _, yours in groups)
    assert rows.unaligned == rows.scored - sum(len(mine) for mine, _ in groups) > 1


@pytest.mark.parametrize("marked", ["student", "teacher"])
def test_what_only_one_side_takes_for_special_is_masked(marked: str) -> None:
    plain, special = make_tokenizer(), make_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<cut>"]})
    # The teacher reads special tokens as text if it lacks them: the student has to write it so.
    pair = (plain, special) if marked == "teacher" else (special, plain)
    ids = plain("ba <cut> lo")["input_ids"] if marked == "teacher" else special("ba <cut> lo")["input_ids"]
    rows = Bridge(*pair).read(padded([ids]))
    text = {i for mine, _ in groups_of(rows, 0) for i in mine}
    spelled_out = [student_token for i, student_token in enumerate(spelled(pair[0], ids)) if i in text]
    assert b"cut" not in b"".join(spelled_out) and spelled_out[-1].endswith(b"lo"[-1:])
    assert rows.unaligned > 0


def test_a_space_that_a_tokenizer_adds_is_not_text() -> None:
    level, fallback = make_tokenizer("byte_level"), make_tokenizer("byte_fallback", 500)
    for text in ("ba lo", " ba lo", "  ba", "数学", "数学 ba"):
        for student, teacher in ((level, fallback), (fallback, level), (fallback, fallback)):
            eos = student.eos_token_id
            rows = Bridge(student, teacher).read(padded([student(text)["input_ids"] + [eos]]))
            expected = teacher(text)["input_ids"] + [teacher.eos_token_id]
            assert rows.ids_RU[0].tolist() == expected
            last = groups_of(rows, 0)[-1]
            assert last == ([len(student(text)["input_ids"])], [len(expected) - 1])
    assert ByteAwareTokenizer(fallback).space_at_start and not ByteAwareTokenizer(level).space_at_start


def test_a_space_after_a_special_token_is_the_tokenizers_own() -> None:
    tokenizer = make_tokenizer("unigram")
    assert ByteAwareTokenizer(tokenizer).space_after_special_token
    rows = read(tokenizer, make_tokenizer(), ["ba lo</s>to ri"])
    tokens = make_tokenizer().decode(rows.ids_RU[0])
    assert tokens == "ba lo</s>to ri"


def test_half_a_character_at_the_end_is_masked_and_hurts_nothing_before_it() -> None:
    student, teacher = make_tokenizer("byte_level", 300), make_tokenizer("byte_fallback", 500)
    ids = student("ba lo 😀")["input_ids"]
    whole, cut = (Bridge(student, teacher).read(padded([ids[:n]])) for n in (len(ids), len(ids) - 2))
    assert all(whole.alignment.student_BT[0, -4:] != NOWHERE)
    before = len(student("ba lo ")["input_ids"])
    assert groups_of(cut, 0) == [pair for pair in groups_of(whole, 0) if pair[0][-1] < before]
    assert cut.scored - cut.unaligned == sum(len(mine) for mine, _ in groups_of(cut, 0))
    assert cut.unaligned >= 2


def test_half_a_character_in_the_middle_leaves_the_rest_aligned() -> None:
    student = make_tokenizer("byte_level", 300)
    smile, tail = student("😀")["input_ids"][:2], student(TEXT)["input_ids"]
    rows = Bridge(student, make_tokenizer("byte_fallback", 500)).read(
        padded([[*student("ba")["input_ids"], *smile, *tail]])
    )
    aligned = rows.alignment.student_BT[0, -len(tail) :] != NOWHERE
    assert aligned[1:].all()


def test_the_teachers_rows_are_cut_and_the_rest_is_counted() -> None:
    student, teacher = make_tokenizer(), make_tokenizer("byte_level", 700)
    rows = padded([student(TEXT)["input_ids"], student("ba")["input_ids"]])
    whole, cut = Bridge(student, teacher).read(rows), Bridge(student, teacher, max_length=7).read(rows)
    assert cut.ids_RU.shape == (2, 7) and torch.equal(cut.ids_RU, whole.ids_RU[:, :7])
    assert groups_of(cut, 0) == [pair for pair in groups_of(whole, 0) if pair[1][-1] < 7]
    assert cut.unaligned > whole.unaligned
    assert groups_of(cut, 1) == groups_of(whole, 1)


def test_a_row_cut_on_the_students_side_is_aligned_as_far_as_it_goes() -> None:
    student, teacher = make_tokenizer(), make_tokenizer("byte_level", 700)
    ids = student(TEXT)["input_ids"]
    whole, cut = (Bridge(student, teacher).read(padded([row])) for row in (ids, ids[:20]))
    assert groups_of(cut, 0)[:-1] == groups_of(whole, 0)[: len(groups_of(cut, 0)) - 1]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "bos"])
def test_empty_and_one_token_rows_have_no_groups_and_a_token_to_attend_to(kind: str) -> None:
    student = make_tokenizer()
    teacher = with_bos(make_tokenizer("byte_fallback", 450)) if kind == "bos" else make_tokenizer(kind, 500)
    alone = padded([[], [student.eos_token_id], student("b")["input_ids"][:1], student(TEXT)["input_ids"]])
    rows = Bridge(student, teacher).read(alone)
    assert all(not groups_of(rows, row) for row in range(3)) and groups_of(rows, 3)
    assert (rows.mask_RU.sum(1) > 0).all() and rows.mask_RU.sum(1)[0] == 1
    assert rows.scored == len(student(TEXT)["input_ids"]) - 1
    empty = Bridge(student, teacher).read(padded([[], []]))
    assert (empty.alignment.groups, empty.scored, empty.ids_RU.shape) == (0, 0, (2, 1))


def test_only_groups_that_are_scored_as_a_whole_are_used() -> None:
    student, teacher = make_tokenizer("byte_level", 300), make_tokenizer("byte_level", 700)
    ids = student(TEXT)["input_ids"]
    whole = read(student, teacher, [TEXT])
    large = next(pair for pair in groups_of(whole, 0) if len(pair[0]) > 2)
    labels = [-100 if i <= large[0][0] else token for i, token in enumerate(ids)]
    rows = Bridge(student, teacher).read(padded([ids], [labels]))
    assert groups_of(rows, 0) == [pair for pair in groups_of(whole, 0) if pair[0][0] > large[0][0]]
    assert rows.unaligned == len(large[0]) - 1
    nothing = Bridge(student, teacher).read(padded([ids], [[-100] * len(ids)]))
    assert (nothing.alignment.groups, nothing.scored, nothing.unaligned) == (0, 0, 0)


def test_packed_rows_are_read_as_texts_of_their_own() -> None:
    student, teacher = make_tokenizer(), with_bos(make_tokenizer("byte_fallback", 500))
    texts = random_texts(3, 6)
    ids = student(texts)["input_ids"]
    flat = torch.tensor([[token for row in ids for token in row]])
    positions = torch.tensor([[place for row in ids for place in range(len(row))]])
    packed = Bridge(student, teacher).read(StudentRows.of(flat, flat, position_ids_BT=positions))
    apart = Bridge(student, teacher).read(padded(ids))
    assert torch.equal(packed.ids_RU, apart.ids_RU) and torch.equal(packed.mask_RU, apart.mask_RU)
    assert torch.equal(packed.alignment.teacher_RU, apart.alignment.teacher_RU)
    kept = torch.tensor([[True] * len(row) + [False] * (max(map(len, ids)) - len(row)) for row in ids])
    assert packed.alignment.student_BT[0].tolist() == apart.alignment.student_BT[kept].tolist()
    assert (packed.scored, packed.unaligned) == (apart.scored, apart.unaligned)


@pytest.mark.parametrize(
    ("normalizer", "text", "aligned"),
    [
        (normalizers.Lowercase(), "ba Lo ba TO lo", " ba lo"),
        (normalizers.NFC(), "ba ke\u0301 lo to ba", " lo to ba"),
        (normalizers.NFKC(), "ba ﬁ lo ｔｏ to", " lo to"),
        (normalizers.Replace("xx", ""), "ba xx lo ri", " lo ri"),
        (normalizers.Strip(), "ba lo \n", " lo"),
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_after_what_a_normalizer_changed_the_alignment_goes_on(
    kind: str, normalizer: normalizers.Normalizer, text: str, aligned: str
) -> None:
    student, teacher = make_tokenizer("byte_level", 300), normalizing(kind, normalizer)
    ids = student(text)["input_ids"]
    rows = Bridge(student, teacher).read(padded([[student.pad_token_id, *ids]]))
    found = b"".join(spelled(student, ids)[i - 1] for mine, _ in groups_of(rows, 0) for i in mine)
    for word in aligned.split():
        assert found.count(word.encode()) >= aligned.split().count(word)
    changed = normalizer.normalize_str(text)
    assert changed != text and len(found) < len(text.encode())
    assert rows.unaligned > 0


def test_words_that_a_normalizer_leaves_alone_are_all_aligned() -> None:
    student, plain = make_tokenizer("byte_level", 300), make_tokenizer("byte_level", 700)
    teacher = normalizing("byte_level", normalizers.Lowercase(), 700)
    words = corpus(texts=2)[1].split()
    shouted = [word.upper() if i % 3 == 0 else word for i, word in enumerate(words)]
    text = " ".join(shouted)
    ids = student(text)["input_ids"]
    word_of, position = [], 0
    for piece in spelled(student, ids):
        position += len(piece)
        word_of.append(text.encode()[:position].decode(errors="ignore").count(" "))
    rows, same = read(student, teacher, [text]), read(student, plain, [text])
    untouched = [i for i, word in enumerate(word_of) if shouted[word] == shouted[word].lower()]
    everywhere = {i for mine, _ in groups_of(same, 0) for i in mine}
    masked = {i for i in untouched if rows.alignment.student_BT[0, i] == NOWHERE}
    assert masked == set(untouched) - everywhere and len(untouched) > 30


def test_spans_without_white_space_are_understood() -> None:
    student, teacher = make_tokenizer("byte_level", 300), normalizing("byte_level", normalizers.Lowercase(), 700)
    teacher.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "BA lo to  ri va"
    spans = teacher(text, return_offsets_mapping=True)["offset_mapping"]
    assert not any(text[start:end].startswith(" ") for start, end in spans)
    ids = student(text)["input_ids"]
    rows = Bridge(student, teacher).read(padded([ids]))
    aligned = [i for i in range(len(ids)) if rows.alignment.student_BT[0, i] != NOWHERE]
    assert b"".join(spelled(student, ids)[i] for i in aligned) == b" lo to  ri va"


def test_rows_of_a_batch_begin_texts_whatever_their_positions() -> None:
    ids = torch.tensor([make_tokenizer()("ba lo to")["input_ids"]] * 2)
    positions = torch.arange(ids.shape[1])
    rows = StudentRows.of(ids, ids, position_ids_BT=torch.stack([positions, positions + 5]))
    assert rows.texts == 2 and rows.text_BT[:, 0].tolist() == [0, 1]
    assert not rows.scored_BT[:, 0].any() and rows.scored_BT[:, 1:].all()


def test_a_student_that_normalizes_shows_the_teacher_what_it_read() -> None:
    student = normalizing("byte_level", normalizers.Lowercase())
    teacher = make_tokenizer("byte_level", 700)
    rows = read(student, teacher, ["BA Lo"])
    assert teacher.decode(rows.ids_RU[0]) == "ba lo"
    assert rows.unaligned == 0


def test_a_special_token_that_swallows_white_space_is_masked_and_nothing_else() -> None:
    student, teacher = make_tokenizer(), make_tokenizer()
    teacher.add_tokens([AddedToken("<wide>", rstrip=True, lstrip=True)])
    rows = Bridge(student, teacher).read(padded([student("ba <wide> lo to")["input_ids"]]))
    tokens = spelled(student, student("ba <wide> lo to")["input_ids"])
    found = b"".join(tokens[i] for mine, _ in groups_of(rows, 0) for i in mine)
    assert b"wide" not in found and found.endswith(b" to")


def test_ids_of_another_tokenizer_are_refused() -> None:
    bridge = Bridge(make_tokenizer(), make_tokenizer("byte_fallback"))
    with pytest.raises(ValueError, match=r"\b400\b.*\b399\b.*processing_class"):
        bridge.read(padded([[5, 400]]))
    with pytest.raises(ValueError, match="-7"):
        bridge.read(padded([[5, -7]]))


def test_padding_of_the_teachers_rows_is_masked() -> None:
    rows = read(make_tokenizer(), make_tokenizer("byte_level", 700), [TEXT, "ba"])
    padding = rows.mask_RU == 0
    assert padding.any() and (rows.ids_RU[padding] == 0).all()
    assert (rows.alignment.teacher_RU[padding] == NOWHERE).all()
    nameless = fast(make_tokenizer("byte_level", 700).backend_tokenizer)
    nameless.pad_token = None
    assert read(make_tokenizer(), nameless, [TEXT, "ba"]).ids_RU.shape == rows.ids_RU.shape
