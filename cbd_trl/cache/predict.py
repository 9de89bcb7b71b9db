"""A teacher's predictions for rows of tokens, in the form a cache keeps. No (B, T, V) tensor is made.

Shapes: B rows, T tokens of the longest, P positions of a row, D width, V vocabulary rows, K kept entries.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbd_trl.architectures.backbone import check_head, open_forward, output_head
from cbd_trl.architectures.head import Head
from cbd_trl.architectures.positions import check_positions, learned_positions
from cbd_trl.cache.codec import row_key
from cbd_trl.cache.format import Settings
from cbd_trl.cache.shards import CachedRow
from cbd_trl.losses.divergences import tempered_log_probs
from cbd_trl.losses.events import draw, teacher_top_k

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
        """Refuse a row that the teacher has no positions for.

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
            assert settings.dtype is not None
            return CachedRow(target_N, hidden=hidden_ND.to(getattr(torch, settings.dtype)).cpu())
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
