from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge import reduce_vocabulary, transplant_vocabulary
from cbd_trl.bridge.bridge import Bridge
from cbd_trl.bridge.objectives.prefix import PrefixTable
from cbd_trl.bridge.objectives.shared_tokens import SharedTokens
from cbd_trl.bridge.token_bytes import Vocabulary, token_bytes, tokenize_bytes
from cbd_trl.bridge.vocabulary import covered_share, match_vocabularies
from cbd_trl.report.measure import scored_bytes
from cbd_trl.utils.blocks import TokenBlocks
from cbd_trl.utils.tokenizers import tokenizer_difference, tokenizer_hash
from tests.bridge.tokenizers_of_kinds import KINDS, corpus, letters, make_tokenizer
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_bytes_of_the_chunk(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    table = token_bytes(tokenizer)
    chunks = [word.encode() for word in ["baké", " lomün", "数学 ba\n" if kind != "unigram" else "数学 ba"]]
    if kind != "unigram":
        chunks += ["数".encode()[:2], b"a" + "é".encode()[1:] + b" b", bytes(range(256))]
    for chunk, pieces in zip(chunks, tokenize_bytes(Vocabulary.of(tokenizer), chunks), strict=True):
        assert b"".join(table[index] for index in pieces) == chunk  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_token_of_the_tokenizer_itself_is_one_piece(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    texts = [data for data in token_bytes(tokenizer) if data and len(data) > 3]
    assert texts and [len(pieces) for pieces in tokenize_bytes(Vocabulary.of(tokenizer), texts)] == [1] * len(texts)


def test_what_no_token_can_write_has_no_pieces() -> None:
    assert tokenize_bytes(Vocabulary.of(letters("a", "b")), [b"ab", b"ac", b"cc", b"\xff", b""]) == [
        (0, 1),
        (0,),
        (),
        (),
        (),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_matches_itself_id_by_id(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    match = match_vocabularies(tokenizer, tokenizer)
    assert match.source == {index: index for index in range(len(tokenizer))}
    assert set(match.by_role) == set(tokenizer.all_special_ids) and not match.built and not match.neutral


def test_a_match_by_hand() -> None:
    old = letters("a", "b", "c", "ab", eos_token="<end>", pad_token="<fill>")
    new = letters("c", "abc", "ab", "x", "cx", pad_token="<pad>", eos_token="<eos>")
    match = match_vocabularies(old, new)
    assert match.copied == {0: 2, 2: 3} and match.by_role == {5: 5, 6: 4}
    # Of "cx" the c can be read, of "x" nothing.
    assert match.built == {1: (3, 2), 4: (2,)} and match.neutral == (3,)
    assert str(match) == "7 tokens: 2 with the bytes of an old one, 2 with its role, 2 built from pieces, 1 neutral"


def test_bytes_count_and_not_how_a_tokenizer_writes_them() -> None:
    bytelevel, fallback = make_tokenizer("byte_level"), make_tokenizer("byte_fallback")
    for old, new in ((bytelevel, fallback), (fallback, bytelevel)):
        match, ours, theirs = match_vocabularies(old, new), token_bytes(new), token_bytes(old)
        assert len(match.copied) >= 256
        assert all(ours[index] == theirs[source] for index, source in match.copied.items())
        for index, pieces in match.built.items():
            assert b"".join(theirs[piece] for piece in pieces) == ours[index]  # type: ignore[misc]
    # <0x41> and "a" of the new one are the same bytes: both are the one that texts are made of.
    match = match_vocabularies(bytelevel, fallback)
    names, ids = bytelevel.get_vocab(), fallback.get_vocab()
    assert match.copied[ids["<0x61>"]] == match.copied[ids["a"]] == names["a"]
    assert ids["<0x20>"] < ids["▁"] == match_vocabularies(fallback, bytelevel).copied[names["Ġ"]]


def test_the_begin_may_be_the_end_of_another_text_and_padding_takes_no_row_that_is_spoken() -> None:
    old = letters("a", bos_token="<text>", eos_token="<text>", pad_token="<text>", unk_token="<text>")
    new = letters("a", bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    match, ids = match_vocabularies(old, new), new.get_vocab()
    assert match.by_role == {ids["<s>"]: 1, ids["</s>"]: 1}
    assert match.neutral == tuple(sorted((ids["<pad>"], ids["<unk>"])))
    backwards = match_vocabularies(new, old)
    assert backwards.by_role == {1: ids["</s>"]}
    assert match_vocabularies(letters("a", eos_token="<end>"), new).by_role == {ids["<s>"]: 1, ids["</s>"]: 1}


def test_chat_marks_match_by_their_text_or_are_built_from_it() -> None:
    old, new = letters("a", "b", eos_token="<e>"), letters("b", "a", eos_token="</s>")
    old.add_tokens([AddedToken("<chat>", special=True), AddedToken("tool")])
    new.add_tokens(["<chat>", AddedToken("ab", special=True), AddedToken("tool")])
    match = match_vocabularies(old, new)
    ids = new.get_vocab()
    assert match.by_role == {ids["</s>"]: 2, ids["<chat>"]: 3}
    assert match.copied[ids["tool"]] == 4 and match.built == {ids["ab"]: (0, 1)}


def test_the_share_of_covered_bytes() -> None:
    old, new = letters("a", "b", "c", eos_token="<e>"), letters("a", "b", "ab", "c", eos_token="<e>")
    match = match_vocabularies(old, new)
    assert covered_share(match, new, ["abc", "c"]) == 0.5
    assert covered_share(match_vocabularies(old, old), old, [*corpus(texts=1), "abc"]) == 1.0
    with pytest.raises(ValueError, match="texts"):
        covered_share(match, new, [""])


def test_added_tokens_are_read_a_few_times_and_not_once_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each reading makes an object of every added token: 6,384 in Gemma's 262,144.
    reads: Counter[str] = Counter()
    for name in ("added_tokens_decoder", "all_special_ids", "all_special_tokens", "backend_tokenizer"):
        plain = getattr(PreTrainedTokenizerFast, name)

        def counted(self: PreTrainedTokenizerFast, name: str = name, plain: property = plain) -> object:
            reads[name] += 1
            return plain.fget(self)  # type: ignore[misc]

        monkeypatch.setattr(PreTrainedTokenizerFast, name, property(counted))
    for name in ("get_vocab", "__len__"):

        def called(
            self: PreTrainedTokenizerFast, name: str = name, whole: object = getattr(PreTrainedTokenizerFast, name)
        ) -> object:
            reads[name] += 1
            return whole(self)  # type: ignore[operator]

        monkeypatch.setattr(PreTrainedTokenizerFast, name, called)
    model = tiny_model("llama", vocab_size=400, tie_word_embeddings=True)
    ours, theirs = make_tokenizer("byte_level", 400), make_tokenizer("byte_fallback", 500)
    ours.add_tokens(["<a>", AddedToken("<b>", special=True)])
    steps: dict[str, Callable[[], object]] = {
        "match": lambda: match_vocabularies(ours, theirs),
        "bridge": lambda: Bridge(ours, theirs),
        "prefix": lambda: PrefixTable.of(ours, theirs),
        "shared": lambda: SharedTokens.of(ours, theirs),
        "transplant": lambda: transplant_vocabulary(model, make_tokenizer("byte_level", 400), theirs),
        "reduce": lambda: reduce_vocabulary(model, make_tokenizer("byte_level", 400), corpus(), 350),
        "bytes": lambda: scored_bytes(
            ours, TokenBlocks(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
        ),
        "difference": lambda: tokenizer_difference(ours, theirs, names=("a", "b")),
        "hash": lambda: tokenizer_hash(ours),
    }
    for step, run in steps.items():
        reads.clear()
        run()
        assert max(reads.values(), default=0) <= 30, (step, reads)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\b3 and 2\b"):
        match_vocabularies(letters("a", "b", eos_token="<e>"), letters("c", eos_token="<e>"))
