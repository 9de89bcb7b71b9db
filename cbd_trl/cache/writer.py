"""Adds rows to a teacher cache shard by shard; what was written stays when the process is killed."""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from cbd_trl.architectures.backbone import Head, check_head, open_forward, output_head
from cbd_trl.architectures.base import check_positions, learned_positions
from cbd_trl.cache.format import (
    HEAD_FILE,
    HIDDEN_DTYPES,
    MANIFEST,
    Manifest,
    Settings,
    check_kind,
    check_settings,
    read_manifest,
    write_manifest,
)
from cbd_trl.cache.shards import KEY_BYTES, CachedRow, check_shard, row_key, stored_bytes, write_shard
from cbd_trl.losses.divergences import tempered_log_probs
from cbd_trl.losses.teacher_outputs import draw, teacher_top_k
from cbd_trl.utils.datasets import cut_rows, prepared_rows, sft_dataset, without_limits
from cbd_trl.utils.files import TEMPORARY, write_bytes
from cbd_trl.utils.formatting import format_bytes, readable_name
from cbd_trl.utils.modeling import (
    check_checkpoint,
    check_writes,
    in_eval_mode,
    is_spread,
    load_causal_lm,
    portable_attention,
)
from cbd_trl.utils.progress import Progress, progress_shown
from cbd_trl.utils.teacher_rows import teacher_column, teacher_rows
from cbd_trl.utils.tensor_files import tensor_bytes
from cbd_trl.utils.tokenizers import find_tokenizer, teacher_fingerprint, text_tokenizer, tokenizer_hash

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
        self._expected_rows: int | None = None
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
            return Manifest(settings=self.settings)
        manifest = read_manifest(self.folder)
        if not manifest.shards:
            # A first try that failed before its first shard binds nobody to its settings.
            return Manifest(settings=self.settings)
        check_settings(self.folder, manifest.settings, self.settings)
        for shard in manifest.shards:
            check_shard(self.folder, shard, self.settings, verify=False)
        return manifest

    @property
    def manifest(self) -> Manifest:
        """What is written so far."""
        return self._manifest

    def has(self, token_ids: np.ndarray) -> bool:
        """Tell whether a row is there already, written or about to be.

        Args:
            token_ids: of the row, (n,).
        """
        return row_key(token_ids) in self._keys

    def begin(self, new_rows: int | None) -> None:
        """Set how many rows will be added. A new cache is marked as unfinished from here to `finish`.

        A complete one stays so until the first new shard is written: an addition that fails before leaves it usable.

        Args:
            new_rows: rows to add; None where a stream does not tell.
        """
        self._expected_rows = None if new_rows is None else self._manifest.rows + new_rows
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
            write_bytes(self.folder / HEAD_FILE, data)
        self._update(complete=False, expected_rows=self._expected_rows, head_sha256=digest)

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
        self._update(complete=True, expected_rows=self._manifest.rows)
        return self._manifest

    def _flush(self) -> None:
        if not self._tokens:
            return
        shards = self._manifest.shards
        shard, highest = write_shard(self.folder, len(shards), self.settings, self._tokens, self._predictions)
        self._tokens, self._predictions = [], []
        if self._manifest.complete:
            self._mark_unfinished()
        self._update(shards=[*shards, shard], highest_token_id=max(highest, self._manifest.highest_token_id))

    def _update(self, **changes: object) -> None:
        manifest = self._manifest.model_copy(update=changes)
        write_manifest(self.folder, manifest)
        self._manifest = manifest


def _keys(path: Path) -> list[bytes]:
    with safe_open(path, "np") as file:
        data = file.get_tensor("keys").tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def _is_ours(name: str) -> bool:
    """A file that a write killed before its first manifest may have left."""
    return (
        name.startswith(TEMPORARY) or name == HEAD_FILE or (name.startswith("rows-") and name.endswith(".safetensors"))
    )


# Logits held at a time: 64 MB in float32.
_LOGITS = 2**24


