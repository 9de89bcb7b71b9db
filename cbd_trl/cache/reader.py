"""Reads a teacher cache: rows are found by their tokens, and their tokens are compared on every read."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from cbd_trl.architectures.head import Head
from cbd_trl.cache.format import HEAD_FILE, Manifest, Settings, read_manifest
from cbd_trl.cache.index import RowIndex
from cbd_trl.cache.shards import CachedRow, check_shard, empty_row, read_row
from cbd_trl.utils.fingerprints import tokenizer_fingerprint
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_header import read_header
from cbd_trl.utils.untrusted import check_inside

# Each open shard maps a file into memory, of which a process may have some tens of thousands.
_OPEN_SHARDS = 64
_SHOWN_TOKENS = 12


class MissingRowError(ValueError):
    """A row that the cache does not hold."""


class TeacherCache:
    """A complete cache of a teacher's predictions. Nothing is loaded as a whole; copies in other processes reopen it.

    Made by `TeacherCache.open`.

    Args:
        folder: of the cache.
        manifest: its cache.json.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards: OrderedDict[int, Any] = OrderedDict()
        self._index: RowIndex | None = None

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> "TeacherCache":
        """Open a cache, whose files are checked by size and header.

        Args:
            folder: what `cbd-trl cache` wrote.
            verify: also read every file once and compare its sha256.

        Returns:
            the cache.

        Raises:
            ValueError: if it is not a cache, of another format version, incomplete, or a file is missing, cut short
                or altered.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.complete:
            of = "an unknown number of" if manifest.rows_wanted is None else f"{manifest.rows_wanted:,}"
            raise ValueError(
                f"The teacher cache {folder} is incomplete: it holds {manifest.rows:,} of {of} rows. Run the same "
                "command to finish it: what is there is kept."
            )
        for shard in manifest.shards:
            check_shard(folder, shard, manifest.settings, verify)
        cache = cls(folder, manifest)
        if manifest.settings.kind == "hidden":
            cache._check_head(verify)
        return cache

    @property
    def settings(self) -> Settings:
        """How the cache was made."""
        return self.manifest.settings

    def __len__(self) -> int:
        return self.manifest.rows

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_shards": OrderedDict(), "_index": None}

    def head(self) -> Head:
        """The output head of the teacher, for a cache of hidden states.

        Returns:
            the head, on the CPU.

        Raises:
            ValueError: for a cache of another kind.
        """
        if self.settings.kind != "hidden":
            raise ValueError(
                f"The teacher cache {self.folder} is of kind {self.settings.kind!r}, which holds no head. Write one "
                "with --kind hidden."
            )
        tensors = load_file(self.folder / HEAD_FILE)
        return Head(tensors["weight"], tensors.get("bias"), self.settings.scale, self.settings.softcap)

    def check(self, *, vocabulary_rows: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Refuse a student or a tokenizer that the cache was not made for.

        Args:
            vocabulary_rows: of the student's head.
            tokenizer: of the training data; None leaves it to the tokens of each row.

        Raises:
            ValueError: if the student has no row for a token of the cache, or the tokenizers differ.
        """
        made_with = self.settings.tokenizer_fingerprint
        if tokenizer is not None and made_with is not None and tokenizer_fingerprint(tokenizer) != made_with:
            raise ValueError(
                f"The teacher cache {self.folder} was made with another tokenizer (vocabulary {made_with[:12]} "
                f"against {tokenizer_fingerprint(tokenizer)[:12]} of the training data): its token ids mean other "
                f"tokens. Use the tokenizer of {self.settings.teacher or 'its teacher'}, or write a cache of a "
                "teacher that has the student's."
            )
        if vocabulary_rows <= self.manifest.highest_id:
            raise ValueError(
                f"The teacher cache {self.folder} holds predictions of token {self.manifest.highest_id}, but the "
                f"student has {vocabulary_rows} vocabulary rows (the teacher {self.settings.vocabulary_rows}). Resize "
                "the student's embeddings, or write the cache with a smaller k."
            )

    def check_rows(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Refuse a data set with rows that the cache does not hold, before a token is trained on.

        Args:
            rows: token ids of every row. A progress bar appears when it takes seconds.

        Raises:
            MissingRowError: with their number and the first of them.
        """
        total = missing = 0
        first: np.ndarray | None = None
        for row in Progress("Looking up the rows in the teacher cache", rows, unit="rows"):
            token_ids = np.asarray(row, np.int32)
            total += 1
            if len(token_ids) > 1 and self._find(token_ids) is None:
                missing += 1
                first = token_ids if first is None else first
        if first is not None:
            raise self._missing(first, f"{missing:,} of {total:,} rows are not in the teacher cache {self.folder}")

    def lookup(self, token_ids: Sequence[int] | np.ndarray) -> CachedRow:
        """The teacher's predictions for a row, or for the beginning of a longer one: they depend on nothing behind it.

        Args:
            token_ids: of the row, (n,).

        Returns:
            predictions at its n - 1 positions.

        Raises:
            MissingRowError: if no row of the cache is, or begins with, these tokens.
            ValueError: if the tokens found under the key are others.
        """
        token_ids = np.asarray(token_ids, np.int32)
        if len(token_ids) < 2:
            return empty_row(self.settings)
        row = self._find(token_ids)
        if row is None:
            raise self._missing(token_ids, f"A row is not in the teacher cache {self.folder}")
        number, tokens_at, positions_at = self._known_index().place(row)
        shard = self._shard(number)
        stored = shard.get_slice("tokens")[tokens_at : tokens_at + len(token_ids)].numpy()
        if not np.array_equal(stored, token_ids):
            raise ValueError(
                f"{self.folder / self.manifest.shards[number].file} was changed: under the key of the row that begins "
                f"with {_shown(token_ids)} it holds {_shown(stored)}. Copy it again, or delete the folder and write "
                "the cache again."
            )
        found = read_row(shard, self.settings, positions_at, len(token_ids) - 1)
        if found.indices is not None and int(found.indices.max()) > self.manifest.highest_id:
            raise ValueError(
                f"{self.folder / self.manifest.shards[number].file} was changed: it predicts token "
                f"{int(found.indices.max())}, above {self.manifest.highest_id}, the highest that cache.json knows of. "
                "Copy it again, or delete the folder and write the cache again."
            )
        return found

    def _missing(self, token_ids: np.ndarray, what: str) -> MissingRowError:
        return MissingRowError(
            f"{what}: {len(token_ids)} tokens, {_shown(token_ids)}. Run `cbd-trl cache` on the rows in question (such "
            "as those of the evaluation) with this --output_dir, which adds them, with the chat template and a "
            "--max_length at least those of training. Rows cut in the middle are in no cache: pack with "
            "packing_strategy='bfd', not 'bfd_split' or 'wrapped'."
        )

    def _find(self, token_ids: np.ndarray) -> int | None:
        return self._known_index().find(token_ids)

    def _known_index(self) -> RowIndex:
        if self._index is None:
            self._index = RowIndex(self._shard, len(self.manifest.shards))
        return self._index

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(self.folder / self.manifest.shards[number].file, "pt")
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]

    def _check_head(self, verify: bool) -> None:
        path = self.folder / HEAD_FILE
        again = "Copy it again, or delete the folder and write the cache again."
        check_inside(self.folder, path, again)
        if not path.is_file():
            raise ValueError(f"{path} is missing: it is the head that makes predictions of the hidden states. {again}")
        with path.open("rb") as file:
            if verify and hashlib.file_digest(file, "sha256").hexdigest() != self.manifest.head_sha256:
                raise ValueError(f"{path} was changed: its sha256 is not the one it was written with. {again}")
        try:
            tensors, _ = read_header(path)
        except ValueError as error:
            raise ValueError(f"{error} {again}") from error
        rows, width = self.settings.vocabulary_rows, self.settings.width
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        wanted = {"weight": [rows, width], **({"bias": [rows]} if "bias" in shapes else {})}
        if shapes != wanted:
            raise ValueError(f"{path} was changed: it holds the shapes {shapes} instead of {wanted}. {again}")
        if any(tensor.dtype not in ("F32", "BF16", "F16") for tensor in tensors.values()):
            raise ValueError(f"{path} was changed: its numbers are no float32, bfloat16 or float16. {again}")


def _shown(token_ids: np.ndarray) -> str:
    shown = ", ".join(str(token) for token in token_ids[:_SHOWN_TOKENS])
    return f"[{shown}{', ...' if len(token_ids) > _SHOWN_TOKENS else ''}]"
