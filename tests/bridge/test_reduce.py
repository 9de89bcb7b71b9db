from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbd_trl.bridge import Reduction, reduce_vocabulary
from cbd_trl.bridge.reduce import bytes_per_token, train_smaller_tokenizer
from cbd_trl.bridge.token_bytes import token_bytes
from cbd_trl.utils.tokenizers import tokenizer_hash
from tests.bridge.tokenizers_of_kinds import SPECIAL, TRICKY, corpus, make_tokenizer
from tests.tiny import tiny_model

_SIZES = {"byte_level": (500, 350), "byte_fallback": (500, 380)}


def _reduced(kind: str = "byte_level", **options: object) -> Reduction:
    tokenizer = make_tokenizer(kind, _SIZES[kind][0])
    model = tiny_model("llama", vocab_size=len(tokenizer) + 12, tie_word_embeddings=True)
    return reduce_vocabulary(model, tokenizer, corpus(seed=1), _SIZES[kind][1], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", _SIZES)
def test_a_smaller_vocabulary_reads_every_text_and_is_reported(kind: str) -> None:
    reduced, old = _reduced(kind), make_tokenizer(kind, _SIZES[kind][0])
    new, size = reduced.tokenizer, _SIZES[kind][1]
    assert len(new) == reduced.model.config.vocab_size == len(reduced.model.get_input_embeddings().weight) == size
    assert reduced.saved == (len(old) + 12 - size) * 32 == reduced.parameters[0] - reduced.model.num_parameters()
    for text in TRICKY:
        assert new.decode(new(text)["input_ids"]) == text
    held_out = corpus(seed=1)[9::10]
    lengths = [sum(len(t(text)["input_ids"]) for text in held_out) for t in (old, new)]
    total = sum(len(text.encode()) for text in held_out)
    assert reduced.bytes_per_token == (total / lengths[0], total / lengths[1])
    assert reduced.bytes_per_token[0] > 1 and 0 < reduced.covered <= 1
    assert len(reduced.match.copied) >= 256 and set(reduced.match.by_role) == set(new.all_special_ids)
    assert str(reduced).startswith(f"{reduced.parameters[0]:,} parameters -> {reduced.parameters[1]:,} (")


def test_fewer_tokens_need_more_of_them_for_a_text() -> None:
    tokenizer, texts = make_tokenizer(size=500), corpus()
    sizes = [bytes_per_token(train_smaller_tokenizer(tokenizer, texts[::2], size), texts[1::2]) for size in (280, 400)]
    assert sizes[0] < sizes[1] < bytes_per_token(tokenizer, texts[1::2])


def test_held_out_text_is_not_trained_on_and_options_reach_the_transplant() -> None:
    given = _reduced(held_out=["one text"], method="mean", pad_to_multiple_of=64)
    assert given.bytes_per_token[1] == 8 / len(given.tokenizer("one text")["input_ids"])
    assert len(given.model.get_input_embeddings().weight) == 384
    assert not torch.equal(
        given.model.get_input_embeddings().weight[:350], _reduced().model.get_input_embeddings().weight
    )
    texts = ["ba" * 20, "lo" * 20] * 5
    texts[9] = "xyz" * 20
    tokenizer = make_tokenizer(size=500)
    model = tiny_model("llama", vocab_size=500)
    learned = token_bytes(reduce_vocabulary(model, tokenizer, texts, 300).tokenizer)
    assert b"baba" in learned and b"xyz" not in learned


def test_texts_may_come_one_at_a_time() -> None:
    tokenizer, model, texts = make_tokenizer(size=500), tiny_model("llama", vocab_size=500), corpus()
    for held_out in (None, texts[:7]):
        whole = reduce_vocabulary(model, tokenizer, texts, 300, held_out=held_out)
        streamed = reduce_vocabulary(model, tokenizer, iter(texts), 300, held_out=held_out and iter(held_out))
        assert str(streamed) == str(whole) and streamed.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="held-out"):
        reduce_vocabulary(model, tokenizer, iter(texts), 300, held_out=iter(()))


def test_special_tokens_chat_template_and_its_marks_are_kept() -> None:
    tokenizer = make_tokenizer(size=500)
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>", "<never>", AddedToken("<role>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}<user><think>{{ m['content'] }}</s>{% endfor %}"
    tokenizer.name_or_path = "some/model"
    smaller = train_smaller_tokenizer(tokenizer, corpus(), 400)
    ids = smaller.get_vocab()
    assert {*SPECIAL, "<think>", "<role>"} <= ids.keys() and "<never>" not in ids and len(smaller) <= 400
    assert smaller.chat_template == tokenizer.chat_template and smaller.name_or_path == ""
    assert (smaller.pad_token, smaller.eos_token, smaller.unk_token) == ("<pad>", "</s>", "<unk>")
    row = smaller.apply_chat_template([{"role": "user", "content": "ba"}], tokenize=False)
    assert smaller(row)["input_ids"][:2] == [ids["<user>"], ids["<think>"]]
    assert len(tokenizer) == size + 3


_UNUSED = [f"<unused{place}>" for place in range(200)]
_HTML = ["<table>", "<hr>", "<b>", "<i>"]


