"""Small tokenizers of every kind with exact bytes, trained in a moment."""

import functools
import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
TRICKY = [
    "Émile's 1,234.5 naïve  tests:\n\tdon't split «déjà vu» – 数学 ok?",
    " leading and trailing ",
    "👩‍🔬🇮🇸 and a\u0301 \x00\x7f",
    "\n\n  def f(x):\r\n",
]
_SYLLABLES = ["ba", "ké", "lo", "mün", "ri", "sta", "to", "数学", "va", "xy", "ш", "e", "ing"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus(seed: int = 0, texts: int = 60) -> list[str]:
    """Make texts of invented words in several scripts; some are frequent, so that there is something to merge."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(150)]
    return [" ".join(draw.choices(words, weights=range(1, 151), k=30)) + ".\n" for _ in range(texts)]


def make_tokenizer(kind: str = "byte_level", size: int = 400, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `corpus(seed)`; its first ids are pad, bos, eos, unk and two special tokens of chats.

    Args:
        kind: one of `KINDS`.
        size: tokens, the special ones included; Unigram stops where it finds no more.
        seed: of the corpus.
    """
    return fast(Tokenizer.from_str(KINDS[kind](size, seed)))


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers, with the roles of `SPECIAL`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )


def letters(*tokens: str, **roles: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of these tokens in this order, merged from the left; those with a role are special."""
    vocabulary = {token: index for index, token in enumerate([*tokens, *dict.fromkeys(roles.values())])}
    merges = [(token[:-1], token[-1]) for token in tokens if {token[:-1], token[-1]} <= set(tokens)]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@functools.cache
def _byte_level(size: int, seed: int) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(corpus(seed), trainer)
    return backend.to_str()


@functools.cache
def _byte_fallback(size: int, seed: int) -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL + _BYTES, max_token_length=9, show_progress=False
    )
    backend.train_from_iterator(corpus(seed), trainer)
    # The trainer knows no byte tokens: as in Llama's, they are tokens of the model and not added ones.
    description = json.loads(backend.to_str())
    description["added_tokens"] = description["added_tokens"][: len(SPECIAL)]
    return json.dumps(description)


@functools.cache
def _unigram(size: int, seed: int) -> str:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(corpus(seed), trainer)
    return backend.to_str()


KINDS = {"byte_level": _byte_level, "byte_fallback": _byte_fallback, "unigram": _unigram}
