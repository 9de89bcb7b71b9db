"""Where the rows of a teacher cache lie, by their tokens."""

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np

from cbd_trl.cache.codec import row_key, token_bytes
from cbd_trl.cache.shards import KEY_BYTES


class RowIndex:
    """Finds a row, or one that begins with it. Takes 32 bytes a row, and 4 a token once a beginning is asked for.

    Args:
        open_shard: the open safetensors file of a number.
        count: how many shards there are.
    """

    def __init__(self, open_shard: Callable[[int], Any], count: int) -> None:
        self._open_shard, self._count = open_shard, count
        lengths, keys = [np.zeros(0, np.int64)], [np.zeros((0, KEY_BYTES), np.uint8)]
        for number in range(count):
            lengths.append(_lengths(open_shard(number), number))
            keys.append(open_shard(number).get_tensor("keys").numpy())
        self._first_rows = np.cumsum([len(part) for part in lengths])
        self._tokens_at = np.concatenate([np.cumsum(part) - part for part in lengths])
        # numpy takes zeros at the end of a key for nothing, which all keys being of one length makes harmless.
        flat = np.concatenate(keys).reshape(-1).view(f"S{KEY_BYTES}")
        self._row_of = np.argsort(flat, kind="stable")
        self._keys = flat[self._row_of]
        self._sorted_rows: tuple[list[bytes], np.ndarray] | None = None

    def find(self, token_ids: np.ndarray) -> int | None:
        """The number of the row that is these tokens, else of one that begins with them, else None.

        Args:
            token_ids: (n,).
        """
        key = np.array(row_key(token_ids), dtype=f"S{KEY_BYTES}")
        at = int(np.searchsorted(self._keys, key))
        if at < len(self._keys) and self._keys[at] == key:
            return int(self._row_of[at])
        rows, order = self._known_sorted_rows()
        prefix = token_bytes(token_ids)
        # Whatever begins with these bytes sorts right behind them.
        at = bisect.bisect_left(rows, prefix)
        return int(order[at]) if at < len(rows) and rows[at].startswith(prefix) else None

    def place(self, row: int) -> tuple[int, int, int]:
        """Where a row lies.

        Args:
            row: its number in the cache.

        Returns:
            its shard, and where in it its tokens and its positions begin.
        """
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        tokens_at = int(self._tokens_at[row])
        # Each row before it in the shard has one position less than tokens.
        return number, tokens_at, tokens_at - (row - int(self._first_rows[number]))

    def _known_sorted_rows(self) -> tuple[list[bytes], np.ndarray]:
        if self._sorted_rows is None:
            rows: list[bytes] = []
            for number in range(self._count):
                shard = self._open_shard(number)
                data = token_bytes(shard.get_tensor("tokens").numpy())
                ends = 4 * np.cumsum(_lengths(shard, number))
                rows += [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            order = sorted(range(len(rows)), key=rows.__getitem__)
            self._sorted_rows = [rows[i] for i in order], np.array(order, np.int64)
        return self._sorted_rows


def _lengths(shard: Any, number: int) -> np.ndarray:
    """How long its rows are: what a damaged or hostile one says would lead to tokens of other rows."""
    lengths = shard.get_tensor("lengths").numpy()
    tokens = shard.get_slice("tokens").get_shape()[0]
    # Each before the sum, which could overflow.
    if (lengths < 1).any() or (lengths > tokens).any() or int(lengths.sum()) != tokens:
        raise ValueError(
            f"Shard {number} of the teacher cache was changed: the lengths of its rows do not add up to its {tokens} "
            "tokens. Copy it again, or delete the folder and write the cache again."
        )
    return lengths
