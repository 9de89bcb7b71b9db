"""An anchor's tensors on disk, read when asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# A file is mapped anew after this many bytes, so that pages read once do not stay in the process.
_WINDOW = 2**26


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights in safetensors files, one or several shards; shapes and dtypes are known from the headers.

    A tensor is a view of the mapped file: a slice of it reads that slice's pages only, and a model may hold it as it
    is, as `from_pretrained` does (the mapping is private, so the file never changes).

    Args:
        files: the shards.
        shapes: {key: shape} of the tensors wanted; others in the files are left alone.

    Raises:
        ValueError: a file is no safetensors file, or a tensor is missing, there twice, or of another shape or dtype.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._places: dict[str, Path] = {}
        self._shards: dict[Path, Any] = {}
        self._handed = 0
        for file in files:
            shard = self._shard(file)
            for key in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in shapes:
                    self._check(file, key, shard.get_slice(key), shapes[key])
                    self._places[key] = file
        missing = [key for key in shapes if key not in self._places]
        if missing:
            names = ", ".join(str(file) for file in files)
            raise ValueError(f"{names} lacks {sorted(missing)[:5]}, which config.json says it has.")
        # In the order of the model, whatever that of the files is.
        self._places = {key: self._places[key] for key in shapes}

    def _shard(self, file: Path) -> Any:
        if file not in self._shards:
            try:
                self._shards[file] = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as a safetensors file ({error}).") from error
        return self._shards[file]

    def _check(self, file: Path, key: str, header: Any, shape: tuple[int, ...]) -> None:
        if key in self._places:
            raise ValueError(f"{key} is in {self._places[key]} and again in {file}.")
        if tuple(header.get_shape()) != shape:
            raise ValueError(f"{file} holds {key} of shape {tuple(header.get_shape())}, but config.json says {shape}.")
        if header.get_dtype() not in DTYPES:
            raise ValueError(
                f"{file} holds {key} as {header.get_dtype()}. Chains store {', '.join(DTYPES.values())}: convert the "
                "model first."
            )

    def __getitem__(self, key: str) -> torch.Tensor:
        file = self._places[key]
        tensor: torch.Tensor = self._shard(file).get_tensor(key)
        self._handed += tensor.nbytes
        if self._handed > _WINDOW:
            self._shards.clear()
            self._handed = 0
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
