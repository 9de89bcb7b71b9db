"""What a shape costs, in closed form: its parameters, or what a token is computed with. No weight is read here."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from cbd_trl.architectures import Architecture
from cbd_trl.architectures.axes import Axes, axis_length
from cbd_trl.surgery.weights import reader_keys


class Budget:
    """What layers and sizes that can be cut from an architecture cost: a sum over tensors, linear in the FFN width.

    Another budget is a subclass with a name, a unit, and `tensors`.

    Args:
        architecture: what layers are taken from, by their index.
    """

    # The argument that a size in this budget is given by, and what is counted.
    name: ClassVar[str]
    unit: ClassVar[str]
    # What each weight costs, and whether of experts only those count that a token is sent to.
    price: ClassVar[int] = 1
    routes: ClassVar[bool] = False

    def __init__(self, architecture: Architecture) -> None:
        experts = architecture.family.experts
        self._used = 0 if experts is None else int(getattr(architecture.config, experts.used))
        self._kinds = [architecture.kind(layer) for layer in range(architecture.depth)]
        first = {self._kinds.index(kind): kind for kind in set(self._kinds)}
        self._outer: list[tuple[Axes, bool]] = []
        self._layer: dict[str | None, list[tuple[Axes, bool]]] = {kind: [] for kind in first.values()}
        for key in self.tensors(architecture):
            layer, name = architecture.split_name(key)
            routed = self.routes and experts is not None and name.startswith(f"{experts.module}.")
            if layer is None:
                self._outer.append((architecture.tensors[key], routed))
            elif layer in first:
                self._layer[first[layer]].append((architecture.tensors[key], routed))

    def tensors(self, architecture: Architecture) -> Iterable[str]:
        """List the keys of the tensors that count."""
        raise NotImplementedError

    def outer(self, sizes: Mapping[str, int]) -> int:
        """Compute what is outside the layers."""
        return self._sum(self._outer, sizes)

    def stack(self, sizes: Mapping[str, int], layers: Iterable[int]) -> int:
        """Compute what these layers cost."""
        kinds = Counter(self._kinds[layer] for layer in layers)
        return sum(number * self._sum(self._layer[kind], sizes) for kind, number in kinds.items())

    def __call__(self, layers: Iterable[int], sizes: Mapping[str, int]) -> int:
        """Compute what a model of these layers costs."""
        return self.outer(sizes) + self.stack(sizes, layers)

    @classmethod
    def of(cls, architecture: Architecture) -> int:
        """Compute what an architecture as it is costs."""
        return cls(architecture)(range(architecture.depth), architecture.sizes)

    def _sum(self, tensors: Sequence[tuple[Axes, bool]], sizes: Mapping[str, int]) -> int:
        counts = ((math.prod(axis_length(axis, sizes) for axis in axes), routed) for axes, routed in tensors)
        return self.price * sum(n * self._used // sizes["expert"] if routed else n for n, routed in counts)


class ParameterCount(Budget):
    """`Architecture.num_parameters`: a tied table counts once."""

    name, unit = "num_parameters", "parameters"

    def tensors(self, architecture: Architecture) -> Iterable[str]:
        """List all tensors that are stored."""
        return architecture.stored


class FlopCount(Budget):
    """FLOPs of a forward pass for each token, attention to the context aside: two for every weight that a hidden state
    is multiplied with, a tied table's among them, of experts those that a token is sent to."""

    name, unit, price, routes = "flops", "FLOPs a token", 2, True

    def tensors(self, architecture: Architecture) -> Iterable[str]:
        """List the weights of all matrices that read a site."""
        readers = {reader for site in architecture.sites for reader in site.readers}
        return [reader_keys(reader, architecture.tensors, architecture)[0] for reader in sorted(readers)]
