"""Any bytes in the tokens of a tokenizer, whether they are a text or the half of a character."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from cbd_trl.bridge.token_bytes import spelling_of, token_bytes


def pieces_of(tokenizer: PreTrainedTokenizerBase, chunks: Iterable[bytes]) -> list[tuple[int, ...]]:
    """The tokens of each chunk of bytes, read as the inside of a text.

    The tokenizer's model reads them alone: no normaliser, nothing put before a text, no cut between words. So the
    bytes of the pieces are those of the chunk, and a chunk that is one of the model's tokens is mostly that one.

    Args:
        tokenizer: as `token_bytes` takes it.
        chunks: the bytes.

    Returns:
        ids for each chunk. Bytes that the vocabulary cannot write are left out.

    Raises:
        ValueError: as `token_bytes`.
    """
    spelling, table, ids = spelling_of(tokenizer), token_bytes(tokenizer), tokenizer.get_vocab()
    model = tokenizer.backend_tokenizer.model

    def read(word: str) -> list[int]:
        if spelling.is_byte_token(word):
            return [ids[word]] if word in ids else []
        return [token.id for token in model.tokenize(word)]

    found = ([index for word in spelling.write(chunk) for index in read(word)] for chunk in chunks)
    return [tuple(index for index in pieces if table[index] is not None) for pieces in found]
