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

from cbd_trl.cache.format import (
    Settings,
    Shard,
    dequantise,
    high_bytes,
    pack_ids,
    quantise,
    row_key,
    unpack_ids,
    write_atomically,
)
from cbd_trl.utils.tensor_files import read_header, tensor_bytes
from cbd_trl.utils.untrusted import check_inside

KEY_BYTES = 16
_WIDTHS = {"int32": ("I32", 4), "int64": ("I64", 8), "uint8": ("U8", 1), "uint16": ("U16", 2), "float32": ("F32", 4)}
_WIDTHS |= {"bfloat16": ("BF16", 2), "float16": ("F16", 2)}


@dataclass(frozen=True)
class CachedRow:
    """What a teacher says at the P = n - 1 positions of a row of n tokens.

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
        assert settings.dtype is not None and settings.width is not None
        return columns | {"hidden": (settings.dtype, (settings.width,))}
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
    """Bytes that rows take on disk, without the few kilobytes of headers.

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
            columns["values"], columns["lowest"] = quantise(values_PK)
        else:
            columns["values"] = values_PK
        if settings.kind == "top_k":
            columns["tail"] = torch.cat([_known(row.tail) for row in predictions]).numpy()
    wanted = _columns(settings, len(lengths), sum(lengths))
    tensors = {name: torch.as_tensor(columns[name]).contiguous() for name in wanted}
    data = tensor_bytes(tensors, {"format": "pt"})
    name = f"rows-{number:05d}.safetensors"
    write_atomically(folder / name, data)
    return Shard(name, len(lengths), sum(lengths), len(data), hashlib.sha256(data).hexdigest()), highest


def check_shard(folder: Path, shard: Shard, settings: Settings, verify: bool) -> None:
    """Refuse a shard that is not what the manifest says.

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
    if size != shard.size:
        raise ValueError(f"{path} has {size:,} bytes instead of {shard.size:,}: it was cut short or changed. {again}")
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
        values = torch.from_numpy(dequantise(values.numpy(), columns["lowest"].numpy()))
    return CachedRow(target, indices, values, columns.get("tail"))


def empty_row(settings: Settings) -> CachedRow:
    """The predictions of a row without a position: (0,), (0, K) and (0, D)."""
    target = torch.zeros(0)
    if settings.kind == "hidden":
        assert settings.width is not None and settings.dtype is not None
        return CachedRow(target, hidden=torch.zeros(0, settings.width, dtype=getattr(torch, settings.dtype)))
    assert settings.k is not None
    tail = torch.zeros(0) if settings.kind == "top_k" else None
    return CachedRow(target, torch.zeros(0, settings.k, dtype=torch.int32), torch.zeros(0, settings.k), tail)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
