"""One shard: rows of predictions as flat arrays in a safetensors file.

Shapes: R rows, T their tokens, P = T - R their positions (the last token of a row predicts nothing), K, V, D as ever.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbd_trl.cache.format import Settings, Shard
from cbd_trl.utils.files import write_bytes
from cbd_trl.utils.tensor_files import read_header, tensor_bytes
from cbd_trl.utils.untrusted import check_inside

KEY_BYTES = 16
_WIDTHS = {"int32": ("I32", 4), "int64": ("I64", 8), "uint8": ("U8", 1), "uint16": ("U16", 2), "float32": ("F32", 4)}
_WIDTHS |= {"bfloat16": ("BF16", 2), "float16": ("F16", 2)}


@dataclass(frozen=True)
class CachedRow:
    """A teacher's predictions at the P = n - 1 positions of a row of n tokens.

    Attributes:
        target: log-probability at temperature 1 of the token that follows, (P,) float32.
        indices: kept tokens (most likely first) or draws, (P, K) int32; None for hidden states.
        log_probs: theirs at the temperature of the cache, (P, K) float32.
        tail: log-probability of all other tokens together, (P,) float32; only of top_k.
        hidden: last hidden states, (P, D) in the dtype of the cache; only of hidden.
    """

    target: Tensor
    indices: Tensor | None = None
    log_probs: Tensor | None = None
    tail: Tensor | None = None
    hidden: Tensor | None = None


def _per_position(settings: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, dtype and shape of what is stored for each position."""
    columns: dict[str, tuple[str, tuple[int, ...]]] = {"target": ("float32", ())}
    if settings.kind == "hidden":
        assert settings.hidden_dtype is not None and settings.hidden_size is not None
        return columns | {"hidden": (settings.hidden_dtype, (settings.hidden_size,))}
    assert settings.k is not None
    columns["ids_low"] = ("uint16", (settings.k,))
    if high := high_bytes(settings.k, settings.vocabulary_rows):
        columns["ids_high"] = ("uint8", (high,))
    if settings.value_bits == 16:
        columns |= {"values": ("uint16", (settings.k,)), "lowest": ("float32", ())}
    else:
        columns["values"] = ("float32", (settings.k,))
    return columns | ({"tail": ("float32", ())} if settings.kind == "top_k" else {})


