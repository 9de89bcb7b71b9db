"""Any bytes in the tokens of a tokenizer, whether they are a text or the half of a character."""

from collections.abc import Iterable

from cbd_trl.bridge.token_bytes import Vocabulary


def pieces_of(vocabulary: Vocabulary, chunks: Iterable[bytes]) -> list[tuple[int, ...]]:
    """The tokens of each chunk of bytes, read as the inside of a text.

    The tokenizer's model reads them alone: no normaliser, nothing put before a text, no cut between words. So the
    bytes of the pieces are those of the chunk, and a chunk that is one of the model's tokens is mostly that one.

    Args:
        vocabulary: of the tokenizer.
        chunks: the bytes.

    Returns:
        ids for each chunk. Bytes that the vocabulary cannot write are left out.
    """
    spelling, table, ids = vocabulary.spelling, vocabulary.bytes, vocabulary.ids
    model = vocabulary.tokenizer.backend_tokenizer.model

    def read(word: str) -> list[int]:
        if spelling.is_byte_token(word):
            return [ids[word]] if word in ids else []
        return [token.id for token in model.tokenize(word)]

    found = ([index for word in spelling.write(chunk) for index in read(word)] for chunk in chunks)
    return [tuple(index for index in pieces if table[index] is not None) for pieces in found]
