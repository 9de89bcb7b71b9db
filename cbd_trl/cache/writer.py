"""Adds rows to a teacher cache shard by shard; what was written stays when the process is killed."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from safetensors import safe_open

from cbd_trl.architectures.head import Head
from cbd_trl.cache.codec import row_key
from cbd_trl.cache.format import (
    HEAD_FILE,
    MANIFEST,
    Manifest,
    Settings,
    check_settings,
    read_manifest,
    write_atomically,
    write_manifest,
)
from cbd_trl.cache.shards import KEY_BYTES, CachedRow, check_shard, write_shard
from cbd_trl.utils.tensor_files import tensor_bytes

SHARD_TOKENS = 65536


class CacheWriter:
    """A cache that is being written: a new one, or one that gets more rows.

    Args:
        folder: of the cache, made if there is none.
        settings: of every row.
        head: of the teacher, for a cache of hidden states.

    Raises:
        ValueError: if the folder holds a cache made in another way, a damaged one, or other files.
    """

    def __init__(self, folder: str | Path, settings: Settings, head: Head | None = None) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._head = head
        self._tokens: list[np.ndarray] = []
        self._predictions: list[CachedRow] = []
        self._rows_wanted: int | None = None
        self._manifest = self._open()
        self._keys = {key for shard in self._manifest.shards for key in _keys(self.folder / shard.file)}

    def _open(self) -> Manifest:
        if not (self.folder / MANIFEST).exists():
            others = [file.name for file in self.folder.glob("*") if not _is_ours(file.name)]
            if others:
                raise ValueError(
                    f"{self.folder} holds {sorted(others)[0]!r} and no cache: it is something else's folder. Give "
                    "--output_dir a new or empty one."
                )
            return Manifest(self.settings)
        manifest = read_manifest(self.folder)
        if not manifest.shards:
            # A first try that failed before its first shard binds nobody to its settings.
            return Manifest(self.settings)
        check_settings(self.folder, manifest.settings, self.settings)
        for shard in manifest.shards:
            check_shard(self.folder, shard, self.settings, verify=False)
        return manifest

    @property
    def manifest(self) -> Manifest:
        """What is written so far."""
        return self._manifest

    def has(self, token_ids: np.ndarray) -> bool:
        """Whether a row is there already, written or about to be.

        Args:
            token_ids: of the row, (n,).
        """
        return row_key(token_ids) in self._keys

    def begin(self, new_rows: int | None) -> None:
        """Say how many rows will be added. A new cache is marked as unfinished from here to `finish`.

        A complete one stays so until the first new shard is written: an addition that fails before leaves it usable.

        Args:
            new_rows: rows to add; None where a stream does not tell.
        """
        self._rows_wanted = None if new_rows is None else self._manifest.rows + new_rows
        if not self._manifest.complete:
            self._mark_unfinished()

    def _mark_unfinished(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = None
        if self._head is not None:
            tensors = {"weight": self._head.weight_VD.detach().cpu().contiguous()}
            if self._head.bias_V is not None:
                tensors["bias"] = self._head.bias_V.detach().cpu().contiguous()
            data = tensor_bytes(tensors, {"format": "pt"})
            digest = hashlib.sha256(data).hexdigest()
            write_atomically(self.folder / HEAD_FILE, data)
        self._update(complete=False, rows_wanted=self._rows_wanted, head_sha256=digest)

    def add(self, token_rows: list[np.ndarray], predictions: list[CachedRow]) -> None:
        """Add a batch of rows; a shard is written once it is full.

        Batches are never split over shards, so that a write that goes on works through the same batches, and rounds
        alike.

        Args:
            token_rows: token ids of each row, (n,).
            predictions: of each row.
        """
        self._keys.update(map(row_key, token_rows))
        self._tokens += token_rows
        self._predictions += predictions
        if sum(map(len, self._tokens)) >= SHARD_TOKENS:
            self._flush()

    def finish(self) -> Manifest:
        """Write what is left and mark the cache as complete.

        Returns:
            the manifest.
        """
        self._flush()
        self._update(complete=True, rows_wanted=self._manifest.rows)
        return self._manifest

    def _flush(self) -> None:
        if not self._tokens:
            return
        shards = self._manifest.shards
        shard, highest = write_shard(self.folder, len(shards), self.settings, self._tokens, self._predictions)
        self._tokens, self._predictions = [], []
        if self._manifest.complete:
            self._mark_unfinished()
        self._update(shards=(*shards, shard), highest_id=max(highest, self._manifest.highest_id))

    def _update(self, **changes: object) -> None:
        manifest = dataclasses.replace(self._manifest, **changes)  # type: ignore[arg-type]
        write_manifest(self.folder, manifest)
        self._manifest = manifest


def _keys(path: Path) -> list[bytes]:
    with safe_open(path, "np") as file:
        data = file.get_tensor("keys").tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def _is_ours(name: str) -> bool:
    """A file that a write killed before its first manifest may have left."""
    return (
        name.startswith(".tmp-") or name == HEAD_FILE or (name.startswith("rows-") and name.endswith(".safetensors"))
    )
