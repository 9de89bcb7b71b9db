"""The residual stream of a model between its layers, as text passes: recorded, and sent through one layer alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What a layer is called with besides the stream: masks, positions.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def tensor_of(output: Any) -> torch.Tensor:
    """What a layer gives out, whether alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within it, what the module is called with and what it gives are collected, call by call."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


def layer_inputs(
    model: nn.Module, layers: nn.ModuleList, batch: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[Call]]:
    """The stream into each layer, (B, T, D), and everything else that it is called with."""
    found: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [args[0] for args, _ in found], [(args[1:], kwargs) for args, kwargs in found]


def block_ends(
    model: nn.Module, layers: nn.ModuleList, ends: Sequence[int], batch: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The stream after each of these layers, (B, T, D)."""
    found: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = tensor_of(output)

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in ends]
    try:
        model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in ends]
