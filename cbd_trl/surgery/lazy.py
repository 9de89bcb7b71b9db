"""Weights worked out tensor by tensor, when asked for: what nobody asks for is neither read nor computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch


class LazyWeights(Mapping[str, torch.Tensor]):
    """A mapping of weights whose tensors are made on each access and kept by nobody.

    Operators are compositions of these, so that the tensors of a target come into being one after another, each from
    the few tensors of the two anchors that it needs.

    Args:
        keys: the keys, in the order in which tensors that share work follow one another.
        tensor: makes the tensor of a key.
    """

    def __init__(self, keys: Iterable[str], tensor: Callable[[str], torch.Tensor]) -> None:
        self._keys = dict.fromkeys(keys)
        self._tensor = tensor

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
