"""From weights to a stock transformers model and back to disk."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.weights import Weights, to_state
from cbd_trl.utils.modeling import quiet
from cbd_trl.utils.progress import Progress


def build_model(
    architecture: Architecture, weights: Weights, dtype: torch.dtype, name_or_path: str = ""
) -> PreTrainedModel:
    """The stock causal LM class of the family, holding these weights, in eval mode.

    Args:
        architecture: what the weights mean; its config is copied.
        weights: `{key: tensor}` with the keys of `architecture.tensors`, asked for one after another. The model holds
            them as they are, without a copy, where that is how it stores them, they have its dtype and share their
            memory with nothing.
        dtype: of the returned parameters.
        name_or_path: recorded as `model.name_or_path`, where tokenizers and reference models are looked up.
    """
    return stock_model(architecture.config, to_state(weights, architecture), dtype, name_or_path)


def stock_model(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype, name_or_path: str = ""
) -> PreTrainedModel:
    """The same from a config, which is copied, and tensors as the class stores them."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [cls.__name__]
    with quiet():
        # The concrete class: AutoModel refuses to build from a state dict alone.
        model = cls.from_pretrained(None, config=config, state_dict=_parameters(state, dtype), dtype=dtype)
    model.config._name_or_path = model.name_or_path = name_or_path
    return model.eval()


def _parameters(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in this dtype, copied only where they share their memory."""
    parameters: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for key in Progress("Computing the weights", state):
        tensor = state[key].detach().to(dtype)
        memory = tensor.untyped_storage()
        # Two layers made from one tensor are two parameters, and a parameter holds no more than itself.
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in used:
            tensor = tensor.clone()
        used.add(tensor.untyped_storage().data_ptr())
        parameters[key] = tensor
    return parameters
