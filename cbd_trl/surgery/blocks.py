"""Choose layers evenly and the block that each stands for, and put layers of two models into one stack."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from cbd_trl.architectures import Architecture
from cbd_trl.surgery.weights import LazyWeights, Weights


@dataclass(frozen=True)
class Block:
    """What one layer of a lower model stands for.

    Args:
        layers: consecutive layers of the upper model.
        kept: the one of them that the lower layer is cut from.
        cost: what letting it stand for the block costs before any training, in nats per token, all other layers being
            the upper model's; None where it was not measured.
    """

    layers: tuple[int, ...]
    kept: int
    cost: float | None = None


def block_costs(blocks: Sequence[Block]) -> list[float] | None:
    """List the cost of each block; None where not all were measured."""
    costs = [block.cost for block in blocks if block.cost is not None]
    return costs if len(costs) == len(blocks) else None


# (layer of the upper model, position in a shallower one) -> whether it may stand there; see `Architecture.fits`.
Fits = Callable[[int, int], bool]


def anywhere(layer: int, position: int) -> bool:
    """Let every layer stand at every position."""
    return True


def spaced_layers(total: int, kept: int, fits: Fits = anywhere) -> list[int]:
    """Choose `kept` of `total` layers, evenly spaced; the first one and the last two stay.

    Of two kept, these are the first and the last; of one, it is the last. Layers that may not stand where the even
    spacing has them give way to the nearest choice of layers that all may (`fitting_layers`), if there is one.

    Raises:
        ValueError: `kept` is not between 1 and `total`.
    """
    if not 1 <= kept <= total:
        raise ValueError(f"Cannot keep {kept} of {total} layers. Give 1 to {total}.")
    # The last layers of a decoder do not stand in for each other, so the even spacing ends one layer early.
    even = [round(i * (total - 2) / max(kept - 2, 1)) for i in range(kept - 1)] + [total - 1]
    if all(fits(layer, position) for position, layer in enumerate(even)):
        return even
    return fitting_layers(even, total, fits) or even


def fitting_layers(wanted: Sequence[int], total: int, fits: Fits) -> list[int] | None:
    """Find the layers nearest to those wanted, by squared distance, that may all stand where they come to stand.

    Args:
        wanted: layers in ascending order; the last one stays the last.
        total: number of layers to choose from.
        fits: which layer may stand at which position.

    Returns:
        as many, ascending, ending with the last layer; None where there are none.
    """
    best = _cheapest_layers(lambda position, layer: (layer - wanted[position]) ** 2, len(wanted), total, fits)
    return best[total - 1][1] if total - 1 in best else None


def _cheapest_layers(
    cost: Callable[[int, int], float], count: int, total: int, fits: Fits
) -> dict[int, tuple[float, list[int]]]:
    """Find the cheapest choices of ascending layers.

    Args:
        cost: (position, layer) -> what it costs to put the layer there.
        count: number of layers to choose.
        total: number of layers to choose from.
        fits: which layer may stand at which position.

    Returns:
        {last layer: (least sum, choice)}; empty where no choice fits.
    """
    best: dict[int, tuple[float, list[int]]] = {-1: (0, [])}
    for position in range(count):
        found: dict[int, tuple[float, list[int]]] = {}
        for layer in range(position, total):
            before = [option for end, option in best.items() if end < layer]
            if before and fits(layer, position):
                least, chosen = min(before)
                found[layer] = (least + cost(position, layer), [*chosen, layer])
        best = found
    return best


def blocks_of(kept_layers: Sequence[int]) -> list[list[int]]:
    """Split the layers into blocks: each has those after the previous kept layer, up to and including its kept one."""
    starts = [0, *[layer + 1 for layer in kept_layers[:-1]]]
    return [list(range(start, layer + 1)) for start, layer in zip(starts, kept_layers, strict=True)]


def spaced_blocks(total: int, kept: int, fits: Fits = anywhere) -> list[Block]:
    """Make the blocks of `spaced_layers`, each keeping its last layer, nothing measured."""
    return [Block(tuple(block), block[-1]) for block in blocks_of(spaced_layers(total, kept, fits))]


def similar_blocks(written: torch.Tensor, streams: torch.Tensor, fits: Fits = anywhere) -> list[Block] | None:
    """Choose the block that each layer of another model stands for: it keeps the layer that writes what is most
    similar (the largest sum), and ends where the two streams are most similar.

    Measured on a scrambled model that had been cut from the upper one and trained: by what they write, 14 of its 16
    layers were found among 30; by the streams, 6.

    Args:
        written: (l, L), similarity of what each lower and each upper layer adds to the stream (see
            `layer_similarity`).
        streams: (l, L), of the streams behind them.
        fits: which upper layer may be kept at which lower position.

    Returns:
        l blocks; None where no choice fits.
    """
    below, total = written.shape
    gains = written.tolist()
    best = _cheapest_layers(lambda position, layer: -gains[position][layer], below, total, fits)
    if not best:
        return None
    kept = min(best.values())[1]
    ends = [
        first + int(row[first:following].argmax())
        for row, (first, following) in zip(streams, pairwise(kept), strict=False)
    ]
    layers = blocks_of([*ends, total - 1])
    return [Block(tuple(block), layer) for block, layer in zip(layers, kept, strict=True)]


def check_blocks(blocks: Sequence[Sequence[int]], lower_depth: int, upper_depth: int) -> None:
    """Check that every upper layer is in exactly one block, in order, with one block a lower layer.

    Raises:
        ValueError: otherwise.
    """
    if len(blocks) != lower_depth or [layer for block in blocks for layer in block] != list(range(upper_depth)):
        raise ValueError(
            f"The block map must split the upper model's {upper_depth} layers, in order, into {lower_depth} blocks of "
            f"consecutive layers, got {[list(block) for block in blocks]}."
        )
    if not all(blocks):
        raise ValueError("The block map has an empty block: every lower layer stands for at least one upper layer.")


def select_layers(weights: Weights, architecture: Architecture, layers: Sequence[int]) -> tuple[Weights, Architecture]:
    """Make a model of these layers (repetition allowed), in this order, with everything outside them as it is."""
    selected = architecture.with_layers(layers)

    def tensor(key: str) -> torch.Tensor:
        layer, name = architecture.split_name(key)
        return weights[key if layer is None else architecture.layer_name(layers[layer], name)]

    return LazyWeights(selected.tensors, tensor), selected


def swap_blocks(
    lower: Weights,
    lower_architecture: Architecture,
    upper: Weights,
    upper_architecture: Architecture,
    blocks: Sequence[Sequence[int]],
    swapped: Collection[int],
    kept: Sequence[int] | None = None,
) -> tuple[Weights, Architecture]:
    """Replace the blocks in `swapped` of the lower model by their layers of the upper model.

    Boomerang distillation, arXiv 2510.05064.

    Args:
        lower, upper: weights of equal widths.
        blocks: for each lower layer the upper layers it stands for.
        swapped: indices of lower layers to replace.
        kept: the upper layer that each lower one was cut from; None = the last of its block.

    Returns:
        Weights and architecture; embedding, final norm and head are the lower model's.
    """
    check_blocks(blocks, lower_architecture.depth, upper_architecture.depth)
    sources: list[tuple[Weights, int]] = []
    positions: list[int] = []
    for i, block in enumerate(blocks):
        sources += [(upper, layer) for layer in block] if i in swapped else [(lower, i)]
        # Per-layer config entries: an unswapped layer has those of the upper layer it was cut from.
        positions += block if i in swapped else [block[-1] if kept is None else kept[i]]
    mixed = upper_architecture.with_layers(positions)

    def tensor(key: str) -> torch.Tensor:
        layer, name = mixed.split_name(key)
        if layer is None:
            return lower[key]
        source, place = sources[layer]
        return source[mixed.layer_name(place, name)]

    return LazyWeights(mixed.tensors, tensor), mixed