def _columns(settings: Settings, rows: int, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, dtype and shape of everything in a shard."""
    positions = {name: (dtype, (tokens - rows, *shape)) for name, (dtype, shape) in _per_position(settings).items()}
    rows_too = {"keys": ("uint8", (rows, KEY_BYTES)), "lengths": ("int64", (rows,)), "tokens": ("int32", (tokens,))}
    return rows_too | positions


def stored_bytes(settings: Settings, rows: int, tokens: int) -> int:
    """Compute the bytes that rows take on disk, without the few kilobytes of headers.

    Args:
        settings: of the cache.
        rows: R.
        tokens: T.

    Returns:
        bytes.
    """
    columns = _columns(settings, rows, tokens).values()
    return sum(_WIDTHS[dtype][1] * int(np.prod(shape)) for dtype, shape in columns)


def write_shard(
    folder: Path, number: int, settings: Settings, token_rows: Sequence[np.ndarray], predictions: Sequence[CachedRow]
) -> tuple[Shard, int]:
    """Write one shard under a temporary name, then rename it.

    Args:
        folder: of the cache.
        number: of the shard, from 0.
        settings: of the cache.
        token_rows: token ids of each row, (n,) int32.
        predictions: of each row.

    Returns:
        its entry in the manifest, and the highest token id that is kept in it (-1 for hidden states).
    """
    lengths = [len(row) for row in token_rows]
    columns: dict[str, Any] = {
        "keys": np.frombuffer(b"".join(map(row_key, token_rows)), np.uint8).reshape(-1, KEY_BYTES).copy(),
        "lengths": np.asarray(lengths, np.int64),
        "tokens": np.concatenate(token_rows).astype(np.int32),
        "target": torch.cat([row.target for row in predictions]).numpy(),
    }
    highest = -1
    if settings.kind == "hidden":
        columns["hidden"] = torch.cat([_known(row.hidden) for row in predictions])
    else:
        ids_PK = torch.cat([_known(row.indices) for row in predictions]).numpy()
        highest = int(ids_PK.max(initial=-1))
        columns["ids_low"], columns["ids_high"] = pack_ids(ids_PK, settings.vocabulary_rows)
        values_PK = torch.cat([_known(row.log_probs) for row in predictions]).numpy()
        if settings.value_bits == 16:
            columns["values"], columns["lowest"] = quantize(values_PK)
        else:
            columns["values"] = values_PK
        if settings.kind == "top_k":
            columns["tail"] = torch.cat([_known(row.tail) for row in predictions]).numpy()
    wanted = _columns(settings, len(lengths), sum(lengths))
    tensors = {name: torch.as_tensor(columns[name]).contiguous() for name in wanted}
    data = tensor_bytes(tensors, {"format": "pt"})
    name = f"rows-{number:05d}.safetensors"
    write_bytes(folder / name, data)
    digest = hashlib.sha256(data).hexdigest()
    shard = Shard(file=name, rows=len(lengths), tokens=sum(lengths), num_bytes=len(data), sha256=digest)
    return shard, highest


def check_shard(folder: Path, shard: Shard, settings: Settings, verify: bool) -> None:
    """Check that a shard is what the manifest says.

    Args:
        folder: of the cache.
        shard: its entry in the manifest.
        settings: of the cache.
        verify: read all of it and compare its sha256, instead of its size and header alone.

    Raises:
        ValueError: missing, truncated, of other arrays, or altered.
    """
    path = folder / shard.file
    again = "Copy it again, or delete the folder and write the cache again."
    check_inside(folder, path, again)
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the cache lists it with {shard.rows:,} rows. {again}")
    size = path.stat().st_size
    if size != shard.num_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes instead of {shard.num_bytes:,}: it was cut short or changed. {again}"
        )
    with path.open("rb") as file:
        if verify and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path} was changed: its sha256 is not the one it was written with. {again}")
    try:
        found = {name: (entry.dtype, list(entry.shape)) for name, entry in read_header(path)[0].items()}
    except ValueError as error:
        raise ValueError(f"{error} {again}") from error
    wanted = {
        name: (_WIDTHS[dtype][0], list(shape))
        for name, (dtype, shape) in _columns(settings, shard.rows, shard.tokens).items()
    }
    if found != wanted:
        raise ValueError(f"{path} was changed: it holds the arrays {found} instead of {wanted}. {again}")


def read_row(shard: Any, settings: Settings, start: int, positions: int) -> CachedRow:
    """Read some positions from an open shard.

    Args:
        shard: an open safetensors file.
        settings: of the cache.
        start: of the positions among those of the shard.
        positions: how many.

    Returns:
        their predictions.
    """
    at = slice(start, start + positions)
    columns = {name: shard.get_slice(name)[at] for name in _per_position(settings)}
    target = columns["target"]
    if settings.kind == "hidden":
        return CachedRow(target, hidden=columns["hidden"])
    assert settings.k is not None
    high = columns["ids_high"].numpy() if "ids_high" in columns else np.zeros((positions, 0), np.uint8)
    indices = torch.from_numpy(unpack_ids(columns["ids_low"].numpy(), high, settings.vocabulary_rows))
    values = columns["values"]
    if settings.value_bits == 16:
        values = torch.from_numpy(dequantize(values.numpy(), columns["lowest"].numpy()))
    return CachedRow(target, indices, values, columns.get("tail"))


def empty_row(settings: Settings) -> CachedRow:
    """Make the predictions of a row without a position: (0,), (0, K) and (0, D)."""
    target = torch.zeros(0)
    if settings.kind == "hidden":
        assert settings.hidden_size is not None and settings.hidden_dtype is not None
        return CachedRow(
            target, hidden=torch.zeros(0, settings.hidden_size, dtype=getattr(torch, settings.hidden_dtype))
        )
    assert settings.k is not None
    tail = torch.zeros(0) if settings.kind == "top_k" else None
    return CachedRow(target, torch.zeros(0, settings.k, dtype=torch.int32), torch.zeros(0, settings.k), tail)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


# Of the 65,536 codes the last stands for -inf, which no step of a finite length reaches.
_STEPS = 65534
_MINUS_INFINITY = 65535


def row_key(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Hash a row to what it is found by: 16 bytes of blake2b of its token ids as little-endian int32.

    Args:
        token_ids: of one row of the data set.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(token_bytes(token_ids), digest_size=16).digest()


def token_bytes(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Encode token ids as little-endian int32, four bytes each."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def high_bits(vocabulary_rows: int) -> int:
    """Count the bits of a token id beyond the first 16: ceil(log2 V) - 16, and 0 for V <= 65,536."""
    return max(0, (vocabulary_rows - 1).bit_length() - 16)


def high_bytes(k: int, vocabulary_rows: int) -> int:
    """Count the bytes that the high bits of the k ids of a position take."""
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
    """Invert `pack_ids`.

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


def quantize(log_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round log-probabilities to steps of a 65,534th of their lowest: off by half a step at most, and 0 stays 0.

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


def dequantize(codes_PK: np.ndarray, lowest_P: np.ndarray) -> np.ndarray:
    """Invert `quantize`.

    Args:
        codes_PK: (P, K) uint16.
        lowest_P: (P,) float32.

    Returns:
        (P, K) float32, nats.
    """
    log_PK = codes_PK.astype(np.float32) * (lowest_P / np.float32(_STEPS))[:, None]
    log_PK[codes_PK == _MINUS_INFINITY] = -np.inf
    return log_PK
