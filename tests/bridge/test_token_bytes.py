import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cbd_trl.bridge.token_bytes import token_bytes
from tests.bridge.tokenizers_of_kinds import KINDS, SPECIAL, TRICKY, corpus, fast, make_tokenizer
from tests.tokenizer import tiny_tokenizer


def _joined(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    table = token_bytes(tokenizer)
    pieces = [table[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert None not in pieces
    return b"".join(pieces)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", [*TRICKY, *corpus(texts=2)])
def test_the_bytes_of_a_tokenised_text_are_the_text(kind: str, text: str) -> None:
    prefix = b" " if kind == "byte_fallback" else b""
    assert _joined(make_tokenizer(kind), text) == prefix + text.encode()


def test_a_unigram_joins_to_what_it_knows() -> None:
    text = corpus(texts=1)[0]
    assert _joined(make_tokenizer("unigram"), text) == b" " + text.encode()


def test_the_bytes_of_byte_level_letters_by_hand() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["  ", "é<tool>"])
    table, ids = token_bytes(tokenizer), tokenizer.get_vocab()
    expected = {
        "Ġ": b" ",
        "Ċ": b"\n",
        "Ã": b"\xc3",
        "ł": b"\xa0",
        "a": b"a",
        "  ": b"  ",
        "é<tool>": "é<tool>".encode(),
    }
    assert {token: table[ids[token]] for token in expected} == expected
    assert {piece for piece in table if piece is not None and len(piece) == 1} == {bytes([b]) for b in range(256)}


def test_the_bytes_of_byte_tokens_and_of_the_mark_of_a_space_by_hand() -> None:
    tokenizer = make_tokenizer("byte_fallback")
    table, ids = token_bytes(tokenizer), tokenizer.get_vocab()
    expected = {"<0x0A>": b"\n", "<0xC3>": b"\xc3", "▁": b" ", "é": "é".encode()}
    assert {token: table[ids[token]] for token in expected} == expected
    unigram = make_tokenizer("unigram")
    unigram.backend_tokenizer.add_tokens(["<0x0A>"])
    assert token_bytes(unigram)[unigram.get_vocab()["<0x0A>"]] == b"<0x0A>"


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_for_no_text_of_its_own_has_no_bytes(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(
        [AddedToken("<role>", special=True), AddedToken("<greedy>", rstrip=True), AddedToken("<plain>")]
    )
    table, ids = token_bytes(tokenizer), tokenizer.get_vocab()
    without = {token for token, index in ids.items() if table[index] is None}
    assert without == {*SPECIAL, "<role>", "<greedy>"}
    assert table[ids["<plain>"]] == b"<plain>" and len(table) == len(tokenizer)


def test_an_id_that_nothing_has_has_no_bytes() -> None:
    vocabulary = {"a": 0, "b": 3}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [b"a", None, None, b"b"]


def test_the_unknown_token_has_no_bytes_even_where_nobody_calls_it_special() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?"))
    backend.decoder = decoders.Fuse()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [b"a", None]


def test_bytes_are_those_of_the_normalised_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert _joined(tokenizer, "Ｅﬁ") == b"efi"


def _changed(**parts: object) -> PreTrainedTokenizerFast:
    backend = make_tokenizer().backend_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return fast(backend)


def test_what_does_not_keep_its_bytes_is_refused() -> None:
    dropping = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    with pytest.raises(ValueError, match=r"pre-tokenizer.*'\\n'"):
        token_bytes(_changed(pre_tokenizer=dropping))
    with pytest.raises(ValueError, match="pre-tokenizer"):
        token_bytes(tiny_tokenizer())
    with pytest.raises(ValueError, match="decoder"):
        backend = Tokenizer(models.BPE({"a": 0}, []))
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match='"WordPiece"'):
        token_bytes(_changed(decoder=decoders.WordPiece()))
    with pytest.raises(ValueError, match='"Strip"'):
        token_bytes(_changed(decoder=decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])))
    with pytest.raises(ValueError, match='"Replace"'):
        token_bytes(_changed(decoder=decoders.Sequence([decoders.Replace("▁", "_"), decoders.Fuse()])))
    with pytest.raises(ValueError, match=r"end_of_word_suffix.*</w>"):
        token_bytes(_changed(model=models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "some/model"

    with pytest.raises(ValueError, match="'some/model'"):
        token_bytes(Slow())  # type: ignore[arg-type]
