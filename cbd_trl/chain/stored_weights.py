"""An anchor's tensors on disk, read when asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from cbd_trl.utils.tensor_file import TensorFile

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights in safetensors files, one or several shards; shapes and dtypes are known from the headers.

    A tensor is a view of the mapped file (see `TensorFile`): a slice of it reads that slice's pages only, and a model
    may hold it as it is, without a copy, as `from_pretrained` does.

    Args:
        files: the shards.
        shapes: {key: shape} of the tensors wanted; others in the files are left alone.
        names: {name in the files: key} where the two differ.

    Raises:
        ValueError: a file is no safetensors file, or a tensor is missing, there twice, or of another shape or dtype.
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
            raise ValueError(f"{places} lacks {missing[:5]}, which config.json says it has.")
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
