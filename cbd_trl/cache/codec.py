"""Token ids and log-probabilities in few bytes, and back.

Shapes: P positions, K kept entries of a position.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# Of the 65,536 codes the last stands for -inf, which no step of a finite length reaches.
_STEPS = 65534
_MINUS_INFINITY = 65535


def row_key(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """What a row is found by: 16 bytes of blake2b of its token ids as little-endian int32.

    Args:
        token_ids: of one row of the data set.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(token_bytes(token_ids), digest_size=16).digest()


def token_bytes(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Token ids as little-endian int32, four bytes each."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def high_bits(vocabulary_rows: int) -> int:
    """Bits of a token id beyond the first 16: ceil(log2 V) - 16, and 0 for V <= 65,536."""
    return max(0, (vocabulary_rows - 1).bit_length() - 16)


def high_bytes(k: int, vocabulary_rows: int) -> int:
    """Bytes that the high bits of the k ids of a position take."""
    return (k * high_bits(vocabulary_rows) + 7) // 8


def pack_ids(ids_PK: np.ndarray, vocabulary_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Split token ids into their low 16 bits and the packed rest.

    Args:
        ids_PK: token ids below `vocabulary_rows`, (P, K).
        vocabulary_rows: V, which sets the width of the rest.

    Returns:
        low (P, K) uint16, and high (P, ceil(K h / 8)) uint8 for the h = `high_bits(V)` further bits of each id.
    """
    positions, k = ids_PK.shape
    width = high_bits(vocabulary_rows)
    high_PK = ids_PK.astype(np.uint32) >> 16
    bits_PKh = (high_PK[..., None] >> np.arange(width, dtype=np.uint32)) & 1
    packed = np.packbits(bits_PKh.reshape(positions, k * width).astype(np.uint8), axis=1)
    return ids_PK.astype(np.uint16), packed


def unpack_ids(low_PK: np.ndarray, high: np.ndarray, vocabulary_rows: int) -> np.ndarray:
    """The inverse of `pack_ids`.

    Args:
        low_PK: (P, K) uint16.
        high: (P, ceil(K h / 8)) uint8.
        vocabulary_rows: V.

    Returns:
        token ids, (P, K) int32.
    """
    width = high_bits(vocabulary_rows)
    ids_PK = low_PK.astype(np.int32)
    if width == 0:
        return ids_PK
    positions, k = low_PK.shape
    bits_PKh = np.unpackbits(high, axis=1, count=k * width).reshape(positions, k, width)
    return ids_PK | (bits_PKh.astype(np.int32) << np.arange(16, 16 + width, dtype=np.int32)).sum(-1, dtype=np.int32)


def quantise(log_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities as steps of a 65,534th of their lowest: off by half a step at most, and 0 stays 0.

    Args:
        log_PK: (P, K) float32, nats, at most 0; -inf keeps a code of its own.

    Returns:
        codes (P, K) uint16, and the lowest finite value of each position (P,) float32.
    """
    finite_PK = np.isfinite(log_PK)
    lowest_P = np.where(finite_PK, log_PK, 0.0).min(axis=1, initial=0.0).astype(np.float32)
    scale_P1 = np.where(lowest_P < 0, lowest_P, -1.0).astype(np.float64)[:, None]
    codes_PK = np.rint(np.where(finite_PK, log_PK, 0.0) / scale_P1 * _STEPS)
    return np.where(finite_PK, codes_PK, _MINUS_INFINITY).astype(np.uint16), lowest_P


def dequantise(codes_PK: np.ndarray, lowest_P: np.ndarray) -> np.ndarray:
    """The inverse of `quantise`.

    Args:
        codes_PK: (P, K) uint16.
        lowest_P: (P,) float32.

    Returns:
        (P, K) float32, nats.
    """
    log_PK = codes_PK.astype(np.float32) * (lowest_P / np.float32(_STEPS))[:, None]
    log_PK[codes_PK == _MINUS_INFINITY] = -np.inf
    return log_PK
