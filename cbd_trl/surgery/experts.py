"""What the experts of a mixture compute, for the tokens that their router sends them.

Shapes: N tokens, D width, E experts, K experts of a token, F neurons of an expert, n tokens of one expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cbd_trl.architectures import Architecture

# What the module of all experts is called with: the stream (N, D), the experts of each token (N, K), their weights.
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@contextmanager
def routing(model: nn.Module, architecture: Architecture, visit: Callable[[str, Any, Routed], None]) -> Iterator[None]:
    """Call `visit(name, module, inputs)` in every forward pass for the experts of each layer; nothing without any."""

    def hook_for(name: str) -> Any:
        return lambda module, inputs: visit(name, module, inputs)

    sites = [site for site in architecture.sites if site.routed]
    handles = [model.get_submodule(site.name).register_forward_pre_hook(hook_for(site.name)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def routed_rows(module: Any, inputs: Routed) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Compute the neurons of each expert that has tokens.

    Args:
        module: of all experts, as transformers makes it.
        inputs: that it is called with.

    Yields:
        the expert, its tokens, (n,) int64, and its neurons times the weight that the router gives it, (n, F): what the
        output projection multiplies, so that the mixture adds the sum over its experts to the stream.
    """
    stream, chosen, shares = inputs
    for expert in range(module.num_experts):
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        if len(tokens):
            yield expert, tokens, neurons(module, stream[tokens], expert) * shares[tokens, place, None]


def neurons(module: Any, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """Compute the activations of one expert, (n, F).

    Args:
        module: of all experts.
        rows: of the stream, (n, D).
        expert: which.
    """
    weight = module.gate_up_proj[expert]
    inner = rows @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        inner = inner + module.gate_up_proj_bias[expert]
    activations: torch.Tensor = module._apply_gate(inner)
    return activations
