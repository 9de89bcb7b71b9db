"""Full and sliding attention in one hybrid: what a layer of either sort is called with.

A model makes one mask (Gemma 3: and one rotary embedding) for each sort of its layers and hands each layer its own. A
block of the teacher may hold layers of another sort than the student layer in whose place it runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

_KNOWN = {"full_attention", "sliding_attention"}


def sorts_of(model: Any) -> list[str]:
    """How each layer attends, such as "full_attention"."""
    return _sorts(model.config.get_text_config())


def _sorts(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def check_sorts(student_config: Any, teacher_config: Any, block_map: Sequence[Sequence[int]]) -> None:
    """Refuse blocks whose layers cannot be called in the student.

    Args:
        student_config: text config of the student.
        teacher_config: text config of the teacher.
        block_map: for each student layer the consecutive teacher layers it stands for.

    Raises:
        ValueError: naming a block with layers of other sorts than its student layer, where these are not just full
            and sliding attention.
    """
    ours, theirs = _sorts(student_config), _sorts(teacher_config)
    for i, block in enumerate(block_map):
        sorts = {theirs[j] for j in block}
        if sorts != {ours[i]} and not sorts | {ours[i]} <= _KNOWN:
            raise ValueError(
                f"swap_probability: student layer {i} uses {ours[i]}, the teacher's layers {list(block)} that it "
                f"stands for use {sorted(sorts)}, and only full and sliding attention go together in one block. Set "
                "swap_probability=0, or choose blocks of one layer type."
            )


class LayerSorts:
    """The inputs of layers of every sort of a teacher, while the student runs.

    Args:
        student: the model being trained, not wrapped.
        teacher: the frozen teacher, not wrapped.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self._student, self._teacher = student, teacher
        self._masks: dict[str, Any] = {}

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within it the student makes the masks of the teacher's sorts as well as its own."""
        handle = self._student.base_model.register_forward_pre_hook(self._prepare, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._masks = {}

    def _prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(inputs, Tensor)
        # Only shape, dtype and device of the embeddings are looked at.
        like = torch.empty((*inputs.shape[:2], 0), dtype=self._student.dtype, device=inputs.device)
        given, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        models = (self._teacher, self._student)
        found = [create_masks_for_generate(model.config, like, given, None, positions) for model in models]
        self._masks = {**found[0], **found[1]}
        return args, {**kwargs, "attention_mask": self._masks}

    def kwargs(self, sort: str, hidden_BTD: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What a layer of this sort is called with.

        Args:
            sort: how it attends.
            hidden_BTD: the stream in front of it.
            given: what the student calls its own layer with.
        """
        own = {**given, "attention_mask": self._masks[sort]}
        config = self._teacher.config.get_text_config()
        if sort in (config.rope_parameters or {}):
            own["position_embeddings"] = self._teacher.base_model.rotary_emb(hidden_BTD, given["position_ids"], sort)
        return own
