"""From weights to a stock transformers model and back to disk."""

import copy
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from cbd_trl.architectures import Architecture, describe
from cbd_trl.architectures.base import Place
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
    if describe(config).family.experts is not None:
        # transformers would save the experts as it got them: in one piece, and not as files have them.
        del model._weight_conversions
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
    places = {part: (key, place) for key, parts in architecture.files.items() for part, place in parts.items()}
    whole = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in architecture.state_shapes.items()}
    empty = {name: whole[key][place] if place else whole[key] for name, (key, place) in places.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)

    def tensors(names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        # Those that are parts of one follow each other, so that it is made once.
        ordered = Progress("Writing the weights", [name for name in places if name in names])
        for key, parts in itertools.groupby(ordered, lambda name: places[name][0]):
            tensor = state[key].detach().to(dtype)
            yield from ((name, tensor[place] if (place := places[name][1]) else tensor) for name in parts)

    for file, names in split.filename_to_tensors.items():
        entries = {name: (dtype, tuple(empty[name].shape)) for name in names}
        write_tensors(folder / file, entries, tensors(set(names)), {"format": "pt"})
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
        parts: {key: {name in the files: place}} of what the files may hold in parts (see `Architecture.files`).

    Raises:
        ValueError: a file is not a safetensors file, or a tensor is missing, there twice, or of another shape or
            dtype.
    """

    def __init__(
        self,
        files: Sequence[Path],
        shapes: Mapping[str, tuple[int, ...]],
        names: Mapping[str, str] | None = None,
        parts: Mapping[str, Mapping[str, Place]] | None = None,
    ) -> None:
        places: dict[str, tuple[str, Place]] = {key: (key, ()) for key in shapes}
        places |= {name: (key, ()) for name, key in (names or {}).items() if key in shapes}
        places |= {name: (key, place) for key in shapes for name, place in (parts or {}).get(key, {}).items()}
        found: dict[str, dict[str, tuple[TensorFile, Place]]] = {key: {} for key in shapes}
        for shard in map(TensorFile, files):
            for name in shard:
                if name not in places:
                    continue
                key, place = places[name]
                before = [one for had, (one, part) in found[key].items() if had == name or not part or not place]
                if before:
                    raise ValueError(f"{key} is in {before[0].path} and again in {shard.path}.")
                _check(shard, name, _part_shape(shapes[key], place))
                found[key][name] = (shard, place)
        missing = sorted(
            key
            for key, had in found.items()
            if all(place for _, place in had.values()) and had.keys() != (parts or {}).get(key, {key: ()}).keys()
        )
        if missing:
            listed = ", ".join(str(file) for file in files)
            raise ValueError(f"{listed} lacks {missing[:5]}, which config.json implies.")
        # In the order of the model, whatever that of the files is.
        self._places, self._shapes = found, shapes

    def __getitem__(self, key: str) -> torch.Tensor:
        tensors = [(shard[name], place) for name, (shard, place) in self._places[key].items()]
        first, place = tensors[0]
        if not place:
            return first
        whole = first.new_empty(self._shapes[key])
        for tensor, place in tensors:
            whole[place] = tensor
        return whole

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _part_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Shape of the part of a tensor at a place."""
    return tuple(torch.empty(shape, device="meta")[place].shape) if place else shape


def _check(shard: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    if shard.shape(name) != shape:
        raise ValueError(f"{shard.path} holds {name} of shape {shard.shape(name)}, but config.json says {shape}.")
    if shard.dtype(name) not in DTYPES:
        raise ValueError(
            f"{shard.path} holds {name} as {shard.dtype(name)}. Chains store {', '.join(DTYPES.values())}: convert "
            "the model first."
        )
