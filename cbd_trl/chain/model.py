"""From weights to a stock transformers model and back to disk."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.weights import Weights


def build_model(
    architecture: Architecture, weights: Weights, dtype: torch.dtype, name_or_path: str = ""
) -> PreTrainedModel:
    """The stock causal LM class of the family, holding these weights, in eval mode.

    Args:
        architecture: what the weights mean; its config is copied.
        weights: `{state dict key: tensor}` without a tied head, asked for one after another. The model holds them as
            they are, without a copy, where they have its dtype and share their memory with nothing.
        dtype: of the returned parameters.
        name_or_path: recorded as `model.name_or_path`, where tokenizers and reference models are looked up.
    """
    config = copy.deepcopy(architecture.config)
    config.dtype = dtype
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [cls.__name__]
    state: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for key, tensor in weights.items():
        tensor = tensor.detach().to(dtype)
        memory = tensor.untyped_storage()
        # Two layers made from one tensor are two parameters, and a parameter holds no more than itself.
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in used:
            tensor = tensor.clone()
        used.add(tensor.untyped_storage().data_ptr())
        state[key] = tensor
    with _quiet():
        # The concrete class: AutoModel refuses to build from a state dict alone.
        model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.config._name_or_path = model.name_or_path = name_or_path
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for tensors that are in memory already."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