def _like_gemma(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    """Loaded from a folder, with many special tokens that nothing uses, and added ones that are plain text."""
    tokenizer = make_tokenizer(kind, 500)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _UNUSED])
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(1, 5)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _HTML])
    tokenizer.add_tokens([AddedToken("<trim>", lstrip=True, rstrip=True), AddedToken("qux", single_word=True)])
    tokenizer.add_tokens(
        [AddedToken("<|reserved_special_token_7|>", special=True), AddedToken("<role>", special=True)]
    )
    ids = tokenizer.get_vocab()
    template = processors.TemplateProcessing(
        single="<unused1> $A", pair="<unused1> $A $B", special_tokens=[("<unused1>", ids["<unused1>"])]
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", _SIZES)
@pytest.mark.parametrize("size", [340, 420, 480])
def test_of_many_added_tokens_those_that_are_used_are_kept_and_the_size_is_reached(
    kind: str, size: int, tmp_path: Path
) -> None:
    old = _like_gemma(kind, tmp_path)
    old.chat_template = "{% for m in messages %}<unused2>{{ m['content'] }}<unused3>\n{% endfor %}"
    texts = [f"ba\n\n<table>{text.strip()} <trim> x qux quxphone <unused4>" for text in corpus(texts=40)]
    model = tiny_model("llama", vocab_size=len(old) + 3, tie_word_embeddings=True)
    ids = old.get_vocab()
    model.generation_config.eos_token_id = [ids["</s>"], ids["<unused5>"]]
    reduced = reduce_vocabulary(model, old, texts, size)
    new = reduced.tokenizer
    used = {f"<unused{place}>" for place in (1, 2, 3, 4, 5)} | {"\n\n", "\n", "<table>", "<trim>", "qux", "<role>"}
    added = {token.content for token in new.added_tokens_decoder.values()}
    assert added == used | {token for token in SPECIAL if token in old.added_tokens_encoder}
    assert len(new) == size == len(reduced.model.get_input_embeddings().weight) and set(new.get_vocab().values()) == {
        *range(size)
    }
    now = new.get_vocab()
    assert reduced.model.generation_config.eos_token_id == [now["</s>"], now["<unused5>"]]
    flags = {token.content: token for token in old.added_tokens_decoder.values()}
    for token in new.added_tokens_decoder.values():
        assert repr(token) == repr(flags[token.content])
    new.save_pretrained(tmp_path / "new")
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert again.get_vocab() == now and tokenizer_hash(again) == tokenizer_hash(new)
    for text in [*TRICKY, "a<hr>\n\n\n\n<table> \n", *texts[:2]]:
        for reader in (new, again):
            found = reader(text)["input_ids"]
            assert found[0] == now["<unused1>"] and found == new(text)["input_ids"]
            assert reader.decode(found[1:]) == old.decode(old(text)["input_ids"][1:])
    # No token of the text reaches over an added one.
    learned = [data for data in token_bytes(new) if data]
    assert {data for data in learned if b"<table>" in data or b"\n\n" in data} == {b"<table>", b"\n\n"}
    _check_kept_rows(model, reduced)


def _check_kept_rows(model: Any, reduced: Reduction) -> None:
    """Both models predict the same for the ids that both have."""
    new = torch.tensor(list(reduced.match.source))
    old = torch.tensor(list(reduced.match.source.values()))
    draw = torch.randint(len(new), (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(old[draw]).logits[..., old], reduced.model(new[draw]).logits[..., new]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_ids_with_gaps_and_an_unknown_token_that_nobody_calls_special() -> None:
    letters = {letter: 3 * place for place, letter in enumerate("abc ")}
    vocabulary = {**letters, "?": 20, "ab": 30, "abc": 31, "ca": 41, "cab": 43}
    merges = [("a", "b"), ("ab", "c"), ("c", "a"), ("c", "ab")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="?"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    model = tiny_model("llama", vocab_size=64)
    reduced = reduce_vocabulary(model, tokenizer, ["cabab"] * 20, 6)
    assert len(reduced.tokenizer) == 6 == len(reduced.model.get_input_embeddings().weight)
    ids = reduced.tokenizer("cabz")["input_ids"]
    assert reduced.tokenizer.decode(ids) == "cab?" and reduced.match.source[ids[0]] in vocabulary.values()
    _check_kept_rows(model, reduced)


def test_words_stay_apart_where_the_normaliser_writes_the_spaces() -> None:
    tokenizer = make_tokenizer("byte_fallback", 600)
    smaller = train_smaller_tokenizer(tokenizer, ["to va to va to va"] * 20, 340)
    assert b" to" in token_bytes(smaller) and b" to va" not in token_bytes(smaller)
    assert smaller.backend_tokenizer.pre_tokenizer is None and tokenizer.backend_tokenizer.pre_tokenizer is None


def test_bad_sizes_texts_and_kinds_are_refused() -> None:
    tokenizer, model = make_tokenizer(size=400), tiny_model("llama", vocab_size=400)
    with pytest.raises(ValueError, match=r"400\b.*\b400"):
        reduce_vocabulary(model, tokenizer, corpus(), 400)
    with pytest.raises(
        ValueError,
        match=r"size=100\b.*\b262\b",
    ):
        reduce_vocabulary(model, tokenizer, corpus(), 100)
    with pytest.raises(ValueError, match="held_out"):
        reduce_vocabulary(model, tokenizer, corpus(texts=9), 300)
    with pytest.raises(ValueError, match=r"Unigram.*transplant_vocabulary"):
        train_smaller_tokenizer(make_tokenizer("unigram"), corpus(), 50)
