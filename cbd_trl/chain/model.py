"""From weights to a stock transformers model and back to disk."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from cbd_trl.architectures import Architecture
from cbd_trl.chain.manifest import DTYPES
from cbd_trl.surgery.weights import Weights, to_state
from cbd_trl.utils.files import write_text
from cbd_trl.utils.modeling import is_attention_kernel, quiet
from cbd_trl.utils.progress import Progress
from cbd_trl.utils.tensor_files import TensorFile, write_tensors


def build_model(
    architecture: Architecture, weights: Weights, dtype: torch.dtype, name_or_path: str = ""
) -> PreTrainedModel:
    """Build the stock causal LM class of the family with these weights, in eval mode.

    Args:
        architecture: what the weights mean; its config is copied.
        weights: `{key: tensor}` with the keys of `architecture.tensors`, read one after another. The model holds
            them as they are, without a copy, where that is how it stores them, they have its dtype and share their
            memory with nothing.
        dtype: of the returned parameters.
        name_or_path: recorded as `model.name_or_path`, where tokenizers and reference models are looked up.
    """
    return stock_model(architecture.config, to_state(weights, architecture), dtype, name_or_path)


def stock_model(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype, name_or_path: str = ""
) -> PreTrainedModel:
    """Build the same from a config, which is copied, and tensors as the class stores them.

    It attends as the class does by default, where the model that the config is of had a kernel for it: the model that
    is made is measured on any device.
    """
    config = copy.deepcopy(config)
    if is_attention_kernel(config._attn_implementation):
        config._attn_implementation = None
    config.dtype = dtype
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [cls.__name__]
    with quiet():
        # The concrete class: AutoModel refuses to build from a state dict alone.
        model = cls.from_pretrained(None, config=config, state_dict=_parameters(state, dtype), dtype=dtype)
    model.config._name_or_path = model.name_or_path = name_or_path
    return model.eval()


def save_stock_model(
    folder: Path,
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    generation_config: GenerationConfig,
    max_shard_size: str = "50GB",
) -> None:
    """Write what `stock_model(architecture.config, state, dtype).save_pretrained(folder)` writes, one tensor after
    another: the model is never in memory as a whole. Of several files each has tensors of its own choice.

    Args:
        folder: new or empty.
        architecture: of the model; its config is copied.
        state: tensors as the class stores them, on any device, each read once.
        dtype: of what is written.
        generation_config: of the model.
        max_shard_size: of a file.
    """
    config = copy.deepcopy(architecture.config)
    config.dtype = dtype
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in architecture.state_shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = ((name, state[name].detach().to(dtype)) for name in Progress("Writing the weights", names))
        write_tensors(folder / file, {name: (dtype, empty[name].shape) for name in names}, tensors, {"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": architecture.num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        write_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


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


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights in safetensors files, one or several shards; shapes and dtypes are known from the headers.

    A tensor is a view of the mapped file (see `TensorFile`): a slice of it reads that slice's pages only, and a model
    may hold it as it is, without a copy, as `from_pretrained` does.

    Args:
        files: the shards.
        shapes: {key: shape} of the tensors wanted; others in the files are left alone.
        names: {name in the files: key} where the two differ.

    Raises:
        ValueError: a file is not a safetensors file, or a tensor is missing, there twice, or of another shape or
            dtype.
    """

    def __init__(
        self, files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str] | None = None
    ) -> None:
        found: dict[str, tuple[TensorFile, str]] = {}
        for shard in map(TensorFile, files):
            for name in shard:
                key = (names or {}).get(name, name)
                if key not in shapes:
                    continue
                if key in found:
                    raise ValueError(f"{key} is in {found[key][0].path} and again in {shard.path}.")
                _check(shard, name, shapes[key])
                found[key] = (shard, name)
        missing = sorted(shapes.keys() - found.keys())
        if missing:
            places = ", ".join(str(file) for file in files)
            raise ValueError(f"{places} lacks {missing[:5]}, which config.json implies.")
        # In the order of the model, whatever that of the files is.
        self._places = {key: found[key] for key in shapes}

    def __getitem__(self, key: str) -> torch.Tensor:
        shard, name = self._places[key]
        return shard[name]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _check(shard: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    if shard.shape(name) != shape:
        raise ValueError(f"{shard.path} holds {name} of shape {shard.shape(name)}, but config.json says {shape}.")
    if shard.dtype(name) not in DTYPES:
        raise ValueError(
            f"{shard.path} holds {name} as {shard.dtype(name)}. Chains store {', '.join(DTYPES.values())}: convert "
            "the model first."
        )
