"""A teacher cache from a file of log-probabilities, as vLLM and other servers give them."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cbd_trl.cache.format import Manifest, Settings
from cbd_trl.cache.shards import CachedRow
from cbd_trl.cache.writer import CacheWriter
from cbd_trl.utils.tokenizers import tokenizer_hash

# Servers round: what is off by less is accepted.
_TOLERANCE = 1e-3
# 1 - sum is noise below the resolution of the float32 numbers it is made of.
_LEAST_TAIL = math.log(1e-7)


def import_logprobs(
    file: str | Path,
    output_dir: str | Path,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    vocabulary_rows: int | None = None,
    teacher: str | None = None,
    k: int = 64,
    value_bits: int = 16,
) -> Manifest:
    """Write a cache of kind `top_k` at temperature 1 from a JSON-lines file, one row of the data set a line.

    A line has `prompt_token_ids` and `prompt_logprobs` as vLLM's `RequestOutput` (with `prompt_logprobs=k`): for each
    token null (the first) or {"token id": log-probability, or an object with "logprob"}, which predicts that very
    token and lists it. A completion may follow, as `outputs[0].token_ids` and `.logprobs` or as `token_ids` and
    `logprobs`: it is appended. The k most likely are kept; the tail is 1 minus their sum.

    Args:
        file: JSON lines.
        output_dir: folder of the cache; run again, it adds the rows that are not there.
        processing_class: tokenizer of the teacher; None to have training check the tokens of each row alone.
        vocabulary_rows: V of the teacher; None for the tokenizer's highest id plus one.
        teacher: Hub id of the teacher; rows of another are refused.
        k: tokens to keep of a position.
        value_bits: 16 or 32, as in `write_cache`.

    Returns:
        the manifest of the finished cache.

    Raises:
        ValueError: for a line that is not of this form, with its number.
    """
    if k < 1 or value_bits not in (16, 32):
        raise ValueError(f"k={k}, value_bits={value_bits}: k must be at least 1 and value_bits 16 or 32.")
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}. Give the JSON-lines file of log-probabilities.")
    if vocabulary_rows is None:
        if processing_class is None:
            raise ValueError(
                "vocabulary_rows is missing: token ids are checked against it and stored in as few bits as it needs. "
                "Pass it, or the teacher's tokenizer as `processing_class`."
            )
        vocabulary_rows = max(processing_class.get_vocab().values()) + 1
    settings = Settings(
        kind="top_k",
        vocabulary_rows=vocabulary_rows,
        teacher=teacher,
        # Its weights are not at hand: its name is all that tells it from another.
        teacher_fingerprint=f"imported:{teacher}",
        tokenizer_sha256=None if processing_class is None else tokenizer_hash(processing_class),
        k=min(k, vocabulary_rows),
        temperature=1.0,
        value_bits=32 if value_bits == 32 else 16,
    )
    writer = CacheWriter(output_dir, settings)
    writer.begin(None)
    for token_ids, prediction in _read_rows(Path(file), settings):
        if not writer.has(token_ids):
            writer.add([token_ids], [prediction])
    return writer.finish()


def _read_rows(file: Path, settings: Settings) -> Iterator[tuple[np.ndarray, CachedRow]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                token_ids, entries = _parse(json.loads(line))
                if len(token_ids) > 1:
                    yield _predictions(token_ids, entries, settings)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number}: {error} Each line is a row: token ids, and for each but the first the "
                    "log-probabilities of the most likely tokens (vLLM: SamplingParams(prompt_logprobs=k))."
                ) from error


def _parse(line: Any) -> tuple[list[int], list[Any]]:
    """Tokens of a row, and for each what it was predicted with."""
    if not isinstance(line, Mapping):
        raise ValueError(f"It holds a {type(line).__name__} instead of an object.")
    if line.get("prompt_token_ids") is None and line.get("token_ids") is None:
        raise ValueError(f"It has the keys {sorted(line)}, and no 'prompt_token_ids' or 'token_ids'.")
    completion = (line.get("outputs") or [line])[0]
    token_ids: list[int] = []
    entries: list[Any] = []
    for part, ids_key, entries_key in (
        (line, "prompt_token_ids", "prompt_logprobs"),
        (completion, "token_ids", "logprobs"),
    ):
        ids = list(part.get(ids_key) or [])
        given = part.get(entries_key)
        given = [None] * len(ids) if given is None else list(given)
        if len(given) != len(ids):
            raise ValueError(f"It has {len(ids)} {ids_key} and {len(given)} {entries_key}: one is wanted for each.")
        token_ids += ids
        entries += given
    return token_ids, entries


def _predictions(token_ids: list[int], entries: list[Any], settings: Settings) -> tuple[np.ndarray, CachedRow]:
    assert settings.k is not None
    outside = [token for token in token_ids if not 0 <= token < settings.vocabulary_rows]
    if outside:
        raise ValueError(f"Token {outside[0]} is not below the vocabulary's {settings.vocabulary_rows} rows.")
    indices, values, tails, targets = [], [], [], []
    for t in range(1, len(token_ids)):
        ids_K, log_K, tail, target = _position(entries[t], token_ids[t], t, settings.k, settings.vocabulary_rows)
        indices.append(ids_K)
        values.append(log_K)
        tails.append(tail)
        targets.append(target)
    row = CachedRow(
        target=torch.tensor(targets, dtype=torch.float32),
        indices=torch.tensor(indices, dtype=torch.int32),
        log_probs=torch.tensor(values, dtype=torch.float32),
        tail=torch.tensor(tails, dtype=torch.float32),
    )
    return np.asarray(token_ids, np.int32), row


def _position(
    entry: Any, token: int, t: int, k: int, vocabulary_rows: int
) -> tuple[list[int], list[float], float, float]:
    """The k most likely tokens before token t, their log-probabilities, the tail's and that of token t."""
    if entry is None:
        raise ValueError(f"Token {t} has no log-probabilities (null): only the first may lack them.")
    found = {int(key): float(v["logprob"] if isinstance(v, Mapping) else v) for key, v in entry.items()}
    outside = [index for index in found if not 0 <= index < vocabulary_rows]
    if outside:
        raise ValueError(f"Token {t}: id {outside[0]} is not below the vocabulary's {vocabulary_rows} rows.")
    wrong = [value for value in found.values() if not value <= _TOLERANCE]
    if wrong:
        raise ValueError(f"Token {t}: {wrong[0]} must be a log-probability, at most 0.")
    if len(found) < k:
        raise ValueError(f"Token {t} has {len(found)} log-probabilities, fewer than k={k}: use a smaller k.")
    if token not in found:
        raise ValueError(f"Token {t} is {token}, which its log-probabilities do not list: they are of another row.")
    best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
    mass = math.fsum(math.exp(value) for _, value in best)
    if mass > 1 + _TOLERANCE:
        raise ValueError(
            f"Token {t}: the probabilities sum to {mass:.4f}, above 1. Were they taken before the softmax?"
        )
    tail = -math.inf if k == vocabulary_rows else max(math.log(max(1 - mass, 0.0) or 1e-300), _LEAST_TAIL)
    if token not in dict(best):
        # The tail holds at least the token that follows.
        tail = max(tail, found[token])
    return [index for index, _ in best], [min(value, 0.0) for _, value in best], tail, min(found[token], 0.0)
