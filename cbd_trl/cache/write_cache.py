"""Writes what a teacher says about a data set to disk."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from cbd_trl.architectures.head import Head
from cbd_trl.cache.codec import row_key
from cbd_trl.cache.format import HIDDEN_DTYPES, Manifest, Settings, check_kind
from cbd_trl.cache.predict import Predictor
from cbd_trl.cache.shards import stored_bytes
from cbd_trl.cache.writer import CacheWriter
from cbd_trl.utils.datasets import cut_rows, prepared_rows, sft_dataset
from cbd_trl.utils.eval_mode import in_eval_mode
from cbd_trl.utils.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from cbd_trl.utils.formatting import readable_name
from cbd_trl.utils.modeling import check_checkpoint, check_writes, load_causal_lm
from cbd_trl.utils.progress import Progress, progress_shown
from cbd_trl.utils.tokenizers import find_tokenizer, text_tokenizer


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
        dataset: of any format `trl.SFTTrainer` takes, or already tokenised (`input_ids`); may be a stream.
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
    rows = prepared_rows(dataset, tokenizer, args)
    model = _load(teacher, model_init_kwargs, args)
    with in_eval_mode(model):
        predictor = Predictor(model)
        settings = Settings(
            **_chosen(kind, k, temperature, value_bits, seed, hidden_dtype, predictor.head),
            **_asked(model, name, tokenizer),
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
    with Progress("Asking the teacher", total=new_tokens, unit="tokens", unit_scale=True) as bar:
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
    """Refuse to start what the disk cannot hold.

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
            f"The cache of {tokens:,} tokens needs {needed / 1e9:.2f} GB and the disk of {folder} has "
            f"{free / 1e9:.2f} GB free. Use a smaller k, fewer rows, or another disk; --value_bits 16 and a shorter "
            "--max_length help too."
        )


def _load(teacher: PreTrainedModel | str, init_kwargs: dict[str, Any] | None, args: SFTConfig) -> PreTrainedModel:
    if isinstance(teacher, str):
        options = {**(init_kwargs or {}), "trust_remote_code": False}
        model: Any = load_causal_lm(teacher, role="teacher", adapters=True, **options)
        return model.to(args.device)
    if init_kwargs:
        raise ValueError(
            "model_init_kwargs say how to load a teacher, but it is a model already: they would be ignored. Leave "
            "them out, or give the teacher's path or Hub id."
        )
    return teacher


def _default_args(output_dir: str | Path) -> SFTConfig:
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return SFTConfig(str(output_dir), use_cpu=cpu, bf16=False, report_to="none")


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
            f"value_bits={value_bits}: log-probabilities are stored in 16 bits (quantised) or 32 (exactly)."
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
        shape = {"width": head.weight_VD.shape[1], "dtype": dtype or str(head.weight_VD.dtype).removeprefix("torch.")}
        return {**common, **shape, "scale": head.scale, "softcap": head.softcap}
    # Draws may be more than there are tokens, kept tokens may not.
    kept = min(k, head.rows) if kind == "top_k" else k
    values = {"k": kept, "temperature": float(temperature), "value_bits": value_bits}
    return {**common, **values, "seed": seed if kind == "sampled" else None}


def _asked(model: PreTrainedModel, name: str | None, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The settings that tell who was asked."""
    return {
        "teacher": readable_name(name),
        "teacher_fingerprint": teacher_fingerprint(model),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }
