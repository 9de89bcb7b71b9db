"""Where a causal LM keeps its decoder layers."""

from typing import Any

from torch import nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers of a causal LM of any family (PEFT wrappers are looked through).

    Raises:
        ValueError: no module list of `config.num_hidden_layers` modules is found.
    """
    # A PEFT wrapper's and a model's own attributes, which nn.Module does not declare.
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    depth = base.config.get_text_config().num_hidden_layers
    # Not those of a tower for images, which may be as many.
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"No stack of {depth} decoder layers was found in {type(base).__name__}, which the hidden-state term and "
        "block swapping need. Set `hidden_weight=0` and `swap_probability=0` to distil from the outputs alone."
    )
