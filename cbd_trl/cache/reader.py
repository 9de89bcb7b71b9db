"""Reads a teacher cache: rows are found by their tokens, and their tokens are compared on every read."""

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_trl.architectures.backbone import Head
from cbd_trl.cache.format import HEAD_FILE, Manifest, Settings, read_manifest
from cbd_trl.cache.shards import KEY_BYTES, CachedRow, check_shard, empty_row, read_row, row_key, token_bytes
from cbd_trl.losses.teacher_outputs import HiddenOutputs, SampledOutputs, TeacherOutputs, TopKOutputs
from cbd_trl.teachers.local import Batch
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import read_header
from cbd_trl.utils.tokenizers import tokenizer_hash
from cbd_trl.utils.untrusted import check_inside


class RowIndex:
    """Finds a row, or one that begins with it. Takes 32 bytes a row, and 4 a token once a beginning is looked up.

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
    """How long its rows are: those of a damaged or hostile one would lead to tokens of other rows."""
    lengths = shard.get_tensor("lengths").numpy()
    tokens = shard.get_slice("tokens").get_shape()[0]
    # Each before the sum, which could overflow.
    if (lengths < 1).any() or (lengths > tokens).any() or int(lengths.sum()) != tokens:
        raise ValueError(
            f"Shard {number} of the teacher cache was changed: the lengths of its rows do not add up to its {tokens} "
            "tokens. Copy it again, or delete the folder and write the cache again."
        )
    return lengths


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
            of = "an unknown number of" if manifest.expected_rows is None else f"{manifest.expected_rows:,}"
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
        """Check that the cache was made for a student and a tokenizer.

        Args:
            vocabulary_rows: of the student's head.
            tokenizer: of the training data; None leaves it to the tokens of each row.

        Raises:
            ValueError: if the student has no row for a token of the cache, or the tokenizers differ.
        """
        made_with = self.settings.tokenizer_sha256
        if tokenizer is not None and made_with is not None and (found := tokenizer_hash(tokenizer)) != made_with:
            raise ValueError(
                f"The teacher cache {self.folder} was made with another tokenizer (hash {made_with[:12]} against "
                f"{found[:12]} of the training data): its token ids mean other tokens. Use the tokenizer of "
                f"{self.settings.teacher or 'its teacher'}, or write a cache of a teacher that has the student's."
            )
        if vocabulary_rows <= self.manifest.highest_token_id:
            raise ValueError(
                f"The teacher cache {self.folder} holds predictions of token {self.manifest.highest_token_id}, but "
                f"the student has {vocabulary_rows} vocabulary rows (the teacher {self.settings.vocabulary_rows}). "
                "Resize the student's embeddings, or write the cache with a smaller k."
            )

    def check_rows(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Check that the cache holds the rows of a data set, before a token is trained on.

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
        if found.indices is not None and int(found.indices.max()) > self.manifest.highest_token_id:
            raise ValueError(
                f"{self.folder / self.manifest.shards[number].file} was changed: it predicts token "
                f"{int(found.indices.max())}, above {self.manifest.highest_token_id}, the highest that cache.json "
                "records. Copy it again, or delete the folder and write the cache again."
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
        rows, width = self.settings.vocabulary_rows, self.settings.hidden_size
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        wanted = {"weight": [rows, width], **({"bias": [rows]} if "bias" in shapes else {})}
        if shapes != wanted:
            raise ValueError(f"{path} was changed: it holds the shapes {shapes} instead of {wanted}. {again}")
        if any(tensor.dtype not in ("F32", "BF16", "F16") for tensor in tensors.values()):
            raise ValueError(f"{path} was changed: its numbers must be float32, bfloat16 or float16. {again}")


def _shown(token_ids: np.ndarray) -> str:
    shown = ", ".join(str(token) for token in token_ids[:_SHOWN_TOKENS])
    return f"[{shown}{', ...' if len(token_ids) > _SHOWN_TOKENS else ''}]"


class CachedTeacher:
    """The answers of a teacher, which the data collator put into the batch.

    Args:
        cache: where they come from.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._head = cache.head() if cache.manifest.settings.kind == "hidden" else None

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """None."""
        return []

    def place(self, accelerator: Accelerator, offload: bool = False) -> None:
        """Only the head of cached hidden states has a place."""
        if self._head is not None:
            self._head = self._head.to(accelerator.device)

    def predict(self, batch: Batch, student: nn.Module) -> TeacherOutputs:
        """See `LocalTeacher.predict`."""
        predictions = {name: batch.scored.select(values) for name, values in batch.teacher.items()}
        if self._head is not None:
            return HiddenOutputs(predictions["teacher_hidden"].to(self._head.weight_VD.dtype), self._head)
        entries = predictions["teacher_indices"], predictions["teacher_log_probs"]
        if self.cache.manifest.settings.kind == "sampled":
            return SampledOutputs(*entries, predictions["teacher_target"])
        return TopKOutputs(*entries, predictions["teacher_tail"], predictions["teacher_target"])