class Predictor:
    """A teacher, ready to predict.

    Args:
        teacher: a causal LM, or one with adapters. Its forward is opened (`cbd_trl.architectures.backbone`).

    Raises:
        ValueError: if its logits are not a plain head of its last hidden state.
    """

    def __init__(self, teacher: Any) -> None:
        self._model = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
        self._positions = learned_positions(self._model)
        open_forward(self._model)
        check_head(self._model)
        with output_head(self._model, keep=True) as head:
            self.head: Head = head

    @torch.no_grad()
    def predict(self, token_rows: Sequence[np.ndarray], settings: Settings) -> list[CachedRow]:
        """Predict a batch of rows.

        Args:
            token_rows: token ids of each row, (n,) with n >= 2.
            settings: of the cache.

        Returns:
            predictions of each row, on the CPU.

        Raises:
            ValueError: if a token has no row in the teacher, a row is longer than its positions, or a prediction is
                not a number.
        """
        self.check_length(max(map(len, token_rows)))
        for row in token_rows:
            if int(row.max()) >= settings.vocabulary_rows or int(row.min()) < 0:
                raise ValueError(
                    f"A row holds token {int(row.max())}, but the teacher has {settings.vocabulary_rows} vocabulary "
                    "rows: it was made with another tokenizer. Give the teacher's tokenizer as `processing_class`."
                )
        hidden = self._last_hidden(token_rows)
        device = self.head.weight_VD.device
        targets = [torch.from_numpy(row[1:].astype(np.int64)).to(device) for row in token_rows]
        if settings.kind == "sampled":
            # Row by row: the draws of a row must not depend on which rows come with it.
            predictions = [
                self._chunks(states, target, settings, _generator(settings, row, device))
                for states, target, row in zip(hidden, targets, token_rows, strict=True)
            ]
        else:
            joined = self._chunks(torch.cat(hidden), torch.cat(targets), settings, None)
            predictions = _split(joined, [len(states) for states in hidden])
        for row, prediction in zip(token_rows, predictions, strict=True):
            if prediction.target.isnan().any() or not _finite(prediction.hidden):
                raise ValueError(
                    f"The teacher's predictions are not finite for a row of {len(row)} tokens that begins with "
                    f"{row[:12].tolist()}. Load it, and store hidden states, in float32 or bfloat16."
                )
        return predictions

    def check_length(self, longest: int) -> None:
        """Check that the teacher has positions for a row.

        Args:
            longest: its tokens.

        Raises:
            ValueError: it is too long.
        """
        way_out = f"Set max_length={self._positions} or less in `args` (--max_length), or cut the rows."
        check_positions(longest, self._positions, "A row", f"the teacher ({type(self._model).__name__})", way_out)

    def _last_hidden(self, token_rows: Sequence[np.ndarray]) -> list[Tensor]:
        """The states at the positions that predict something, (P, D) for each row."""
        lengths = [len(row) for row in token_rows]
        ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(token_rows):
            ids_BT[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask_BT[i, : len(row)] = 1
        device = self._model.get_input_embeddings().weight.device
        hidden_BTD = self._model(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, inside=lambda h: h
        )
        return [hidden_BTD[i, : length - 1].to(self.head.weight_VD.device) for i, length in enumerate(lengths)]

    def _chunks(
        self, hidden_ND: Tensor, targets_N: Tensor, settings: Settings, generator: torch.Generator | None
    ) -> CachedRow:
        size = max(1, _LOGITS // self.head.rows)
        parts = [
            self._chunk(hidden, targets, settings, generator)
            for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
        ]
        return _join(parts)

    def _chunk(
        self, hidden_ND: Tensor, targets_N: Tensor, settings: Settings, generator: torch.Generator | None
    ) -> CachedRow:
        logits_NV = self.head.logits(hidden_ND)
        log_NV = tempered_log_probs(logits_NV, 1.0)
        target_N = log_NV.gather(1, targets_N[:, None])[:, 0].cpu()
        if settings.kind == "hidden":
            assert settings.hidden_dtype is not None
            return CachedRow(target_N, hidden=hidden_ND.to(getattr(torch, settings.hidden_dtype)).cpu())
        assert settings.k is not None and settings.temperature is not None
        if settings.temperature != 1.0:
            log_NV = tempered_log_probs(logits_NV, settings.temperature)
        if settings.kind == "sampled":
            indices_NK = draw(log_NV, settings.k, generator)
            return CachedRow(target_N, indices_NK.int().cpu(), log_NV.gather(1, indices_NK).cpu())
        indices_NK, log_NK, tail_N = teacher_top_k(log_NV, settings.k)
        return CachedRow(target_N, indices_NK.int().cpu(), log_NK.cpu(), tail_N.cpu())


def _generator(settings: Settings, token_ids: np.ndarray, device: torch.device) -> torch.Generator:
    assert settings.seed is not None
    seed = int.from_bytes(row_key([settings.seed & 0x7FFFFFFF, *token_ids.tolist()])[:7], "little")
    return torch.Generator(device=device).manual_seed(seed)


_FIELDS = ("target", "indices", "log_probs", "tail", "hidden")


def _finite(hidden: Tensor | None) -> bool:
    return hidden is None or bool(hidden.isfinite().all())


def _join(parts: Sequence[CachedRow]) -> CachedRow:
    given = {name: [getattr(part, name) for part in parts] for name in _FIELDS if getattr(parts[0], name) is not None}
    return CachedRow(**{name: torch.cat(tensors) for name, tensors in given.items()})


def _split(joined: CachedRow, lengths: list[int]) -> list[CachedRow]:
    given = {name: value.split(lengths) for name in _FIELDS if (value := getattr(joined, name)) is not None}
    return [CachedRow(**{name: parts[i] for name, parts in given.items()}) for i in range(len(lengths))]


def write_cache(
    teacher: PreTrainedModel | str,
    dataset: Any,
    output_dir: str | Path,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    kind: str = "top_k",
    k: int = 64,
    temperature: float = 1.0,
    value_bits: int = 16,
    seed: int = 0,
    batch_size: int = 8,
    hidden_dtype: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> Manifest:
    """Ask a teacher about every row of a data set once, and keep the answers for training without it.

    Killed and run again, it goes on where it was; run on another data set, it adds the rows that are not there.

    Args:
        teacher: a causal LM, or the path or Hub id of one.
        dataset: of any format `trl.SFTTrainer` takes, or already tokenized (`input_ids`); may be a stream. Of rows
            with a `teacher_prompt` or `teacher_messages` what the teacher reads, whole.
        output_dir: folder of the cache.
        processing_class: tokenizer of the training; None for the teacher's.
        args: of the training: they decide how rows are made and truncated, and the device. None for TRL's defaults.
        kind: `top_k`: the k most likely tokens and the mass of all others; `sampled`: k draws (Sparse Logit Sampling,
            arXiv 2503.16870), for an unbiased forward KL; `hidden`: the last hidden state, from which everything can
            be computed.
        k: tokens or draws of a position, at most all.
        temperature: the log-probabilities are taken at. Hidden states serve any.
        value_bits: 16 for log-probabilities that are off by at most lowest / 131,068 nats, 32 for exact ones.
        seed: of the draws.
        batch_size: rows in one forward pass.
        hidden_dtype: float32, bfloat16 or float16 for hidden states; None for the teacher's.
        model_init_kwargs: of `from_pretrained`, for a path or Hub id.

    Returns:
        the manifest of the finished cache.

    Raises:
        ValueError: for a value that has no meaning, a folder whose cache was made in another way, a disk that is too
            small, or rows the teacher cannot read.
    """
    _check_values(kind, k, temperature, value_bits, batch_size, hidden_dtype)
    args = _of_one_process(_default_args(output_dir) if args is None else args)
    name = teacher if isinstance(teacher, str) else getattr(teacher.config, "_name_or_path", None)
    revision = (model_init_kwargs or {}).get("revision")
    tokenizer = text_tokenizer(processing_class) or find_tokenizer(
        name, revision, local_only=not isinstance(teacher, str)
    )
    dataset = sft_dataset(dataset, "dataset", args)
    if isinstance(teacher, str):
        check_checkpoint(teacher, role="teacher", adapters=True, **(model_init_kwargs or {}))
    else:
        check_writes(teacher, "teacher")
    own_prompts = teacher_column(dataset) is not None
    rows = (teacher_rows if own_prompts else prepared_rows)(dataset, tokenizer, args)
    if own_prompts:
        # Only what the student reads is cut.
        args = without_limits(args)
    model = _load(teacher, model_init_kwargs, args)
    with in_eval_mode(model), portable_attention(model):
        predictor = Predictor(model)
        settings = Settings(
            **_chosen(kind, k, temperature, value_bits, seed, hidden_dtype, predictor.head),
            **_predictor_record(model, name, tokenizer),
        )
        writer = CacheWriter(output_dir, settings, predictor.head if kind == "hidden" else None)
        with progress_shown(not args.disable_tqdm):
            _predict_rows(writer, predictor, rows, args, batch_size)
    return writer.finish()


def _predict_rows(writer: CacheWriter, predictor: Predictor, rows: Any, args: SFTConfig, batch_size: int) -> None:
    counted = isinstance(rows, Dataset)
    new_rows, new_tokens = _count_new(writer, predictor, rows, args) if counted else (None, None)
    if new_rows is not None and new_tokens is not None:
        head = predictor.head if writer.settings.kind == "hidden" else None
        check_disk(writer.folder, writer.settings, new_rows, new_tokens, head)
    if new_rows == 0 and writer.manifest.complete:
        return
    writer.begin(new_rows)
    with Progress("Predicting with the teacher", total=new_tokens, unit="tokens", unit_scale=True) as bar:
        for batch in _batches(writer, _predicted_rows(rows, args), batch_size):
            writer.add(batch, predictor.predict(batch, writer.settings))
            bar.update(sum(map(len, batch)))


def _batches(writer: CacheWriter, rows: Iterator[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Rows that are not in the cache, in their order: a row that comes again is left out."""
    batch: dict[bytes, np.ndarray] = {}
    for row in rows:
        if not writer.has(row):
            batch[row_key(row)] = row
        if len(batch) == batch_size:
            yield list(batch.values())
            batch = {}
    if batch:
        yield list(batch.values())


def _predicted_rows(rows: Any, args: SFTConfig) -> Iterator[np.ndarray]:
    """Rows with something to predict. Those whose scored tokens are all cut off are kept, which TRL drops: packed ones
    are trained beside others."""
    return (row for row in cut_rows(rows, args) if len(row) > 1)


def _count_new(writer: CacheWriter, predictor: Predictor, rows: Any, args: SFTConfig) -> tuple[int, int]:
    new: set[bytes] = set()
    tokens = 0
    for row in Progress("Looking for new rows", _predicted_rows(rows, args), total=len(rows), unit="rows"):
        predictor.check_length(len(row))
        key = row_key(row)
        if key not in new and not writer.has(row):
            new.add(key)
            tokens += len(row)
    return len(new), tokens


def check_disk(folder: Path, settings: Settings, rows: int, tokens: int, head: Head | None = None) -> None:
    """Check that the disk can hold what is to be written.

    Args:
        folder: of the cache, which need not exist.
        settings: of the cache.
        rows: to be added.
        tokens: in them.
        head: to be stored beside hidden states.

    Raises:
        ValueError: with both sizes.
    """
    needed = stored_bytes(settings, rows, tokens)
    if head is not None:
        needed += head.weight_VD.numel() * head.weight_VD.element_size()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"The cache of {tokens:,} tokens needs {format_bytes(needed)} and the disk of {folder} has "
            f"{format_bytes(free)} free. Use a smaller k, fewer rows, or another disk; --value_bits 16 and a shorter "
            "--max_length help too."
        )


def _load(teacher: PreTrainedModel | str, init_kwargs: dict[str, Any] | None, args: SFTConfig) -> PreTrainedModel:
    if isinstance(teacher, str):
        options = {**(init_kwargs or {}), "trust_remote_code": False}
        model: Any = load_causal_lm(teacher, role="teacher", adapters=True, **options)
        return model if is_spread(model) else model.to(args.device)
    if init_kwargs:
        raise ValueError(
            "model_init_kwargs are for loading a teacher, but it is a model already: they would be ignored. Leave "
            "them out, or give the teacher's path or Hub id."
        )
    return teacher


def _default_args(output_dir: str | Path) -> SFTConfig:
    return SFTConfig(str(output_dir), use_cpu=not torch.accelerator.is_available(), bf16=False, report_to="none")


def _of_one_process(args: SFTConfig) -> SFTConfig:
    if args.world_size > 1:
        raise ValueError(
            f"A cache is written by one process, and {args.world_size} were started: they would write into each "
            "other's files. Start one, or give each a part of the rows and an --output_dir of its own."
        )
    return args


def _check_values(
    kind: str, k: int, temperature: float, value_bits: int, batch_size: int, hidden_dtype: str | None
) -> None:
    check_kind(kind)
    for name, value in (("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: it divides the logits, so it must be above 0 and finite.")
    if value_bits not in (16, 32):
        raise ValueError(
            f"value_bits={value_bits}: log-probabilities are stored in 16 bits (quantized) or 32 (exactly)."
        )
    if kind == "hidden" and temperature != 1.0:
        raise ValueError(
            f"temperature={temperature} with kind='hidden': hidden states serve every temperature, so it would be "
            "ignored. Leave it out, and set the temperature of the training."
        )
    if hidden_dtype is not None and (kind != "hidden" or hidden_dtype not in HIDDEN_DTYPES):
        raise ValueError(
            f"hidden_dtype={hidden_dtype!r} with kind={kind!r}: it is the dtype of hidden states, one of "
            f"{', '.join(HIDDEN_DTYPES)}. Leave it out for the other kinds."
        )


def _chosen(
    kind: str, k: int, temperature: float, value_bits: int, seed: int, dtype: str | None, head: Head
) -> dict[str, Any]:
    """The settings that a kind has, and the rows that all have."""
    common = {"kind": kind, "vocabulary_rows": head.rows}
    if kind == "hidden":
        shape = {
            "hidden_size": head.weight_VD.shape[1],
            "hidden_dtype": dtype or str(head.weight_VD.dtype).removeprefix("torch."),
        }
        return {**common, **shape, "scale": head.scale, "softcap": head.softcap}
    # Draws may be more than there are tokens, kept tokens may not.
    kept = min(k, head.rows) if kind == "top_k" else k
    values = {"k": kept, "temperature": float(temperature), "value_bits": value_bits}
    return {**common, **values, "seed": seed if kind == "sampled" else None}


def _predictor_record(
    model: PreTrainedModel, name: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The settings that tell which model predicted."""
    return {
        "teacher": readable_name(name),
        "teacher_fingerprint": teacher_fingerprint(model),
        "tokenizer_sha256": None if tokenizer is None else tokenizer_hash(tokenizer),
    }
