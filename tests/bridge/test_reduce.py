import pytest
import torch
from tokenizers import AddedToken

from cbd_trl.bridge import Reduction, reduce_vocabulary
from cbd_trl.bridge.reduce import bytes_per_token, train_smaller_tokenizer
from cbd_trl.bridge.token_bytes import token_bytes
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
    with pytest.raises(ValueError, match=r"measured on held-out texts, got none"):
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


def test_words_stay_apart_where_the_normaliser_writes_the_spaces() -> None:
    tokenizer = make_tokenizer("byte_fallback", 600)
    smaller = train_smaller_tokenizer(tokenizer, ["to va to va to va"] * 20, 340)
    assert b" to" in token_bytes(smaller) and b" to va" not in token_bytes(smaller)
    assert smaller.backend_tokenizer.pre_tokenizer is None and tokenizer.backend_tokenizer.pre_tokenizer is None


def test_bad_sizes_texts_and_kinds_are_refused() -> None:
    tokenizer, model = make_tokenizer(size=400), tiny_model("llama", vocab_size=400)
    with pytest.raises(ValueError, match=r"less than the 400 tokens there are, and positive, got 400"):
        reduce_vocabulary(model, tokenizer, corpus(), 400)
    with pytest.raises(ValueError, match=r"size=100 is too small: 6 special tokens.* alone are 262"):
        reduce_vocabulary(model, tokenizer, corpus(), 100)
    with pytest.raises(
        ValueError, match=r"measured on held-out texts, got none. Pass `held_out`, or 10 texts or more"
    ):
        reduce_vocabulary(model, tokenizer, corpus(texts=9), 300)
    with pytest.raises(ValueError, match=r"got a tokenizer whose model is Unigram.*transplant_vocabulary"):
        train_smaller_tokenizer(make_tokenizer("unigram"), corpus(), 50)
